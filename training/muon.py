"""Muon: the matrices inside a network learn from orthogonalised momentum, everything else from AdamW.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; weight decay and step size as in Liu et al. 2025, "Muon is
scalable for LLM training", section 2.2, so that one learning rate serves both kinds of parameters.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)    # Newton-Schulz coefficients: singular values go to about 1 within five rounds


def orthogonalize(matrices: Tensor, rounds: int = 5) -> Tensor:
    """U V' of each matrix U S V', roughly: singular values come out between 0.7 and 1.2, all directions count alike.

    Args:
        matrices: (M, rows, columns) floating point. Computed in bfloat16, which is enough and the fastest.
    Returns:
        (M, rows, columns) float32.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices                                           # (M, r, s), r <= s
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)).bfloat16()        # largest singular value <= 1
    for _ in range(rounds):
        gram = x @ x.mT                                                             # (M, r, r)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.AdamW):
    """Muon for `matrices`, AdamW for `others`.

    An update of a matrix has the root mean square that AdamW's usually has (0.2), whatever its shape.

    Args:
        matrices: parameters with two dimensions. Not the embeddings: each of their rows is used alone.
        others: all other parameters.
        lr: learning rate of both.
        betas: AdamW's.
        weight_decay: decoupled, of both.
        momentum: share of the momentum that stays from one step to the next (Nesterov).
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], lr: float,
        betas: tuple[float, float] = (0.9, 0.96), weight_decay: float = 0.03, momentum: float = 0.95,
    ) -> None:    # fmt: skip
        groups = [{"params": list(matrices), "momentum": momentum}, {"params": list(others), "momentum": None}]
        for parameter in groups[0]["params"]:
            if parameter.ndim != 2:
                shape = tuple(parameter.shape)
                raise ValueError(f"Muon's matrices must have 2 dimensions, got a parameter of shape {shape}")
        super().__init__([group for group in groups if group["params"]], lr=lr, betas=betas, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        mine = [group for group in self.param_groups if group["momentum"] is not None]
        for group in mine:
            self.step_matrices(group)
        gradients = {p: p.grad for group in mine for p in group["params"]}
        for parameter in gradients:
            parameter.grad = None    # AdamW passes over parameters without a gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def step_matrices(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for (rows, columns), parameters in by_shape.items():
            updates = orthogonalize(torch.stack([self.look_ahead(p, group["momentum"]) for p in parameters]))
            size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)

    def look_ahead(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The gradient mixed into the momentum, and the momentum into the gradient (Nesterov)."""
        state = self.state[parameter]
        if not state:    # `step` is what AdamW expects of every state that it loads
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter)}
        state["step"] += 1
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
