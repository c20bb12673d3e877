"""What stops a run: signals, and numbers that are not finite."""

import math
import signal
from typing import Any

from utils import UserError


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag, so that a run finishes its step and saves before it ends."""

    def __enter__(self) -> "StopRequest":
        self.signal: int | None = None
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:    # asked again: don't wait for the step
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite. Raised before it touches weights or checkpoints."""


def check_all_finite(values: dict[str, float], step: int) -> None:
    """Raise NotFinite that names the step and the first number that is not finite. Terms come before their sums."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotFinite(
                f"the {name.replace('_', ' ')} of step {step} is {value}: stopped before the weights were changed. Leave "
                "such steps out with --resume auto --on-nan skip, or begin anew with a lower learning rate or precision fp32"
            )
