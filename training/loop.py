"""The training loop: steps, validation, logging, stop requests."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.checkpoints import Progress, save_checkpoint, save_last
from training.logger import Logger
from training.processes import agreed_signal
from training.stopping import NotFinite, StopRequest
from utils import seeded

MAX_SKIPPED = 10    # steps that --on-nan skip leaves out before it gives up


class StepCount:
    """Steps of a run, from its `config` and its `pictures`."""

    @property
    def per_epoch(self) -> int:
        return len(self.pictures) // self.config.batch_size

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.per_epoch


def training_loop(
    c: Any,
    accelerator: Any,
    folder: Path,
    progress: Progress,
    *,
    per_epoch: int,
    on_nan: str,
    train_step: Callable[[int], dict[str, float]],
    validate: Callable[[int], dict[str, float] | None],
    state: Callable[[], dict],
    export: Callable[[], None] | None = None,
) -> int:
    """Train from where `progress` stands to the end.

    Args:
        c: the stage's config: epochs, batch_size, seed, log_every, save_every.
        train_step: step -> numbers to log. Raises NotFinite before it has changed anything.
        validate: epochs done -> scores with val_loss, the same in all processes; None where none is due.
        state: the checkpoint's content; `progress` is added to it.
        export: called when the validation loss has never been lower.
    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.
    """
    total, main = c.epochs * per_epoch, accelerator.is_main_process
    clock, done, stopped = Clock(), progress.step * c.batch_size, 0
    with (
        StopRequest() as stop,
        contextlib.closing(Logger(folder, progress.step, main)) as logger,
        tqdm(total=total * c.batch_size, initial=done, unit="img", disable=not main) as bar,
    ):
        if main and progress.step == 0:
            save_last(folder, state() | asdict(progress))    # a disk that is too small shows now, not after hours
        while progress.step < total and not stopped:
            # For what models draw by themselves, such as dropout.
            torch.manual_seed(seeded(c.seed, "step", progress.step, accelerator.process_index).initial_seed())
            values = step_or_skip(train_step, progress, on_nan)
            progress.step += 1
            clock.count(c.batch_size)
            shown = {name: f"{values[name]:.3g}" for name in ("loss", "learning_rate") if name in values}
            bar.set_postfix(shown, refresh=False)
            bar.update(c.batch_size)
            if progress.step % c.log_every == 0 or values.keys() & {"codes_used", "skipped"}:
                logger.log(progress.step, **values)
            scores = validate(progress.step // per_epoch) if progress.step % per_epoch == 0 else None
            if scores:
                logger.log(progress.step, **scores)
                if main:
                    speed = {"step": progress.step, "images/s": clock.speed()}
                    tqdm.write(json.dumps(speed | {name: round(value, 4) for name, value in scores.items()}))
                if scores["val_loss"] < progress.best:
                    progress.best = scores["val_loss"]
                    if main:
                        save_checkpoint(folder / "best.pt", state() | asdict(progress))
                        if export:
                            export()
                clock = Clock()
            stopped = agreed_signal(stop, accelerator)
            if main and (is_due(progress.step, c.save_every, total) or stopped):
                save_last(folder, state() | asdict(progress))
    if stopped and main:
        print(f"stopped by signal {stopped} after step {progress.step}; continue with --resume auto", file=sys.stderr)
    accelerator.end_training()
    return 128 + stopped if stopped else 0


def is_due(count: int, every: int, total: int) -> bool:
    """Whether something is done after this epoch or step, counted from 1: after every so many, and after the last."""
    return count % every == 0 or count == total


def step_or_skip(train_step: Callable[[int], dict[str, float]], progress: Progress, on_nan: str) -> dict[str, float]:
    """A step's numbers; with --on-nan skip, a step that is not finite is left out, MAX_SKIPPED times in a run."""
    try:
        return train_step(progress.step)
    except NotFinite as error:
        if on_nan == "stop":
            raise
        progress.skipped += 1
        if progress.skipped > MAX_SKIPPED:
            raise NotFinite(f"{error} ({MAX_SKIPPED} steps were left out before, more are not)") from error
        tqdm.write(f"notice: step left out ({progress.skipped} of at most {MAX_SKIPPED}): {error}", file=sys.stderr)
        return {"skipped": progress.skipped}


class Clock:
    """Pictures per second since it was made."""

    def __init__(self) -> None:
        self.started, self.pictures = time.perf_counter(), 0

    def count(self, pictures: int) -> None:
        self.pictures += pictures

    def speed(self) -> float:
        return round(self.pictures / (time.perf_counter() - self.started), 1)
