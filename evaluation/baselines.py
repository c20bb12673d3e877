"""Complete pictures with classic methods: what a learned model has to beat.

python baselines.py --images masked_images --masks masks --output out --method navier-stokes

mean           every hole pixel takes the mean colour of the picture's known pixels
telea          fast marching: Telea 2004, OpenCV's cv2.INPAINT_TELEA
navier-stokes  fluid dynamics: Bertalmio et al. 2001, OpenCV's cv2.INPAINT_NS

The hole's pixels are never looked at, and known pixels are kept exactly.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pictures.files import pair
from pictures.images import read_image, read_mask, write_image
from utils import Parser, UserError, run_cli, writable_folder

METHODS = ("telea", "navier-stokes", "mean")
RADIUS = 3    # pixels around each hole pixel that OpenCV looks at; its documentation's usual value


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="pictures to complete")
    parser.add_argument("--masks", type=Path, required=True, metavar="DIR", help="hole masks of the same names, or one")
    parser.add_argument("--mask-hole", choices=("black", "white"), default="black", help="its colour in the masks")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where <name>.png are written")
    parser.add_argument("--method", choices=METHODS, required=True)
    args = parser.parse_args(argv)
    pairs = pair(args.images, args.masks)
    if args.method != "mean":
        import_opencv()    # told before any file is written
    writable_folder(args.output)
    for stem, image_path, mask_path in tqdm(pairs, desc=args.method, unit="picture", disable=None):
        image, mask = read_image(image_path), read_mask(mask_path, args.mask_hole)
        if image.shape[1:] != mask.shape[1:]:
            sizes = [f"{x.shape[2]}x{x.shape[1]}" for x in (image, mask)]
            raise UserError(f"{image_path} is {sizes[0]}, its mask {mask_path} is {sizes[1]}: they must have one size")
        write_image(args.output / f"{stem}.png", complete(image, mask, args.method))
    print(f"{len(pairs)} pictures completed with {args.method} in {args.output}")
    return 0


def complete(image: Tensor, mask: Tensor, method: str) -> Tensor:
    """Fill the hole of a picture.

    Args:
        image: uint8 (3, H, W) RGB.
        mask: bool (1, H, W), True = hole.
        method: one of METHODS.
    Returns:
        uint8 (3, H, W); equal to image outside the hole.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    image = image.masked_fill(mask, 0)    # no method may see what the hole hides
    filled = mean_colour(image, mask) if method == "mean" else opencv_inpaint(image, mask, method)
    return torch.where(mask, filled, image)


def mean_colour(image: Tensor, mask: Tensor) -> Tensor:
    """Mean of the known pixels, uint8 (3, 1, 1); mid-gray when none is known."""
    known = image[:, ~mask[0]].double()                             # (3, known pixels)
    mean = known.mean(dim=1) if known.numel() else torch.full((3,), 128.0)
    return mean.round().to(torch.uint8)[:, None, None]


def opencv_inpaint(image: Tensor, mask: Tensor, method: str) -> Tensor:
    """cv2.inpaint, uint8 (3, H, W); it treats the three channels alike, so RGB order does not matter."""
    cv2 = import_opencv()
    flag = cv2.INPAINT_TELEA if method == "telea" else cv2.INPAINT_NS
    pixels = image.permute(1, 2, 0).contiguous().numpy()            # (H, W, 3)
    filled = cv2.inpaint(pixels, mask[0].to(torch.uint8).numpy(), RADIUS, flag)
    return torch.from_numpy(filled).permute(2, 0, 1)


def import_opencv():
    try:
        import cv2
    except ImportError as error:
        raise UserError("telea and navier-stokes need OpenCV: pip install opencv-python-headless") from error
    return cv2


if __name__ == "__main__":
    run_cli(main)
