"""Puts the parts of several trainings into one model."""

import torch

from models import MaskGIT
from models.transformer import TransformerConfig
from models.vqgan import VQGANConfig
from training.checkpoints import load_checkpoint
from training.weights import tokenizer_difference, trained_decoder, trained_transformer, vqgan_with_guess
from utils import UserError

Weights = dict[str, torch.Tensor]


def assemble(transformer: str, vqgan: str | None, other: str | None = None, other_decoder: str | None = None) -> MaskGIT:
    """The whole model of a stage-2 checkpoint.

    Args:
        transformer: the checkpoint.
        vqgan: a stage-1 checkpoint or model file whose decoder is taken.
        other, other_decoder: model files whose transformer and decoder are averaged with those.
    """
    state = load_checkpoint(transformer, "transformer-training")
    config, weights = VQGANConfig(**state["config"]["vqgan"]), dict(state["vqgan"])
    if vqgan:
        better, config.context_dim = read_vqgan(vqgan, config.guess)
        for name, value in weights.items():
            if name not in better or better[name].shape != value.shape:
                raise UserError(f"--vqgan {vqgan} has another architecture than {transformer} ({name})")
        if name := tokenizer_difference(better, weights):
            raise UserError(f"--vqgan {vqgan} makes other tokens than {transformer} was trained on ({name})")
        weights |= {name: value for name, value in better.items() if name.startswith("decoder.")}
    model = MaskGIT(config, TransformerConfig(**state["config"]["transformer"]))
    model.transformer.load_state_dict(state["ema"])
    model.vqgan.load_state_dict(weights)
    if other:
        average(model.transformer, trained_transformer("--average", other, model))
    if other_decoder:
        average(model.vqgan.decoder, trained_decoder("--average-decoder", other_decoder, model))
    return model.eval()


def read_vqgan(path: str, guess: bool) -> tuple[Weights, int]:
    """The averaged VQGAN weights of a stage-1 checkpoint or of a model file, and the `context_dim` of its decoder.

    With `guess` the decoder of a model file gets inputs for a guess, if it has none.
    """
    if path.endswith(".safetensors"):
        vqgan = MaskGIT.from_pretrained(path).vqgan
        vqgan = vqgan_with_guess(vqgan) if guess else vqgan
        return vqgan.state_dict(), vqgan.config.context_dim
    return load_checkpoint(path, "vqgan-training")["ema"], 0


def average(part: torch.nn.Module, theirs: Weights) -> None:
    """Give `part` the mean of its own weights and others."""
    part.load_state_dict({name: (value + theirs[name]) / 2 for name, value in part.state_dict().items()})
