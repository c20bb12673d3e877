"""Completes pictures with classic methods: what a learned model has to beat.

mean           every hole pixel takes the mean colour of the picture's known pixels
telea          fast marching: Telea 2004, OpenCV's cv2.INPAINT_TELEA
navier-stokes  fluid dynamics: Bertalmio et al. 2001, OpenCV's cv2.INPAINT_NS
patchmatch     patches from the rest of the picture, coarse to fine: Barnes et al. 2009, the package patchmatch-cython
"""
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from utils import UserError

# method -> the module it needs, and the package that has it
NEEDS = {
    "mean": None,
    "telea": ("cv2", "opencv-python-headless"),
    "navier-stokes": ("cv2", "opencv-python-headless"),
    "patchmatch": ("patchmatch_cython", "patchmatch-cython"),
}
RADIUS = 3    # pixels around each hole pixel that OpenCV looks at; its documentation's usual value


def available(method: str) -> bool:
    """Whether the package that a method needs is installed."""
    return NEEDS[method] is None or importlib.util.find_spec(NEEDS[method][0]) is not None


def complete(image: Tensor, mask: Tensor, method: str) -> Tensor:
    """Fill the hole of a picture. What the hole's pixels hold is never looked at.

    Args:
        image: uint8 (3, H, W) RGB.
        mask: bool (1, H, W), True = hole.
        method: a name in `NEEDS`.
    Returns:
        uint8 (3, H, W); equal to image outside the hole.
    Raises:
        UserError: the method's package is missing.
    """
    image = image.masked_fill(mask, 0)
    if method == "mean" or bool(mask.all()):
        return torch.where(mask, mean_colour(image, mask), image)
    module = import_module(method)
    pixels = image.permute(1, 2, 0).contiguous().numpy()            # (H, W, 3); no method cares about the order of RGB
    hole = mask[0].to(torch.uint8).numpy()                          # (H, W)
    if method == "patchmatch":
        try:
            filled = module.inpaint_pyramid(pixels, hole, seed=0)
        except ValueError:    # at its coarsest level the hole covers all: at one scale, then
            filled = module.inpaint_single(pixels, hole, seed=0)
    else:
        filled = module.inpaint(pixels, hole, RADIUS, module.INPAINT_TELEA if method == "telea" else module.INPAINT_NS)
    return torch.where(mask, torch.from_numpy(filled).permute(2, 0, 1), image)


def mean_colour(image: Tensor, mask: Tensor) -> Tensor:
    """Mean of the known pixels, uint8 (3, 1, 1); mid-gray when none is known."""
    known = image[:, ~mask[0]].double()                             # (3, known pixels)
    mean = known.mean(dim=1) if known.numel() else torch.full((3,), 128.0)
    return mean.round().to(torch.uint8)[:, None, None]


def import_module(method: str) -> ModuleType:
    module, package = NEEDS[method]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{method} needs {package}: pip install {package}") from error
