"""What the configs of the three stages have in common, and what their fields may hold."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from models.config import STRICT, Count
from models.local_autoencoder import condition_channels
from models.vqgan import VQGANConfig
from utils import UserError, notice

Steps = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]    # of a loss term

LIMITS = {"image_size": 4096, "depth": 1000, "encoder_depth": 1000, "decoder_blocks": 1000, "discriminator_strided": 8}
MOST_PARAMETERS = 1e11


@dataclass(config=STRICT)
class TrainConfig:
    """Keys of every stage. The stages have defaults of their own for some of them."""

    epochs: Count = 100
    batch_size: Count = 32              # pictures per optimizer step, over all processes and micro-batches
    accum_grad: Count = 1               # micro-batches per optimizer step
    learning_rate: Positive = 1e-4      # peak, after warm-up; falls along half a cosine
    warmup_steps: Steps = 200           # optimizer steps
    grad_clip: Positive = 1.0           # largest gradient norm
    ema_decay: Fraction = 0.999         # of the averaged weights
    precision: Literal["auto", "bf16", "fp32"] = "auto"    # auto: bf16 where the hardware multiplies in it
    seed: Seed = 0
    log_every: Count = 50               # steps
    save_every: Count = 500             # steps between two last.pt
    validate_every: Count = 1           # epochs between two validations, each of which may write a checkpoint
    val_pictures: Count = 256
    windows: Steps = 0                  # of photographs (see training/windows.py) that make up an epoch; 0: whole pictures


@dataclass(config=STRICT)
class GuessConfig(TrainConfig):
    """Keys of the stages that can learn to take a guess of the hole's content: stage 2 and the finish."""

    guess_share: Fraction = 0.5         # share of the windows with a guess of the hole's content
    guess_gain: Positive = 1.0          # the weights of the guess's inputs move so many times as far; they may begin at zero


def fit_decoder(values: dict[str, Any], fixed: list[str]) -> dict[str, Any]:
    """The section vqgan with a decoder for its stride: one width and one number of blocks for each scale.

    Scales that are missing get what the coarsest one has; those that are too many are left out. Keys in `fixed` stay.
    """
    stride, fitted = values.get("stride", 4), {}
    if values.get("decoder") == "reference" or not isinstance(stride, int) or stride < 1:
        return values
    for name in ("decoder_channels", "decoder_blocks"):
        given, scales = values.get(name, getattr(VQGANConfig(), name)), stride.bit_length()
        if name not in fixed and isinstance(given, list) and given and len(given) != scales:
            fitted[name] = [given[0]] * (scales - len(given)) + given[-scales:]
    return values | tell("vqgan", fitted, f"stride {stride}")


def fit_transformer(values: dict[str, Any], vqgan: VQGANConfig, fixed: list[str]) -> dict[str, Any]:
    """The section transformer with what follows from the VQGAN. A key in `fixed` that differs is refused."""
    needed = {"codebook_size": vqgan.codebook_size, "seq_len": vqgan.grid**2}
    if values.get("pixel_dim", 0) != 0:    # 0: it sees tokens only
        needed["pixel_dim"] = condition_channels(vqgan.guess) * vqgan.stride**2
    wrong = {name: value for name, value in needed.items() if values.get(name, value) != value}
    why = f"pictures of {vqgan.image_size} pixels, stride {vqgan.stride} and {vqgan.codebook_size} codes"
    for name in wrong.keys() & set(fixed):
        raise UserError(f"config transformer.{name} must be {wrong[name]} for {why}, got {values[name]}; leave it out")
    return values | needed | tell("transformer", wrong, why)


def tell(section: str, values: dict[str, Any], why: str) -> dict[str, Any]:
    """Say what was derived."""
    if values:
        notice(f"{' '.join(f'{section}.{name}={value}' for name, value in values.items())} follows from {why}")
    return values


def check_size(section: str, config: Any, build: Callable[[], nn.Module]) -> None:
    """Refuse a model that no machine can hold, before any memory is asked for it. `build` makes it from `config`."""
    for name, limit in LIMITS.items():
        value = getattr(config, name, 0)
        if max(value, default=0) > limit if isinstance(value, list) else value > limit:
            raise UserError(f"config {section}.{name} must be at most {limit}, got {value}")
    try:
        with torch.device("meta"):    # shapes only
            count = sum(parameter.numel() for parameter in build().parameters())
    except ValueError as error:    # two configs that don't fit each other
        raise UserError(f"config {error}") from error
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"config {section} describes a model that can't be built: {reason}") from error
    if count > MOST_PARAMETERS:
        raise UserError(f"config {section} describes {count:.1e} parameters, more than {MOST_PARAMETERS:.0e}")
