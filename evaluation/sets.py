"""Sets of pictures to complete, with their holes and originals, held in memory."""
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from evaluation.judge import Judge, check_pair
from pictures.files import find_images, match_names, pair
from pictures.images import read_image
from pictures.masks import read_pair
from utils import UserError, progress


class Picture(NamedTuple):
    name: str           # of its file, without suffix
    image: Tensor       # (3, H, W) uint8, the input; what it holds inside the hole has no influence
    hole: Tensor        # (1, H, W) bool
    original: Tensor    # (3, H, W) uint8


def load_pictures(
    images: Path, masks: Path, mask_hole: str, originals: Path | None = None, limit: int | None = None
) -> list[Picture]:
    """Read pictures and masks, paired by name.

    Args:
        originals: folder of the originals; None: the images are clean and are the originals themselves.
        limit: the first so many alone.
    Raises:
        UserError: a file can't be read, names or sizes don't fit together, or no picture has a hole.
    """
    pairs = pair(images, masks)
    files = {}
    if originals is not None:
        files = find_images(originals)
        partner = match_names({name: image for name, image, _ in pairs}, files, ("picture", "original"))
    pictures = []
    for name, image_path, mask_path in progress(pairs[:limit], desc="reading", unit="picture"):
        image, hole = read_pair(image_path, mask_path, mask_hole)
        original = read_image(files[partner[name]]) if files else image
        check_pair(image_path, image, original)
        pictures.append(Picture(name, image, hole, original))
    if not any(bool(picture.hole.any()) for picture in pictures):
        raise UserError(f"no mask in {masks} has a hole: there is nothing to complete (see --mask-hole)")
    if originals is None and all(map(is_blank, pictures)):
        raise UserError(f"all pictures in {images} are blank in their holes: the originals are needed")
    return pictures


def is_blank(picture: Picture) -> bool:
    """Whether a picture has one colour in its hole: then it is no original."""
    inside = picture.image[:, picture.hole[0]]    # (3, hole pixels)
    return bool((inside == inside[:, :1]).all())


def choose(pictures: list[Picture], names: list[str] | None, count: int) -> list[Picture]:
    """The pictures with the given names, or `count` that are spread evenly."""
    if names is None:
        last = len(pictures) - 1
        return [pictures[i] for i in sorted({round(i * last / max(1, count - 1)) for i in range(count)})]
    by_name = {picture.name: picture for picture in pictures}
    if unknown := [name for name in names if name not in by_name]:
        raise UserError(f"--show {unknown[0]}: not among the pictures, which begin with {', '.join(list(by_name)[:3])}")
    return [by_name[name] for name in names]


def measure_originals(judge: Judge, pictures: list[Picture]) -> dict[str, Tensor]:
    """What the judge measures on the originals and around their holes; nothing without a feature network."""
    if judge.network is None:
        return {}
    measured = judge.measurements()
    for picture in progress(pictures, desc="measuring the originals", unit="picture"):
        measured.add(picture.original, picture.hole)
    return measured.columns()
