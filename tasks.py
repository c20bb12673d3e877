"""What the scripts that turn pictures and masks into pictures share: their flags, the usable pairs, the model."""
import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from models import MaskGIT
from pictures.files import pair
from pictures.masks import read_pair
from utils import UserError

HERE = Path(__file__).resolve().parent

Pair = tuple[str, Path, Path]    # name without suffix, file of the picture, file of its mask


def add_flags(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--checkpoint", default=str(HERE / "checkpoints/cat64.safetensors"), help="model (default: the bundled one)")
    flag("--images", default=str(HERE / "samples/images"), help="picture or folder (default: the bundled samples)")
    flag("--masks", default=str(HERE / "samples/masks"), help="mask or folder; black = hole")
    flag("--mask-hole", choices=("black", "white"), default="black", help="colour of the hole in mask files")
    flag("--output", default="out", help="folder for the results (default: %(default)s)")
    flag("--paste", action=argparse.BooleanOptionalAction, default=True, help="put the known pixels back, bit for bit")
    flag("--batch-size", type=int, default=16, help="pictures computed together (default: %(default)s)")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--skip-bad", action="store_true", help="leave out unreadable pictures instead of stopping")


def check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")


def usable_pairs(args: argparse.Namespace) -> list[Pair]:
    """Read everything once, so that a bad file stops the run before the first result is written."""
    pairs, good = pair(args.images, args.masks), []
    for stem, image_path, mask_path in tqdm(pairs, desc="checking", unit="picture", leave=False, disable=None):
        try:
            read_pair(image_path, mask_path, args.mask_hole)
        except UserError as error:
            if not args.skip_bad:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            continue
        good.append((stem, image_path, mask_path))
    if not good:
        raise UserError(f"none of the {len(pairs)} pictures in {args.images} could be used")
    return good


def load_model(path: str | Path, device: torch.device) -> MaskGIT:
    try:
        return MaskGIT.from_pretrained(path).to(device)
    except ValueError as error:
        raise UserError(str(error)) from error
