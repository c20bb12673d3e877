"""Large holes, for tests of what a model invents: half a picture and more."""
import math

import torch
from torch import Tensor

SHARES = (0.5, 0.75)    # of the picture that is hidden
PLACES = ("side", "centre", "boxes", "corner")
CORNER = 1 / 3          # of each side: what is left of a picture of which all but a corner is hidden
BOXES = (0.15, 0.35)    # of each side: how large scattered boxes are


def hard_hole(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw one large hole: bool (1, height, width), True = hole. At least a row and a column stay known.

    In equal parts: one side of the picture, its centre, scattered boxes (each half or three quarters of the picture), and
    all but a corner.
    """
    place = PLACES[int(torch.randint(len(PLACES), (), generator=generator))]
    share = SHARES[int(torch.randint(len(SHARES), (), generator=generator))]
    if place == "boxes":
        return scattered_boxes(height, width, share, generator)
    hole = torch.zeros(1, height, width, dtype=torch.bool)
    if place == "centre":
        h, w = (max(1, min(side - 2, round(side * math.sqrt(share)))) for side in (height, width))
        hole[:, (height - h) // 2 :, (width - w) // 2 :][:, :h, :w] = True
    elif place == "side":
        if torch.rand((), generator=generator) < 0.5:
            hole[:, : min(height - 1, round(height * share))] = True
        else:
            hole[:, :, : min(width - 1, round(width * share))] = True
    else:
        hole[:] = True
        hole[:, : max(1, round(height * CORNER)), : max(1, round(width * CORNER))] = False
    flips = [dim for dim in (1, 2) if torch.rand((), generator=generator) < 0.5]
    return hole.flip(flips)


def scattered_boxes(height: int, width: int, share: float, generator: torch.Generator) -> Tensor:
    """Boxes at random places, until they hide the share of the picture. A box that would hide more is made narrower."""
    hole = torch.zeros(1, height, width, dtype=torch.bool)
    left = min(height * width - 1, round(share * height * width))
    while left > 0:
        size = BOXES[0] + (BOXES[1] - BOXES[0]) * torch.rand(2, generator=generator)
        h, w = (max(1, round(side * part)) for side, part in zip((height, width), size.tolist(), strict=True))
        y, x = (int(torch.randint(side - part + 1, (), generator=generator)) for side, part in ((height, h), (width, w)))
        box = ~hole[0, y : y + h, x : x + w]                                # what it would add
        columns = box.sum(0).cumsum(0)                                      # pixels added by its first columns
        w = max(1, int((columns <= left).sum()))
        added = int(columns[w - 1])
        if added <= left:
            hole[:, y : y + h, x : x + w] = True
            left -= added
        elif left < h:    # not even a column fits: its first pixels do
            rows = box[:, 0].nonzero()[:left, 0]
            hole[0, y + rows, x] = True
            left -= len(rows)
    return hole
