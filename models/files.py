"""Model files: safetensors with the configs in the metadata, alone or in a folder of the Hugging Face hub's layout.

    model = MaskGIT.from_pretrained("photo")                       # weights that come with this project
    model = MaskGIT.from_pretrained("runs/cat/model.safetensors", device="cuda")
    model.save_pretrained("cat")                                   # config.json, model.safetensors and a model card

Weights are held in half precision, the large ones in 8 bits if asked for. No code in a file is ever run.
"""

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import quantize
from .precision import pick_precision

FORMAT = "maskgit-inpainting"    # written into the metadata of weight files, so that foreign ones are recognised
BUNDLED = ("cat64", "photo")    # weights that come with this project; the first is the default
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")    # owner/name
# What a file may hold in 8 bits: large matrices and kernels, most of its bytes. Never encoder and codebook, which would make
# other tokens, nor the embedding, which decides between codes that are nearly tied.
EIGHT_BIT = ("transformer.blocks.", "transformer.head.", "vqgan.decoder.")
EIGHT_BIT_FROM = 4096    # values; smaller ones are not worth the loss

CARD = """---
library_name: maskgit-inpainting
pipeline_tag: image-to-image
tags: [inpainting, maskgit, vqgan]
license: other
license_name: research-use-only
---
"""
ABOUT = """# MaskGIT inpainting

{parameters:.1f} M parameters, pictures of {size}x{size} pixels, {tokens} tokens of a codebook of {codes}.

```python
from maskgit_inpainting import MaskGIT

model = MaskGIT.from_pretrained("this folder")
completed = model.inpaint(image, mask)    # the hole is white or True
```

## Licence

The weights that come with the project, and all that are trained from them, are for **research use only**: their pictures
came without a licence to redistribute, and some are not for commercial use (CC BY-NC 4.0). The code has the MIT licence.
"""


class ModelFileError(ValueError):
    """A model file can't be read or written; the message is a sentence that says what to do."""

    user_error = True    # commands print the sentence without a traceback


class ModelFiles:
    """Loading and saving, for the model class."""

    card: str | None = None         # of the folder that the weights were read from
    precision: str | None = None    # of completions, where the call does not name one

    def configs(self) -> dict[str, dict]:
        return {"vqgan": asdict(self.vqgan.config), "transformer": asdict(self.transformer.config)}

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, *, device: str | torch.device | None = None, precision: str | None = None
    ) -> Any:
        """Load a model, in evaluation mode.

        Args:
            source: "cat64" (default: cat faces of 64x64) or "photo" (photographs), the weights that come with this project;
                a .safetensors file of `save_file`, a folder of `save_pretrained`, or owner/name on the Hugging Face hub.
            device: where to put the model, e.g. 'cuda'; default: the CPU.
            precision: what completions are computed in where the call does not say it: 'fp32', 'bf16' (faster where the
                hardware multiplies in it) or 'auto', see `models.precision`; default: float32.
        Raises:
            ModelFileError: there is no such file or folder, it is truncated or of another kind, or its weights don't fit its
                config.
            ValueError: unknown precision, or a device that is not there.
        """
        try:
            device = torch.zeros(0, device=device or "cpu").device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} can't be used here: {shorten(error)}") from error
        precision = pick_precision(precision, device) if precision else None
        path, card = find(source)
        configs, weights = read_folder(path) if path.is_dir() else read_weights(path)
        try:
            model = cls(**configs)
            model.load_state_dict(weights)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelFileError(f"checkpoint {path} does not fit its own config: {shorten(error)}") from error
        model.card, model.precision = card, precision
        return model.eval().to(device)

    def save_file(self, path: str | Path, dtype: torch.dtype = torch.float16, eight_bit: bool = False, **notes: str) -> None:
        """Write one .safetensors file with the configs and `notes` in its metadata.

        Args:
            dtype: of the weights.
            eight_bit: round most weights to 8 bits (see `EIGHT_BIT`); the tokens stay the same.
        """
        state = {}
        for name, value in self.state_dict().items():
            if eight_bit and fits_eight_bit(name, value):
                state[name], state[name + quantize.SUFFIX] = quantize.quantize(value)
            else:
                state[name] = value.to(dtype).contiguous()
        write_weights(path, state, self.configs(), **notes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder of the hub's layout: config.json, model.safetensors and README.md, the model card.

        Nothing is lost: each weight is held in 8 bits or half precision where that is exact, else as it is.
        """
        folder, state = Path(folder), {}
        for name, value in self.state_dict().items():
            state |= smallest(name, value)
        about = ABOUT.format(
            parameters=sum(x.numel() for x in self.parameters()) / 1e6, size=self.vqgan.config.image_size,
            tokens=self.transformer.config.seq_len, codes=self.vqgan.config.codebook_size,
        )    # fmt: skip
        with saving(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / "model.safetensors", state, self.configs())
        card = self.card or about
        for name, text in (
            ("config.json", json.dumps(self.configs(), indent=2) + "\n"),
            ("README.md", card if card.startswith("---") else CARD + card),
        ):
            with renamed(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")


# ---- reading ----


def bundled(name: str) -> Path:
    """The file of weights that come with this project, which need not be there."""
    # The installed package holds the weights itself; in the repository they lie beside it.
    inside, beside = (folder / "checkpoints" / f"{name}.safetensors" for folder in Path(__file__).resolve().parents[:2])
    return inside if inside.is_file() else beside


def find(source: str | Path | None) -> tuple[Path, str | None]:
    """The file or folder of `from_pretrained`'s source, and the model card that lies beside it."""
    name = BUNDLED[0] if source is None else source
    saved = source is not None and (Path(source) / "config.json").is_file()    # a model of one's own may have such a name
    if name in BUNDLED and not saved:
        path = bundled(name)
        card = path.with_name("README.md")
    else:
        path = Path(name)
        if not path.exists() and is_hub_name(name):
            path = download(name)
        card = path / "README.md"
    if not path.exists():
        raise ModelFileError(
            f"checkpoint {path} not found; give {', '.join(BUNDLED)}, a .safetensors file, a folder or owner/name on the hub"
        )
    return path, card.read_text(encoding="utf-8") if card.is_file() else None


def is_hub_name(source: str | Path) -> bool:
    """Whether it can only mean owner/name on the hub: not a Path, no file suffix, no folder of the owner's name here."""
    if not isinstance(source, str) or not HUB_NAME.fullmatch(source) or source.endswith((".safetensors", ".pt", ".pth")):
        return False
    return not Path(source).parent.exists()


def download(name: str) -> Path:
    """The folder of a model on the hub, from the cache if it is there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors", "README.md"]))
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{name} is no file or folder here, and the Hugging Face hub lacks it or is out of reach ({shorten(error)})"
        ) from error


def read_folder(folder: Path) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """Like `read_weights`, of a folder in the hub's layout."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelFileError(f"{folder} has no config.json; give a folder of save_pretrained or a .safetensors file")
    try:
        configs = json.loads(config.read_text(encoding="utf-8"))
        configs = {name: dict(configs[name]) for name in ("vqgan", "transformer")}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelFileError(f"{config} does not hold the configs of vqgan and transformer: {shorten(error)}") from error
    return configs, read_weights(folder / "model.safetensors")[1]


def read_weights(path: str | Path) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """The configs and the weights, in float32, of a file of `write_weights`.

    Raises:
        ModelFileError: the file is missing, truncated or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"checkpoint {path} not found; give a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}    # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"checkpoint {path} is truncated or not a safetensors file ({error})") from error
    if metadata.get("library") != FORMAT or "config" not in metadata:
        raise ModelFileError(f"checkpoint {path} holds no {FORMAT} model (no config in its metadata)")
    try:
        return json.loads(metadata["config"]), quantize.dequantize_all(stored)
    except ValueError as error:
        raise ModelFileError(f"checkpoint {path} does not fit its own config: {shorten(error)}") from error


# ---- writing ----


def fits_eight_bit(name: str, value: Tensor) -> bool:
    """Whether a weight may be rounded to 8 bits."""
    return name.startswith(EIGHT_BIT) and value.dim() >= 2 and value.numel() >= EIGHT_BIT_FROM


def smallest(name: str, value: Tensor) -> dict[str, Tensor]:
    """A file's tensors for a weight in the smallest type that holds it exactly."""
    if fits_eight_bit(name, value):
        values, scale = quantize.quantize(value)
        if torch.equal(quantize.dequantize(values, scale), value.float()):
            return {name: values, name + quantize.SUFFIX: scale}
    exact = torch.equal(value.half().to(value.dtype), value)
    return {name: (value.half() if exact else value).contiguous()}


def write_weights(path: str | Path, state: dict[str, Tensor], configs: dict[str, dict], **notes: str) -> None:
    """Write one safetensors file with the configs and `notes` in its metadata, whole or not at all."""
    metadata = {"format": "pt", "library": FORMAT, "config": json.dumps(configs), **notes}
    with renamed(Path(path)) as temporary:
        save_file(state, temporary, metadata)
        temporary.chmod(0o644)    # safetensors creates its files for their owner alone


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; flushed and renamed when the block ends, removed when it fails."""
    # A name of its own for each thread, and a short one: the file's own may be as long as the system allows.
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
    with saving(path):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Errors of the file system, also those that safetensors hands on, become a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"can't write {path}: {getattr(error, 'strerror', None) or error}") from error


def shorten(error: Exception) -> str:
    """The start of an error's message, in one line."""
    return " ".join(str(error).split())[:200]
