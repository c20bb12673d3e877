"""What both training scripts and the tools share: config, seeds, checkpoints, EMA, logging, errors. No model knowledge."""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import yaml
from torch import Tensor, nn

T = TypeVar("T")

# ---- errors and the command line ----


class UserError(ValueError):
    """Something the user gave can't be used; the message is a sentence that says what to do."""

    user_error = True


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main`: user errors become one sentence and exit code 2, Ctrl-C exit code 130."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:    # the reader of our output, e.g. `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except ValueError as error:
        if not getattr(error, "user_error", False):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:    # a file that can't be used, where nobody has a better sentence for it
        if error.filename is None:
            raise
        print(f"error: can't use {error.filename}: {error.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are user errors like all others: one sentence, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; flushed and renamed when the block ends, removed when it fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):    # gone already, or never there
            temporary.unlink()


def writable_folder(path: str | Path) -> Path:
    """Make sure that a folder exists and can be written before hours of work go into it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {path} is not writable ({error.strerror}); give another one") from error
    return path


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} asked for, but PyTorch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


# ---- config ----


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does; PyYAML's own rule makes it a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$|^[-+]?(\d[\d_]*\.\d*|\.\d+)$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: list[str] = ()) -> dict[str, Any]:
    """Read a YAML config and apply `section.key=value` overrides (values in YAML)."""
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"config {path} can't be read ({error.strerror}); give a YAML file, e.g. one of configs/") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise UserError(f"config {path} must consist of sections of `key: value` lines, such as vqgan and transformer")
    for override in overrides:
        key, sign, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (sign and dot and section and name):
            raise UserError(f"--set {override!r} is not of the form section.key=value, e.g. transformer.depth=8")
        if section not in config:
            raise UserError(f"--set {override!r}: no section {section!r} in {path}; it has {', '.join(config)}")
        try:
            config[section][name] = yaml.load(value, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"--set {override!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error
    return config


def build_config(cls: type[T], values: dict[str, Any], section: str) -> T:
    """Fill a dataclass; unknown keys, wrong types and values out of range are refused by the key's full name."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    cls.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    # JSON: strict, yet a list may fill a list field. YAML's dates, which JSON lacks, become text.
    text = json.dumps({str(key): value for key, value in values.items()}, default=str)
    try:
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (section, *first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error" and message.split()[0] in cls.__dataclass_fields__:
            raise UserError(f"config {key}.{message}") from error    # from __post_init__, which begins with the key's name
        if first["type"] == "unexpected_keyword_argument":
            message = f"unknown key; {section} has {', '.join(cls.__dataclass_fields__)}"
        raise UserError(f"config {key}: {message}") from error


# ---- randomness: a function of what it is for, never of what ran before ----


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose, e.g. seeded(seed, 'mask', step). Equal keys give equal numbers."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@functools.lru_cache(maxsize=1)    # asked for at every step, new once an epoch
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits `count` samples: (count,) int64, not to be changed in place."""
    return torch.randperm(count, generator=seeded(seed, "order", epoch))


# ---- optimisation ----


def cosine_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Learning rate: linear warm-up over `warmup` steps, then a half cosine down to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, parameters only; call after optimizer.step()."""
    averages, parameters = zip(*zip(ema.parameters(), model.parameters(), strict=True), strict=True)
    torch._foreach_lerp_(averages, parameters, 1.0 - decay)    # all at once: hundreds of launches fewer on a GPU


def ema_decay_at(step: int, decay: float) -> float:
    """Short memory at the start, so that the average forgets the random initialisation: min(decay, (1+t)/(10+t))."""
    return min(decay, (1 + step) / (10 + step))


# ---- checkpoints ----

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


# ---- logging ----


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
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(kept))
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

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.signal if self.signal else 0


def fingerprint(*parts: Any) -> str:
    """A short hash of tensors, dataclasses and plain values, e.g. to key a cache."""
    total = hashlib.sha256()
    for part in parts:
        one = hashlib.sha256()    # a hash for each part, so that (1, 23) and (12, 3) differ
        if isinstance(part, Tensor):
            one.update(f"{part.dtype} {tuple(part.shape)}".encode())
            one.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        else:
            one.update(repr(asdict(part) if is_dataclass(part) else part).encode())
        total.update(one.digest())
    return total.hexdigest()[:16]


# ---- processes (Accelerate over torch.distributed) ----


def make_accelerator(device: str, precision: str, handlers: list[Any] = ()):
    """One process or many: the same script under `python`, `accelerate launch` and `torchrun`."""
    from accelerate import Accelerator

    chosen = pick_device(device)
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)    # Accelerate takes the current device, or its local rank's under a launcher
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=chosen.type == "cpu", kwargs_handlers=list(handlers)
    )


def check_split(batch_size: int, accum_grad: int, accelerator: Any) -> None:
    """The global batch must split evenly, or the mean of the parts would not be the mean of the whole."""
    processes = accelerator.num_processes
    if batch_size % (processes * accum_grad):
        raise UserError(
            f"batch_size ({batch_size}) must be divisible by processes x accum_grad ({processes} x {accum_grad})"
        )


def average_over_processes(values: dict[str, float | Tensor], accelerator: Any) -> dict[str, float]:
    """Means over all processes of numbers, or of tensors that hold one: read from the device once, not one by one."""
    table = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in values.values()])
    if accelerator.num_processes > 1:
        table = accelerator.reduce(table.to(accelerator.device), "mean")
    return dict(zip(values, table.tolist(), strict=True))


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite. Raised before it touches weights or checkpoints."""


def check_finite(value: float | Tensor, what: str) -> None:
    value = value.item() if isinstance(value, Tensor) else value
    if not math.isfinite(value):
        raise NotFinite(
            f"the {what} is {value}: stopped before the weights were changed. Leave such steps out with "
            "--resume auto --on-nan skip, or begin anew with a lower learning rate or precision fp32"
        )


# ---- flags of the training scripts ----


def add_training_flags(
    parser: argparse.ArgumentParser, default_config: str, train_dir: str = "folder(s) of training pictures"
) -> None:
    flag = parser.add_argument
    flag("--config", default=default_config, help="YAML file (default: %(default)s)")
    flag("--train-dir", required=True, nargs="+", help=train_dir)
    flag("--val-dir", required=True, help="folder of validation pictures")
    flag("--output-dir", required=True, help="for checkpoints, metrics.jsonl, TensorBoard and picture grids")
    flag("--epochs", type=int)
    flag("--batch-size", type=int, help="pictures per optimizer step, over all processes")
    flag("--learning-rate", type=float)
    flag("--accum-grad", type=int, help="micro-batches per optimizer step")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--seed", type=int)
    flag("--resume", metavar="FILE|auto", help="continue from a checkpoint; auto: the newest good one")
    flag("--bad-images", choices=("error", "skip"), default="error", help="what unreadable pictures lead to")
    flag("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one config value")


def with_flags(section: dict[str, Any], args: Any) -> dict[str, Any]:
    """Flags that were given win over the config file."""
    flags = {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate", "accum_grad", "seed")}
    return section | {name: value for name, value in flags.items() if value is not None}


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
