"""Training checkpoints: write, read, and resume a run."""

import contextlib
import hashlib
import io
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.run import Run
from utils import UserError, atomic_write

_MAGIC = b"MGCKPT01"    # after the payload: this, then the sha256 of the payload


class OtherKind(UserError):
    """A good checkpoint of something else."""


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a training checkpoint with its checksum. It is written aside and renamed, so a crash leaves the old file."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save(state, hashed)
        except RuntimeError as error:    # torch.save turns a full disk into this; the system's own error is its context
            reason = error.__context__
            raise reason if isinstance(reason, OSError) else OSError(None, str(error).splitlines()[0]) from error
        file.write(_MAGIC + hashed.sha256.digest())


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def load_checkpoint(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint`. Its checksum and kind must fit, and no code in it is run."""
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
        raise OtherKind(f"checkpoint {path} holds {found!r}, expected {kind!r}")
    return state


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Write last.pt, keeping the one before as previous.pt."""
    last, new = folder / "last.pt", folder / "next.pt"
    save_checkpoint(new, state)    # first, so that a full disk leaves both older files as they are
    with contextlib.suppress(FileNotFoundError):
        os.replace(last, folder / "previous.pt")
    os.replace(new, last)


# ---- resuming ----


NAMES = (("next.pt",), ("last.pt",), ("previous.pt", "best.pt"))    # newest first; either of the last two may be the newer
WEIGHTS = ("*.pt", "*.pth", "*.ckpt", "*.safetensors")


def find_resume(folder: Path, wish: str | None, kind: str) -> dict[str, Any] | None:
    """The checkpoint to continue from, or None to begin.

    Args:
        wish: --resume: None, a file, or 'auto' for the newest good checkpoint in `folder`.
        kind: of the run. A folder that holds other checkpoints, or unreadable ones, is refused.
    """
    found = sorted({path.name for pattern in WEIGHTS for path in folder.glob(pattern)})
    holds = f"{folder} holds {', '.join(found)}"
    if wish not in (None, "auto"):
        state = load_checkpoint(wish, kind)
        if found and Path(wish).resolve().parent != folder.resolve():
            raise UserError(f"{holds} already; give another --output-dir, or --resume auto if this is the run to continue")
    elif not found:
        if wish:
            print(f"notice: no checkpoint in {folder}, starting from the beginning", file=sys.stderr)
        return None
    else:
        state, reasons = newest(folder, kind)
        if state is None:
            raise UserError(f"{holds}, but no checkpoint that can be continued ({reasons}); give another --output-dir")
        if wish is None:
            raise UserError(f"{holds}: a run already; continue it with --resume auto, or give another --output-dir")
    if not (folder / "best.pt").exists():
        state["best"] = math.inf    # continued elsewhere: the best one from here on
    return state


def newest(folder: Path, kind: str) -> tuple[dict[str, Any] | None, str]:
    """The newest good checkpoint of a folder, and what is wrong with newer ones. One of another kind is refused."""
    reasons = []
    for names in NAMES:
        good = []
        for path in (folder / name for name in names if (folder / name).exists()):
            try:
                good.append(load_checkpoint(path, kind))
            except OtherKind as error:
                raise UserError(f"{error}; give another --output-dir") from error
            except UserError as error:
                reasons.append(str(error))
        if good:
            for reason in reasons:
                print(f"notice: {reason}; looking for an older one", file=sys.stderr)
            return max(good, key=lambda state: state.get("step", 0)), ""
    return None, "; ".join(reasons) or f"there is no {NAMES[1][0]}"


# What may differ between a run and its continuation without changing what is computed.
FREE_KEYS = ("accum_grad", "log_every", "save_every")


def check_same_config(saved: dict[str, dict], given: dict[str, dict], longer: str = "") -> None:
    """A run continues with the config that it began with. `longer` says how to train on after its last epoch."""
    for section, values in given.items():
        for key, value in values.items():
            if section in saved and key not in saved[section]:
                continue    # a key younger than the checkpoint
            before = saved.get(section, {}).get(key)
            if before != value and key not in FREE_KEYS:
                hint = f". {longer}" if key == "epochs" else ""
                raise UserError(
                    f"can't resume: {section}.{key} is {value!r}, the checkpoint was trained with {before!r}{hint}"
                )


def check_same_input(saved: dict[str, str], given: dict[str, str], allowed: bool) -> None:
    """A run continues with the pictures and weights that it began with, unless `allowed` says that they may change."""
    changed = [name for name, value in given.items() if name in saved and saved[name] != value]
    if not changed:
        return
    name = changed[0]
    difference = f"{name}: now {given[name]}, the run began with {saved[name]}"
    if not allowed:
        raise UserError(f"can't resume: other {difference}; give the same again, or --allow-changes")
    print(f"notice: the run continues with other {difference}", file=sys.stderr)


@dataclass
class Progress:
    """Saved in every checkpoint."""

    step: int = 0             # optimizer steps done
    best: float = math.inf    # lowest validation loss so far
    skipped: int = 0          # steps left out because their numbers were not finite


def resume_run(run: Run, state: dict[str, Any] | None, allow_changes: bool = False) -> Progress:
    """Continue from a checkpoint of `find_resume`, in all processes from the same one."""
    if state is None:
        return Progress()
    try:
        check_same_config(state["config"], run.configs, run.longer)
        check_same_input(state.get("input", {}), run.input, allow_changes)
        run.restore(state)
        return Progress(int(state["step"]), float(state["best"]), int(state.get("skipped", 0)))
    except UserError:
        raise
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"can't resume: the checkpoint does not fit this run ({reason})") from error
