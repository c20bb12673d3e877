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

from models.precision import pick_precision
from training.checkpoints import Progress, find_resume, resume_run, save_checkpoint, save_last
from training.logger import Logger
from training.processes import agreed_signal, check_split, errors_told_once, on_main, start_accelerator
from training.run import Run
from training.speed import check_capture
from training.stopping import NotFinite, StopRequest
from utils import UserError, notice, pick_device, seeded, writable_folder

TELL_AFTER, DAY = 20, 24 * 3600    # seconds
MAX_SKIPPED = 10    # steps that --on-nan skip leaves out before it gives up


def run_stage(args: Any, c: Any, kind: str, build: Callable[[Any], Run], **ddp_options: bool) -> int:
    """Start the processes, build the run, resume it and train it: what every stage does.

    Args:
        args: the command's flags.
        c: the stage's config; its precision 'auto' is replaced by the one that this machine trains in.
        kind: of its checkpoints.
        build: accelerator -> the run.
    Returns:
        The exit code of `training_loop`.
    """
    c.precision = pick_precision(c.precision, pick_device(args.device))    # so the checkpoint says which one it was
    accelerator = start_accelerator(args.device, c.precision, **ddp_options)
    with errors_told_once(accelerator, args.output_dir):
        check_split(c.batch_size, c.accum_grad, accelerator)
        check_capture(getattr(args, "capture", False), accelerator)
        check_places(args)
        folder = on_main(accelerator, lambda: writable_folder(args.output_dir))
        state = on_main(accelerator, lambda: find_resume(folder, args.resume, kind))
        run = build(accelerator)
        return training_loop(run, folder, resume_run(run, state, args.allow_changes), args.on_nan)


def check_places(args: Any) -> None:
    """Refuse an --output-dir that holds what the run reads: it would be written over."""
    folder = Path(args.output_dir).resolve()
    for flag in ("vqgan", "model", "init", "discriminators"):
        path = getattr(args, flag, None)
        if path and Path(path).resolve().parent == folder:
            raise UserError(f"--{flag} {path} lies in --output-dir {folder}; give another --output-dir")
    for path in [*args.train_dir, args.val_dir]:
        if folder == Path(path).resolve():
            raise UserError(f"--output-dir {folder} is a folder of pictures; give another --output-dir")


def training_loop(run: Run, folder: Path, progress: Progress, on_nan: str = "stop") -> int:
    """Train from where `progress` stands to the end.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.
    """
    c, accelerator, total = run.config, run.accelerator, run.total_steps
    main, stopped = accelerator.is_main_process, 0
    began, first, told = time.perf_counter(), progress.step, False
    since = (began, first)    # of the last validation
    with (
        StopRequest() as stop,
        contextlib.closing(Logger(folder, progress.step, main)) as logger,
        tqdm(total=total * c.batch_size, initial=progress.step * c.batch_size, unit="img", disable=not main) as bar,
    ):
        if main and progress.step == total:
            notice(f"this run is finished. {run.longer}")
        if main and progress.step == 0:
            save_last(folder, run.state() | asdict(progress))    # a disk that is too small shows now, not after hours
        while progress.step < total and not stopped:
            # For what models draw by themselves, such as dropout.
            torch.manual_seed(seeded(c.seed, "step", progress.step, accelerator.process_index).initial_seed())
            values = step_or_skip(run.train_step, progress, on_nan)
            progress.step += 1
            if main and not told and progress.step < total and time.perf_counter() - began > TELL_AFTER:
                told = tell_estimate(run, progress.step, (time.perf_counter() - began) / (progress.step - first))
            shown = {name: f"{values[name]:.3g}" for name in ("loss", "learning_rate") if name in values}
            bar.set_postfix(shown, refresh=False)
            bar.update(c.batch_size)
            if progress.step % c.log_every == 0 or values.keys() & {"codes_used", "skipped"}:
                logger.log(progress.step, **values)
            epoch, rest = divmod(progress.step, run.per_epoch)
            if rest == 0 and is_due(epoch, c.validate_every, c.epochs):
                speed = (progress.step - since[1]) * c.batch_size / (time.perf_counter() - since[0])
                validate(run, epoch, folder, progress, logger, speed)
                since = (time.perf_counter(), progress.step)
            stopped = agreed_signal(stop, accelerator)
            if main and (is_due(progress.step, c.save_every, total) or stopped):
                save_last(folder, run.state() | asdict(progress))
    if stopped and main:
        print(f"stopped by signal {stopped} after step {progress.step}; continue with --resume auto", file=sys.stderr)
    accelerator.end_training()
    return 128 + stopped if stopped else 0


def tell_estimate(run: Run, step: int, seconds: float) -> bool:
    """Say how long the rest of the run takes at so many `seconds` a step."""
    left, c = (run.total_steps - step) * seconds, run.config
    minutes = max(1, round(left / 60))
    duration = f"{left / 3600:.0f} hours" if left > 5 * 3600 else f"{minutes} minute{'s' if minutes > 1 else ''}"
    text = f"about {duration} left for {run.total_steps - step:,} steps at {c.batch_size / seconds:.1f} images/s"
    if left > DAY:
        text += "; both stages of configs/small.yml take a quarter of an hour on a CPU, those of configs/tiny.yml a minute"
    notice(text)
    return True


def validate(run: Run, epoch: int, folder: Path, progress: Progress, logger: Logger, speed: float) -> None:
    """Log the scores of the averaged model. If its loss has never been lower, keep it as best.pt and export it."""
    scores = run.validate(epoch, folder / f"samples_{progress.step:07d}.png")
    logger.log(progress.step, **scores)
    if run.accelerator.is_main_process:
        line = {"step": progress.step, "images/s": round(speed, 1)}
        tqdm.write(json.dumps(line | {name: round(value, 4) for name, value in scores.items()}))
    if scores["val_loss"] < progress.best:
        progress.best = scores["val_loss"]
        if run.accelerator.is_main_process:
            save_checkpoint(folder / "best.pt", run.state() | asdict(progress))
            run.export(folder / "maskgit.safetensors", progress.step)


def is_due(count: int, every: int, total: int) -> bool:
    """Whether something is done after this epoch or step, counted from 1: after every so many, and after the last."""
    return count % every == 0 or count == total


def step_or_skip(train_step: Callable[[int], dict[str, float]], progress: Progress, on_nan: str) -> dict[str, float]:
    """A step's numbers. With --on-nan skip, steps that are not finite are left out, at most MAX_SKIPPED in a run."""
    try:
        return train_step(progress.step)
    except NotFinite as error:
        if on_nan == "stop":
            raise
        progress.skipped += 1
        if progress.skipped > MAX_SKIPPED:
            raise NotFinite(f"{error} ({MAX_SKIPPED} steps were left out before, more are not)") from error
        notice(f"step left out ({progress.skipped} of at most {MAX_SKIPPED}): {error}")
        return {"skipped": progress.skipped}
