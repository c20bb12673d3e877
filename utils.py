"""What every command uses: errors, notices, the command line, files, config and seeds.

It imports nothing of this project, and PyTorch only where it is used, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import yaml
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

NAMED = 3    # files that a notice names

# What Apple's MPS lacks is computed on the CPU, with a warning that names it. PyTorch reads this when it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


class UserError(ValueError):
    """Something the user gave can't be used; the message is a sentence that says what to do."""

    user_error = True

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code    # 2: nothing was done


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main`. User errors become one sentence and exit code 2; Ctrl-C gives exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):    # a name that is not UTF-8 must not stop what prints it
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main()
        more_notices()
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
        code = getattr(error, "exit_code", 2)
    except OSError as error:    # a file that can't be used, where nobody has a better sentence for it
        if error.filename is None:
            raise
        print(f"error: can't use {error.filename}: {error.strerror}", file=sys.stderr)
        code = 2
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are user errors like all others: one sentence, without the usage text before it.

    Its description is shown as it is written, with its line breaks.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        _told.clear()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def count(text: str) -> int:
    """A flag's type: a whole number, 1 or more."""
    if not text.strip().lstrip("+-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    if not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be at least 1 and less than 2^31, got {text}")
    return int(text)


def amount(text: str) -> float:
    """A flag's type: a number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


def check_names(flag: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that a flag doesn't know; for flags whose choices are slow to import, so that --help does without."""
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"unknown {flag} {', '.join(unknown)}; expected {', '.join(known)}")


# ---- notices and progress ----

_told: dict[str, list[str]] = {}    # kind of notice -> the files that it was not printed for


def notice(sentence: str, kind: str | None = None, name: str = "") -> None:
    """Tell the user something on stderr, a progress bar notwithstanding.

    Of each `kind` the first notice is printed at once. The names of the others are kept, and `more_notices` counts them.
    """
    if kind is not None and kind in _told:
        _told[kind].append(name)
        return
    if kind is not None:
        _told[kind] = []
    tqdm.write(f"notice: {sentence}", file=sys.stderr)


def more_notices() -> None:
    """Say for how many more files each kind of notice holds."""
    for kind, names in _told.items():
        if names:
            tqdm.write(f"notice: {kind}: {listing(names)} too", file=sys.stderr)
    _told.clear()


class progress(tqdm):
    """A progress bar with an estimate of the time left. Where no terminal shows it, it is one line every half minute."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.live = sys.stderr.isatty()
        rare = {"delay": 30, "mininterval": 30, "maxinterval": 60, "leave": False}
        super().__init__(*args, **options | ({} if self.live else rare))

    def clear(self, nolock: bool = False) -> None:
        if self.live:
            super().clear(nolock)

    def refresh(self, nolock: bool = False, lock_args: tuple | None = None) -> bool | None:
        if self.live or not nolock:    # with `nolock`, to make room for a notice
            return super().refresh(nolock, lock_args)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.live:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr)


def listing(names: list[str], limit: int = NAMED) -> str:
    """'a, b, c and 7 more'."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---- files ----

@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` where a file or a folder is to be made.

    When the block ends, what was made there is flushed and renamed to `path`; when the block fails, it is removed. A file
    replaces an older one; a folder takes the place of nothing or of an empty folder.
    """
    path = Path(path)
    short = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]    # fits where the name itself is as long as allowed
    temporary = path.with_name(f".{short}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_dir():
            if path.exists():
                path.rmdir()
        else:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):    # gone already, or never there
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    """'auto' is CUDA where there is one, else Apple's MPS, else the CPU."""
    import torch

    expected = "expected auto, cpu, cuda, cuda:N or mps"
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; {expected}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not supported; {expected}")
    if (device.type == "cuda" and not torch.cuda.is_available()) or (device.type == "mps" and not has_mps):
        raise UserError(f"device {name!r} asked for, but PyTorch sees no {device.type.upper()} device; use --device cpu")
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


T = TypeVar("T")


def build_config(cls: type[T], values: dict[str, Any], section: str) -> T:
    """Fill a pydantic dataclass; unknown keys, wrong types and values out of range are refused by the key's full name."""
    from pydantic import TypeAdapter, ValidationError

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


# ---- seeds and hashes ----


def seeded(*key: int | str) -> torch.Generator:
    """A CPU generator for one purpose, e.g. seeded(seed, 'mask', step). Equal keys give equal numbers."""
    import torch

    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fingerprint(*parts: Any) -> str:
    """A short hash of tensors, dataclasses and plain values, e.g. to key a cache."""
    import torch

    total = hashlib.sha256()
    for part in parts:
        one = hashlib.sha256()    # a hash for each part, so that (1, 23) and (12, 3) differ
        if isinstance(part, torch.Tensor):
            one.update(f"{part.dtype} {tuple(part.shape)}".encode())
            one.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        else:
            one.update(repr(asdict(part) if is_dataclass(part) else part).encode())
        total.update(one.digest())
    return total.hexdigest()[:16]
