"""Random hole masks."""

import torch
from torch import Tensor

# Share of each family, and what it is for: walks are the shape of the test set's holes; strokes and boxes, of 5 to
# 60 % of the picture, keep a model trained on them useful for hand-drawn holes.
STROKE_SHARE, BOX_SHARE = 0.15, 0.10
WALK_STEPS = 0.8    # steps per pixel of the picture; gives the test masks' 20.8 % hole at 64x64


def random_holes(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw hole masks like the test set's: bool (count, 1, size, size) on the generator's device, True = hole.

    Three quarters are random walks, the rest brush strokes and boxes. Every mask has a hole and a known pixel, since a
    walk has fewer steps than there are pixels. The result depends on the arguments and the generator's state alone.
    """
    kind = torch.rand(count, generator=generator, device=generator.device)
    stroke, box = kind < STROKE_SHARE, kind > 1 - BOX_SHARE
    holes = torch.empty(count, size * size, dtype=torch.bool, device=generator.device)
    walk = ~(stroke | box)
    holes[walk] = random_walks(int(walk.sum()), size, generator).flatten(1)
    points = torch.rand(int(stroke.sum()), 4, 1, 2, generator=generator, device=generator.device)
    holes[stroke] = _nearest(_distance_to_segments(points, size).amin(1), generator)
    holes[box] = _nearest(_distance_to_box_centre(int(box.sum()), size, generator), generator)
    return holes.view(count, 1, size, size)


def random_walks(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Holes of the first kind alone: the pixels visited by a lattice walk from a random start, which stays in place when
    it would leave the picture. Arguments and result as in `random_holes`.

    Such a walk is, in law, a free walk folded back at the borders: -1 -> 0, -2 -> 1, ...; so a cumulative sum and a
    remainder replace the loop over steps.
    """
    steps = max(1, round(WALK_STEPS * size * size))
    options = {"generator": generator, "device": generator.device, "dtype": torch.int32}
    direction = torch.randint(4, (count, steps), **options)                     # bit 0: sign, bit 1: axis
    sign, vertical = 1 - 2 * (direction & 1), direction >> 1
    cell = torch.zeros(count, steps, dtype=torch.int32, device=generator.device)
    for move in (sign * vertical, sign * (1 - vertical)):                       # rows, then columns
        start = torch.randint(size, (count, 1), **options)
        free = (start + move.cumsum(1, dtype=torch.int32)).remainder(2 * size)  # (count, steps) in [0, 2 * size)
        cell = cell * size + torch.minimum(free, 2 * size - 1 - free)
    holes = torch.zeros(count, size * size, dtype=torch.bool, device=generator.device)
    return holes.scatter_(1, cell.long(), True).view(count, 1, size, size)


def _nearest(distance: Tensor, generator: torch.Generator) -> Tensor:
    """Mark the nearest pixels, a share of 5 to 60 % (small ones more often). distance (n, P) -> bool (n, P)."""
    n, pixels = distance.shape
    share = 0.05 + 0.55 * torch.rand(n, 1, generator=generator, device=distance.device) ** 2
    last = (share * pixels).long().clamp(min=1) - 1                             # (n, 1) index of the last one marked
    return distance <= distance.sort(1).values.gather(1, last)


def _pixel_grid(size: int, device: torch.device) -> Tensor:
    """Pixel centres in [0, 1], row by row: (size * size, 2) as (y, x)."""
    centres = (torch.arange(size, device=device) + 0.5) / size
    return torch.cartesian_prod(centres, centres)


def _distance_to_segments(points: Tensor, size: int) -> Tensor:
    """Euclidean distance of each pixel to each segment of lines through points (count, 4, 1, 2): (count, 3, size * size)."""
    start, along = points[:, :-1], points.diff(dim=1)                           # (count, 3, 1, 2)
    offset = _pixel_grid(size, points.device) - start                           # (count, 3, P, 2)
    t = ((offset * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp(min=1e-12)).clamp(0, 1)
    return (offset - t * along).square().sum(-1).sqrt()                         # (count, 3, P)


def _distance_to_box_centre(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Chebyshev distance of each pixel to a random point, stretched by an aspect of 1/2 to 2: (count, size * size).

    The pixels nearest to the point in this distance form a box.
    """
    centre = torch.rand(count, 1, 2, generator=generator, device=generator.device)
    stretch = 2 ** (torch.rand(count, 1, 1, generator=generator, device=generator.device) - 0.5)
    offset = (_pixel_grid(size, generator.device) - centre).abs()               # (count, P, 2)
    return torch.maximum(offset[..., :1] * stretch, offset[..., 1:] / stretch).squeeze(-1)


def window_holes(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the holes of windows of photographs, whose holes may be much larger than the window.

    45 % brush strokes of every width, 15 % boxes, 15 % walks, 15 % one side of the window, 10 % all of it.

    Returns:
        (count, 1, size, size) bool, True = hole, at least one pixel each; (count,) bool, which are of the last two kinds.
    """
    kind = torch.rand(count, generator=generator)
    strokes = _strokes(count, size, generator)                                          # (count, P)
    boxes = _distance_to_box_centre(count, size, generator)                             # (count, P)
    reach = 0.05 + 0.4 * torch.rand(count, 1, generator=generator)
    walks = random_walks(count, size, generator).flatten(1)
    sides = _half_planes(count, size, generator)
    holes = torch.where(kind.view(-1, 1) < 0.45, strokes, boxes < reach)
    holes = torch.where(kind.view(-1, 1) < 0.60, holes, walks)
    holes = torch.where(kind.view(-1, 1) < 0.75, holes, sides)
    holes = torch.where(kind.view(-1, 1) < 0.90, holes, True)
    holes = torch.where(holes.any(1, keepdim=True), holes, walks)
    return holes.view(count, 1, size, size), kind >= 0.75


def _strokes(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Brush strokes of 2 to 40 pixels' width that may begin and end outside: bool (count, size * size)."""
    width = 2.0 * 20.0 ** torch.rand(count, 1, generator=generator) / size
    distance = _distance_to_segments(torch.rand(count, 4, 1, 2, generator=generator) * 1.6 - 0.3, size)    # (count, 3, P)
    segments = torch.randint(1, 4, (count, 1), generator=generator)                     # of the line, one to three
    distance = distance.masked_fill((torch.arange(3) >= segments).unsqueeze(-1), float("inf"))
    return distance.amin(1) < width / 2


def _half_planes(count: int, size: int, generator: torch.Generator) -> Tensor:
    """The pixels on one side of a line through the picture: bool (count, size * size)."""
    angle = 2 * torch.pi * torch.rand(count, 1, generator=generator)
    shift = 0.7 * (torch.rand(count, 1, generator=generator) - 0.5)
    y, x = (_pixel_grid(size, generator.device) - 0.5).unbind(1)                        # (P,)
    return y * angle.sin() + x * angle.cos() > shift
