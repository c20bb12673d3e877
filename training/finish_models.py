"""What the finish begins from: the model of stage 2, its perceptual networks, and discriminators of earlier runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.maskgit import MaskGIT
from models.perceptual import PerceptualFeatures
from models.vqgan import VQGAN, VQGANConfig
from training.checkpoints import load_checkpoint
from training.losses import load_features
from training.weights import load_vqgan, tokenizer_difference, vqgan_with_guess, with_guess
from utils import UserError

if TYPE_CHECKING:
    from training.finish import FinishConfig


def load_model(path: str, vqgan: str | None, c: FinishConfig) -> tuple[MaskGIT, dict | None]:
    """The model of stage 2, with the additions that `c` asks for.

    Its decoder is that of the stage-1 checkpoint `vqgan`, which must have the same tokens, or without one the model's own.
    Returns it and the weights of stage 1's discriminator.
    """
    model, discriminator = MaskGIT.from_pretrained(Path(path)), None
    model = with_guess(model) if c.windows and model.vqgan.conditioned else model
    if not model.vqgan.conditioned:
        raise UserError("the finish needs the conditioned decoder; this model has the reference decoder")
    if vqgan is not None:
        state = load_checkpoint(vqgan, "vqgan-training")
        if name := tokenizer_difference(state["ema"], model.vqgan.state_dict()):
            raise UserError(f"{vqgan} has other tokens than {path}: {name} differs; give its own VQGAN")
        first, discriminator = load_vqgan(vqgan), state["discriminator"]
        model.vqgan = vqgan_with_guess(first) if model.vqgan.config.guess else first
    config = model.vqgan.config
    if config.context_dim and not c.context:
        raise UserError(
            f"train_finish.context is false, and the decoder of {path} takes the transformer's features; give --vqgan, to "
            "begin with the decoder of stage 1"
        )
    has = config.decoder_blocks
    blocks = has if c.decoder_blocks is None else c.decoder_blocks
    if len(blocks) != len(has) or any(asked < there for asked, there in zip(blocks, has, strict=True)):
        raise UserError(f"train_finish.decoder_blocks must be {has} or more at each scale, got {blocks}")
    dim = model.transformer.config.embed_dim if c.context else 0
    model.vqgan = deepened(model.vqgan, replace(config, context_dim=dim, decoder_blocks=blocks), c.seed)
    return model.requires_grad_(False).eval(), discriminator


def deepened(vqgan: VQGAN, config: VQGANConfig, seed: int) -> VQGAN:
    """A VQGAN that computes the same, with a larger decoder: new blocks begin as the identity, a new input has no effect."""
    torch.manual_seed(seed)    # a block begins at random inside; only its last layer is zero
    larger = VQGAN(config)
    larger.load_state_dict(larger.state_dict() | vqgan.state_dict())
    return larger


def load_networks(c: FinishConfig, args: argparse.Namespace) -> tuple[PerceptualFeatures, PerceptualFeatures | None]:
    first = load_features(c.perceptual_network, args.perceptual_weights, c.perceptual_scales, "--perceptual-weights")
    if c.second_network is None:
        if args.second_weights is not None:
            raise UserError("--second-weights is for train_finish.second_network, which is not set; set it too")
        return first, None
    try:
        return first, load_features(c.second_network, args.second_weights, c.second_scales, "--second-weights")
    except UserError as error:
        raise UserError(f"{error}, or do without: --set train_finish.second_network=null") from error


def load_discriminators(path: str, kind: str) -> dict[str, dict]:
    """The weights of both discriminators in a checkpoint of the finish. The other processes need not get the rest."""
    state = load_checkpoint(path, kind)
    return {name: state[name] for name in ("discriminator", "feature_discriminator")}


def continue_discriminators(path: str, state: dict, discriminators: dict[str, nn.Module]) -> None:
    """Give the discriminators the weights in the checkpoint `path`. That of stage 1 has no feature discriminator."""
    try:
        for name in discriminators.keys() & state.keys():
            discriminators[name].load_state_dict(state[name])
    except RuntimeError as error:
        settings = "train_finish's discriminator_channels, discriminator_strided, perceptual_network and perceptual_scales"
        raise UserError(f"the discriminators of {path} have another size than {settings} make") from error
