"""Where the holes of training and validation pictures come from: drawn at random, or from folders of masks."""

from types import ModuleType
from typing import Any, NamedTuple

from pictures import holes
from pictures.own_masks import OwnMasks, load_masks

Masks = OwnMasks | ModuleType    # anything with `random_holes` and `window_holes` of pictures/holes.py


class MaskSource(NamedTuple):
    train: Masks
    val: Masks


def open_masks(args: Any) -> MaskSource:
    """The masks of --train-masks and --val-masks; without these flags holes are drawn at random."""
    return MaskSource(*(load_masks(path) if path else holes for path in (args.train_masks, args.val_masks)))
