"""Muon: the matrices inside a network learn from orthogonalised momentum, everything else from AdamW.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; weight decay and step size as in Liu et al. 2025, "Muon is
scalable for LLM training", section 2.2, so that one learning rate serves both kinds of parameters. torch.optim.Muon and
timm's give the same losses, but multiply in bfloat16 everywhere: 17 times slower on a CPU without bfloat16 instructions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)    # Newton-Schulz coefficients: singular values go to about 1 within five rounds


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V' of each matrix U S V', roughly: its singular values come out between 0.7 and 1.2.

    matrices: (M, rows, columns), floating point.  Returns the same shape in float32. On a GPU it multiplies in bfloat16.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices                                           # (M, r, s), r <= s
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-30)                     # largest singular value <= 1
    x = x.bfloat16() if x.is_cuda else x.float()
    for _ in range(5):
        gram = x @ x.mT                                                             # (M, r, r)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.AdamW):
    """Muon for `matrices`, AdamW for `others`.

    An update of a matrix has the root mean square that AdamW's usually has (0.2), whatever its shape.

    Args:
        matrices: parameters with two dimensions. Not embeddings: each of their rows is used alone.
        others: all other parameters.
        options: AdamW's lr, betas and weight_decay; lr and weight_decay (decoupled) are those of the matrices as well.
        momentum: share of the momentum that stays from one step to the next (Nesterov).
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], momentum: float = 0.95, **options: float
    ) -> None:
        groups = [{"params": list(matrices), "momentum": momentum}, {"params": list(others), "momentum": None}]
        super().__init__([group for group in groups if group["params"]], **options)

    @torch.no_grad()
    def step(self) -> None:
        mine = [group for group in self.param_groups if group["momentum"] is not None]
        for group in mine:
            self.step_matrices(group)
        gradients = {p: p.grad for group in mine for p in group["params"]}
        for parameter in gradients:
            parameter.grad = None    # AdamW passes over parameters without a gradient
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def step_matrices(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}    # all of one shape at once: fewer launches on a GPU
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for (rows, columns), parameters in by_shape.items():
            updates = orthogonalize(torch.stack([self.look_ahead(p, group["momentum"]) for p in parameters]))
            size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=size)

    def look_ahead(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Mix the gradient into the momentum, and return the momentum mixed into the gradient (Nesterov)."""
        state = self.state[parameter]
        if not state:    # `step` is what AdamW expects of every state that it loads
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter)}
        state["step"] += 1
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
