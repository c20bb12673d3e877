"""Takes weights from other runs and model files, and writes the finished model."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.maskgit import MaskGIT
from utils import UserError, atomic_write


def tokenizer_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The first weight in which two VQGANs' encoders or codebooks differ, so that they make other tokens; None: in none.

    Compared in half precision, which model files hold.
    """
    names = [name for name in other if not name.startswith("decoder.")]
    return next((n for n in names if n not in one or not torch.equal(one[n].cpu().half(), other[n].cpu().half())), None)


def other_model(flag: str, path: str, model: MaskGIT) -> MaskGIT:
    """The model file of a flag, which must have the tokens of `model`."""
    try:
        other = MaskGIT.from_pretrained(path)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error
    if name := tokenizer_difference(other.vqgan.state_dict(), model.vqgan.state_dict()):
        raise UserError(f"{flag} {path} was trained on other tokens than those of the VQGAN here: {name} differs")
    return other


def trained_transformer(flag: str, path: str, model: MaskGIT) -> dict[str, Tensor]:
    """The transformer's weights in the model file of a flag, which must be of the architecture and the tokens of `model`.

    Its dropout may be another: that is how it was trained, not what it is.
    """
    trained, here = other_model(flag, path, model).transformer, model.transformer.config
    if replace(trained.config, dropout=here.dropout, attention_dropout=here.attention_dropout) != here:
        raise UserError(f"{flag} {path} has another transformer, {asdict(trained.config)}; here it is {asdict(here)}")
    return trained.state_dict()


def trained_decoder(flag: str, path: str, model: MaskGIT) -> dict[str, Tensor]:
    """Like `trained_transformer`, of the decoder."""
    trained, here = other_model(flag, path, model).vqgan, model.vqgan.config
    if trained.config != here:
        raise UserError(f"{flag} {path} has another VQGAN, {asdict(trained.config)}; here it is {asdict(here)}")
    return trained.decoder.state_dict()


def export_model(model: Any, path: Path, **notes: str) -> None:
    """A MaskGIT, both stages in one file."""
    with atomic_write(path) as temporary:
        try:
            model.save_file(temporary, **notes)
        except SafetensorError as error:    # what safetensors makes of a full disk
            raise OSError(None, str(error)) from error
