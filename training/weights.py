"""Takes weights from other runs and model files."""

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


def trained_vqgan(flag: str, path: str, config: VQGANConfig) -> dict[str, Tensor]:
    """The weights of `load_vqgan` for a flag. The architecture must be that of `config`."""
    vqgan = load_vqgan(path)
    if vqgan.config != config:
        raise UserError(f"{flag} {path} has another VQGAN, {asdict(vqgan.config)}; here it is {asdict(config)}")
    return vqgan.state_dict()


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
    if model.vqgan.config.guess:
        other = with_guess(other)
    if name := tokenizer_difference(other.vqgan.state_dict(), model.vqgan.state_dict()):
        raise UserError(f"{flag} {path} was trained on other tokens than those of the VQGAN here: {name} differs")
    return other


def trained_transformer(flag: str, path: str, model: MaskGIT) -> dict[str, Tensor]:
    """The transformer's weights in the model file of a flag. Architecture and tokens must be those of `model`.

    Its dropout and temperature may differ: that is how it is trained and used, not what it is.
    """
    trained, here = other_model(flag, path, model).transformer, model.transformer.config
    free = {name: getattr(here, name) for name in ("dropout", "attention_dropout", "temperature")}
    if replace(trained.config, **free) != here:
        raise UserError(f"{flag} {path} has another transformer, {asdict(trained.config)}; here it is {asdict(here)}")
    return trained.state_dict()


def trained_decoder(flag: str, path: str, model: MaskGIT) -> dict[str, Tensor]:
    """Like `trained_transformer`, of the decoder."""
    trained, here = other_model(flag, path, model).vqgan, model.vqgan.config
    if trained.config != here:
        raise UserError(f"{flag} {path} has another VQGAN, {asdict(trained.config)}; here it is {asdict(here)}")
    return trained.decoder.state_dict()


# ---- inputs for a guess of the hole's content ----


def with_guess(model: MaskGIT) -> MaskGIT:
    """A copy that also takes a guess. The weights of these inputs are zero: it completes as before, bit for bit."""
    vqgan, config = vqgan_with_guess(model.vqgan), model.transformer.config
    state = model.transformer.state_dict()
    if config.pixel_dim and not model.vqgan.config.guess:
        config = replace(config, pixel_dim=2 * config.pixel_dim)
        state["pixel_embed.weight"] = _widened(state["pixel_embed.weight"])
    wider = MaskGIT(vqgan.config, config)
    wider.vqgan.load_state_dict(vqgan.state_dict())
    wider.transformer.load_state_dict(state)
    return wider.train(model.training)


def vqgan_with_guess(vqgan: VQGAN) -> VQGAN:
    """Like `with_guess`."""
    wider, state = VQGAN(replace(vqgan.config, guess=True)), vqgan.state_dict()
    for name, weight in state.items():
        if name.startswith("decoder.condition.") and name.endswith(".weight") and not vqgan.config.guess:
            state[name] = _widened(weight)
    wider.load_state_dict(state)
    return wider.eval().requires_grad_(False)


def _widened(weight: Tensor) -> Tensor:
    """Zeros for as many inputs again: those of the guess come after the known ones, (D, C, ...) -> (D, 2 C, ...)."""
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)


def guess_inputs(module: nn.Module) -> list[Tensor]:
    """The weights through which a transformer or a decoder made by the above takes a guess, as views."""
    embed, layers = getattr(module, "pixel_embed", None), getattr(module, "condition", ())
    weights = [layer.weight.detach() for layer in ([embed] if embed is not None else layers)]
    return [weight[:, weight.shape[1] // 2 :] for weight in weights]
