"""Flags and config sections of the training commands."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from utils import Parser, UserError, load_config

LIMITS = {"image_size": 4096, "depth": 1000, "encoder_depth": 1000, "decoder_blocks": 1000, "discriminator_strided": 8}


MOST_PARAMETERS = 1e11


SECTIONS = ("vqgan", "train_vqgan", "transformer", "train_transformer", "train_finish")    # of a config file


def add_flags(parser: Parser) -> None:
    """The flags of both stages."""
    add_training_flags(
        parser, "configs/cat64.yml", "folder(s) of training pictures, or WebDataset shards: 'cats-{0000..0099}.tar'"
    )
    parser.add_argument(
        "--on-nan", choices=("stop", "skip"), default="stop", help="what to do with a step whose loss is not finite"
    )


def load_sections(args: Any) -> dict[str, dict]:
    """The config file with --set. Every script reads its own sections of it; a section that none reads is a mistake."""
    sections = load_config(args.config, args.set)
    for name in sections:
        if name not in SECTIONS:
            raise UserError(f"config {args.config}: unknown section {name!r}; expected some of {', '.join(SECTIONS)}")
    return sections


def check_size(section: str, config: Any, build: Callable[[], nn.Module]) -> None:
    """Refuse a model that no machine holds, before any memory is asked for it. `build` makes it from `config`."""
    for name, limit in LIMITS.items():
        value = getattr(config, name, 0)
        if max(value, default=0) > limit if isinstance(value, list) else value > limit:
            raise UserError(f"config {section}.{name} must be at most {limit}, got {value}")
    try:
        with torch.device("meta"):    # shapes alone
            count = sum(parameter.numel() for parameter in build().parameters())
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"config {section} describes no model that can be made: {reason}") from error
    if count > MOST_PARAMETERS:
        raise UserError(f"config {section} describes {count:.1e} parameters, more than {MOST_PARAMETERS:.0e}")


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
