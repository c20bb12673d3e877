"""A run of one stage: what all of its steps need, and what its checkpoints hold."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.config import TrainConfig
from training.masks import MaskSource
from training.processes import average_over_processes
from training.stopping import check_all_finite


@dataclass
class Run:
    """The base of the stages' runs, which add their models and optimizers.

    The training loop calls `train_step`, `validate` and `export`. Checkpoints hold `state()`.
    """

    KIND: ClassVar[str]             # of checkpoint
    longer: ClassVar[str] = ""      # how to train on after the last epoch

    config: TrainConfig
    configs: dict[str, dict]        # all that the run was made from, for the checkpoint
    accelerator: Accelerator
    pictures: Sized                 # the training set
    val_images: Tensor              # (M, 3, H, W) uint8
    input: dict[str, str]           # pictures and weights that the run was given, by name: what they are, shortly
    masks: MaskSource               # of holes

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch. The pictures that don't fill a batch are left out."""
        return len(self.pictures) // self.config.batch_size

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.per_epoch

    # ---- what every stage has of its own ----

    def parts(self) -> dict[str, Any]:
        """Models and optimizers that a checkpoint holds, by their name in it."""
        raise NotImplementedError

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step. Returns numbers to log. Raises NotFinite before it has changed anything."""
        raise NotImplementedError

    def validate(self, epoch: int, grid: Path) -> dict[str, float]:
        """Scores of the averaged model after some epochs: `val_loss` and others, the same in all processes.

        A grid of pictures is written to `grid`.
        """
        raise NotImplementedError

    def export(self, path: Path, step: int) -> None:
        """Write the finished model, where the stage makes one."""

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """A checkpoint's content, less the run's progress."""
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return {"kind": self.KIND, "config": self.configs, "input": self.input, **parts}

    def restore(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    # ---- one process or many ----

    @property
    def mine(self) -> slice:
        """This process's rows of a batch that all processes draw alike."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)

    def unwrap(self, module: nn.Module) -> Any:
        return self.accelerator.unwrap_model(module)

    @contextlib.contextmanager
    def frozen(self, *discriminators: nn.Module) -> Iterator[list[nn.Module]]:
        """The discriminators for the generator's loss: they get no gradients, and none are exchanged between processes."""
        plain = [self.unwrap(x).requires_grad_(False) for x in discriminators]
        yield plain
        for discriminator in plain:
            discriminator.requires_grad_(True)

    @contextlib.contextmanager
    def micro_batch(self, index: int, *models: nn.Module) -> Iterator[slice]:
        """The rows of a micro-batch. Gradients of the models add up, and are exchanged with the last micro-batch only."""
        parts = self.config.accum_grad
        with contextlib.ExitStack() as stack:
            for model in models if index < parts - 1 else ():
                stack.enter_context(self.accelerator.no_sync(model))
            yield slice(index, None, parts)

    def micro_batches(self, micro_step: Callable[[slice], dict[str, Tensor]], *models: nn.Module) -> dict[str, Tensor]:
        """Call `micro_step` with the rows of each micro-batch. Returns its terms, averaged."""
        parts, totals = self.config.accum_grad, {}
        for index in range(parts):
            with self.micro_batch(index, *models) as rows:
                terms = micro_step(rows)
            totals = {name: totals.get(name, 0) + term / parts for name, term in terms.items()}
        return totals

    def optimizer_step(
        self, step: int, totals: dict[str, Tensor], learners: dict[str, Iterable[nn.Parameter]],
        *optimizers: torch.optim.Optimizer,
    ) -> dict[str, float]:    # fmt: skip
        """Clip the gradients, check every number, and let the optimizers step.

        Args:
            totals: numbers of this process, to be averaged over all and returned.
            learners: parameters whose gradients are clipped together, by the name under which their norm is returned.
        Raises:
            NotFinite: a number or a gradient is not finite; nothing has been changed.
        """
        clip = self.accelerator.clip_grad_norm_
        norms = {name: clip(parameters, self.config.grad_clip) for name, parameters in learners.items()}
        values = average_over_processes(totals | norms, self.accelerator)
        check_all_finite(values, step)
        for optimizer in optimizers:
            optimizer.step()
        return values

    def local_batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """This process's rows of tensors of equal length, in batches, on its device."""
        mine, size = [tensor[self.mine] for tensor in tensors], self.config.batch_size
        for start in range(0, len(mine[0]), size):
            yield tuple(tensor[start : start + size].to(self.accelerator.device) for tensor in mine)

    def mean_scores(self, sums: Iterable[dict[str, Tensor]], count: int) -> dict[str, float]:
        """Scores from the sums over each of this process's batches; `count`: of what is summed up, in all processes."""
        totals: dict[str, Tensor] = {}
        for batch in sums:
            totals = {name: totals.get(name, 0) + value.double() for name, value in batch.items()}
        share = self.accelerator.num_processes / count
        return average_over_processes({name: value * share for name, value in totals.items()}, self.accelerator)
