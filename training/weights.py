"""Takes weights from other runs and model files, and writes the finished model."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.maskgit import MaskGIT
from models.vqgan import VQGAN, VQGANConfig
from training.checkpoints import load_checkpoint
from utils import UserError, fingerprint


def load_vqgan(path: str) -> VQGAN:
    """The averaged VQGAN of a stage-1 training checkpoint, or the VQGAN inside a finished model."""
    if path.endswith(".safetensors"):
        return MaskGIT.from_pretrained(Path(path)).vqgan.without_context()
    state = load_checkpoint(path, "vqgan-training")
    try:
        vqgan = VQGAN(VQGANConfig(**state["config"]["vqgan"]))
        vqgan.load_state_dict(state["ema"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"checkpoint {path} does not fit its own config ({reason})") from error
    return vqgan.eval().requires_grad_(False)


def fingerprint_module(*modules: nn.Module | None) -> str:
    """A short hash of weights; 'none' without a module."""
    weights = [x for module in modules if module is not None for x in module.state_dict().values()]
    return fingerprint(*weights) if weights else "none"


def tokenizer_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The first weight in which two VQGANs' encoders or codebooks differ, so that they make other tokens; None if none does.

    They are compared in half precision, which model files hold.
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
    """The transformer's weights in the model file of a flag. Architecture and tokens must be those of `model`.

    Its dropout may differ: that is how it was trained, not what it is.
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
