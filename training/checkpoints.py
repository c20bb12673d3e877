"""Training checkpoints: write, read, and resume a run."""

import contextlib
import hashlib
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.processes import on_main
from utils import UserError, atomic_write

_MAGIC = b"MGCKPT01"    # after the payload: this, then the sha256 of the payload


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a training checkpoint with its checksum: aside, flushed, renamed. A crash leaves the old file as it was."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(state, hashed)
        except RuntimeError as error:    # what torch.save makes of a full disk; the disk's own word came before it
            reason = error.__context__
            raise reason if isinstance(reason, OSError) else OSError(None, str(error).splitlines()[0]) from error
        file.write(_MAGIC + hashed.sha256.digest())


class _HashedFile:
    """Hashes what is written on its way to the file."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def load_checkpoint(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a training checkpoint written by `save_checkpoint`; its checksum and kind must fit, and no code is run."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"checkpoint {path} can't be read ({error.strerror})") from error
    trailer = len(_MAGIC) + 32
    if data[-trailer:-32] != _MAGIC:
        raise UserError(f"checkpoint {path} is truncated or not one of this project's training checkpoints")
    if hashlib.sha256(memoryview(data)[:-trailer]).digest() != data[-32:]:
        raise UserError(f"checkpoint {path} is damaged (its checksum doesn't fit); use an older one")
    try:
        state = torch.load(io.BytesIO(data[:-trailer]), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint {path} can't be loaded safely: {reason}") from error
    if not isinstance(state, dict) or state.get("kind") != kind:
        found = state.get("kind") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"checkpoint {path} holds {found!r}, expected {kind!r}")
    return state


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Write last.pt, keeping the one before as previous.pt."""
    last, new = folder / "last.pt", folder / "next.pt"
    save_checkpoint(new, state)    # first, so that a full disk leaves both older files as they are
    with contextlib.suppress(FileNotFoundError):
        os.replace(last, folder / "previous.pt")
    os.replace(new, last)


def find_resume(folder: Path, resume: str | None, kind: str) -> dict[str, Any] | None:
    """The state to continue from: `resume` is None, a file, or 'auto' for the newest good checkpoint in `folder`."""
    if resume is None:
        return None
    if resume != "auto":
        return load_checkpoint(resume, kind)
    # next.pt is there if save_last was killed between its renames. previous.pt and best.pt: either may be the newer one.
    for names in (("next.pt",), ("last.pt",), ("previous.pt", "best.pt")):
        good = []
        for name in names:
            if (folder / name).exists():
                try:
                    good.append(load_checkpoint(folder / name, kind))
                except UserError as error:
                    print(f"notice: {error}; looking for an older one", file=sys.stderr)
        if good:
            return max(good, key=lambda state: state.get("step", 0))
    print(f"notice: no usable checkpoint in {folder}, starting from the beginning", file=sys.stderr)
    return None


# What may differ between a run and its continuation without changing what is computed.
FREE_KEYS = ("accum_grad", "log_every", "save_every")


def check_same_config(saved: dict[str, dict], given: dict[str, dict]) -> None:
    """A run continues with the config that it began with."""
    for section, values in given.items():
        for key, value in values.items():
            if section in saved and key not in saved[section]:
                continue    # a key younger than the checkpoint
            before = saved.get(section, {}).get(key)
            if before != value and key not in FREE_KEYS:
                raise UserError(f"can't resume: {section}.{key} is {value!r}, the checkpoint was trained with {before!r}")


@dataclass
class Progress:
    """Saved in every checkpoint."""

    step: int = 0             # optimizer steps done
    best: float = math.inf    # lowest validation loss so far
    skipped: int = 0          # steps left out because their numbers were not finite
    pictures: int = 0         # in the training set


def resume_run(
    folder: Path, kind: str, wish: str | None, accelerator: Any, configs: dict, pictures: int,
    restore: Callable[[dict], None],
) -> Progress:    # fmt: skip
    """Continue as `wish` (--resume) says, in all processes from the same checkpoint: `restore` takes its state."""
    state = on_main(accelerator, lambda: _find(folder, kind, wish))
    if state is None:
        return Progress(pictures=pictures)
    try:
        check_same_config(state["config"], configs)
        progress = Progress(int(state["step"]), float(state["best"]))
        progress.skipped, progress.pictures = state.get("skipped", 0), state.get("pictures", pictures)
        if progress.pictures != pictures:
            raise UserError(f"can't resume: the run began with {progress.pictures} pictures, now there are {pictures}")
        restore(state)
    except UserError:
        raise
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"can't resume: the checkpoint does not fit this run ({reason})") from error
    return progress


def _find(folder: Path, kind: str, wish: str | None) -> dict | None:
    begun = [name for name in ("last.pt", "previous.pt", "best.pt") if (folder / name).exists()]
    if begun and wish is None:
        raise UserError(
            f"{folder} holds a run already ({', '.join(begun)}); go on with --resume auto, or give another --output-dir"
        )
    state = find_resume(folder, wish, kind)
    if state is not None and not (folder / "best.pt").exists():
        state["best"] = math.inf    # continued elsewhere: the best one from here on
    return state
