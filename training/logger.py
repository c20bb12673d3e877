"""Logs the numbers of a run as JSON lines and in TensorBoard."""

import contextlib
import json
from pathlib import Path

from utils import UserError, write_text


class Logger:
    """One JSON line per log step in metrics.jsonl, and the same numbers in TensorBoard."""

    def __init__(self, folder: Path, step: int, enabled: bool = True) -> None:
        """`step` is where the run (re)starts: lines after it, from a run that was killed, are dropped."""
        self.path = folder / "metrics.jsonl"
        self.enabled = enabled
        self.board = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = []
        if step > 0 and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):    # a line cut by a kill, or not ours
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        write_text(self.path, "".join(kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, **values: float) -> None:
        if not self.enabled:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"can't write {self.path}: {error.strerror}") from error
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
