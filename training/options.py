"""The command line of the training commands and the sections of their config file. Imports nothing slow, for --help."""

from typing import Any

from utils import Parser, UserError, load_config

SECTIONS = ("vqgan", "train_vqgan", "transformer", "train_transformer", "train_finish")    # of a config file


def training_parser(description: str) -> Parser:
    """A parser with the flags that all three commands have."""
    parser = Parser(description=description)
    flag = parser.add_argument
    flag("--config", default="configs/cat64.yml", help="YAML file (default: %(default)s)")
    flag("--train-dir", required=True, nargs="+",
         help="folder(s) of training pictures, or WebDataset shards: 'cats-{0000..0099}.tar'")    # fmt: skip
    flag("--val-dir", required=True, help="folder of validation pictures")
    flag("--train-masks", metavar="DIR", help="take the holes from these masks, black = hole (default: random)")
    flag("--val-masks", metavar="DIR", help="the same for validation")
    flag("--output-dir", required=True, help="for checkpoints, metrics.jsonl, TensorBoard and picture grids")
    flag("--epochs", type=int)
    flag("--batch-size", type=int, help="pictures per optimizer step, over all processes")
    flag("--learning-rate", type=float)
    flag("--accum-grad", type=int, help="micro-batches per optimizer step")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--seed", type=int)
    flag("--resume", metavar="FILE|auto", help="continue from a checkpoint; auto: the newest good one in --output-dir")
    flag("--allow-changes", action="store_true", help="with --resume: even with other pictures or perceptual weights")
    flag("--bad-images", choices=("error", "skip"), default="error", help="what to do with unreadable pictures")
    flag("--on-nan", choices=("stop", "skip"), default="stop", help="what to do with a step whose loss is not finite")
    flag("--set", action="extend", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="change config values")
    return parser


def add_pixel_flags(parser: Parser) -> None:
    """The flags of the two stages that read pixels at every step and have a perceptual loss."""
    flag = parser.add_argument
    flag("--train-pictures", type=int, help="pictures in the shards (default: counted from their headers)")
    flag("--workers", type=int, default=0, help="processes that read shards ahead (default: none)")
    flag("--perceptual-weights", help="file with the perceptual network's weights (default: downloaded)")


def keys_set(args: Any, section: str) -> list[str]:
    """The keys of a section that --set names."""
    names = (override.partition("=")[0] for override in args.set)
    return [name.removeprefix(f"{section}.") for name in names if name.startswith(f"{section}.")]


def load_sections(args: Any, stage: str) -> dict[str, dict[str, Any]]:
    """All sections of the config file with --set; in the section `stage` the flags that were given win."""
    given = load_config(args.config, args.set)
    for name in given:
        if name not in SECTIONS:
            raise UserError(f"config {args.config}: unknown section {name!r}; expected some of {', '.join(SECTIONS)}")
    flags = {name: getattr(args, name) for name in ("epochs", "batch_size", "learning_rate", "accum_grad", "seed")}
    sections = {name: given.get(name, {}) for name in SECTIONS}
    sections[stage] = sections[stage] | {name: value for name, value in flags.items() if value is not None}
    return sections
