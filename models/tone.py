"""The tone of a filled hole: in something smooth, such as a sky, the fill gets the tone of what surrounds it.

A token stands for its patch's colours only roughly, so a fill can be a shade too dark or too light. In texture nobody sees
it; in a smooth place the hole's shape shows. The difference of tone is measured along the hole's rim and spread into the
hole (compare Pérez et al. 2003, Poisson image editing; the spreading is pull-push, Gortler et al. 1996, section 3.4).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import Region, crop, split, surroundings

REACH = 3       # pixels: the tone of a place is the mean of a square around it, so far to each side
SMOOTH = 3.0    # of 255: a place whose pixels deviate that much counts half
TILE = 1024     # pixels: side of the parts that are computed at once, which bounds the memory
MARGIN = 128    # pixels around a part that it also sees


def match_tone(image: Tensor, filled: Tensor, hole: Tensor) -> Tensor:
    """The fill with the tone of its surroundings.

    Args:
        image: (3, H, W) uint8, the known pixels; what it holds inside the hole is ignored.
        filled: (3, H, W) uint8, the completed picture.
        hole: (1, H, W) bool.
    Returns:
        (3, H, W) uint8, `filled` outside the hole.
    """
    H, W = hole.shape[1:]
    out = filled.clone()
    for tile in split(H, W, TILE):
        if not bool(crop(hole, tile).any()):
            continue
        top, left = max(0, tile.top - MARGIN), max(0, tile.left - MARGIN)
        around = Region(top, min(H, tile.bottom + MARGIN), left, min(W, tile.right + MARGIN))
        offset = tone_offset(*(crop(x, around) for x in (image, filled, hole)))
        offset = crop(offset, Region(tile.top - top, tile.bottom - top, tile.left - left, tile.right - left))
        matched = (crop(filled, tile) + offset).round().clamp(0, 255).to(torch.uint8)
        crop(out, tile)[:] = torch.where(crop(hole, tile), matched, crop(filled, tile))
    return out


def tone_offset(image: Tensor, filled: Tensor, hole: Tensor) -> Tensor:
    """What is to be added to the fill: float (3, H, W), near 0 in texture. Arguments as in `match_tone`."""
    H, W = hole.shape[1:]
    near = surroundings(hole, REACH, 1)    # all that the rim's tone depends on
    parts = rim_difference(*(crop(x, near)[None].float() for x in (image, filled, hole)))
    sides = near.left, W - near.right, near.top, H - near.bottom
    difference, weight, rim = (F.pad(part, sides) for part in parts)             # (1, 3, H, W), (1, 1, H, W) twice
    return (spread(difference, weight) * spread(weight, rim))[0]


def rim_difference(image: Tensor, filled: Tensor, hole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The difference of tone along the rim (1, 3, H, W), how far it counts and where the rim is, (1, 1, H, W) each.

    Arguments as in `match_tone`, but (1, C, H, W) float.
    """
    known = 1 - hole
    rim = F.max_pool2d(known, 3, 1, 1) * hole                                    # (1, 1, H, W) pixels of the hole's edge
    outside, rough = mean_and_variance(image, known)                             # (1, 3, H, W), (1, 1, H, W)
    inside, rough_inside = mean_and_variance(filled, hole)
    weight = rim / (1 + (rough + rough_inside / 4) / SMOOTH**2)                  # (1, 1, H, W)
    return (outside - inside) * rim, weight, rim


def mean_and_variance(x: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (1, C, H, W) of the pixels of a part around each place, and their variance (1, 1, H, W), that of all channels."""
    def box(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, 2 * REACH + 1, 1, REACH)

    share = box(part).clamp_min(1e-6)
    mean = box(x * part) / share
    return mean, (box(x.square() * part) / share - mean.square()).clamp_min(0).mean(1, keepdim=True)


def spread(value: Tensor, weight: Tensor) -> Tensor:
    """Values (1, C, H, W) where their weight (1, 1, H, W), from 0 to 1, is high; elsewhere the mean of what is near."""
    H, W = value.shape[2:]
    if max(H, W) == 1:
        return value
    weighted, weights = (F.avg_pool2d(F.pad(x, (0, W % 2, 0, H % 2)), 2) for x in (value * weight, weight))
    coarse = spread(weighted / weights.clamp_min(1e-9), (4 * weights).clamp_max(1))
    near = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :H, :W]
    return value * weight + near * (1 - weight)
