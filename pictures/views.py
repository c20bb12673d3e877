"""Random views of pictures: slightly turned, zoomed, moved and recoloured."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TURN = 6              # degrees to either side
ZOOM = (0.92, 1.12)       # below 1 the borders are mirrored in
MAX_MOVE = 0.06           # of the picture's side, in either direction
COLOUR = (0.1, 0.15, 0.3)    # brightness (white is 1, black -1), contrast and saturation: how far from unchanged


class Views(NamedTuple):
    """How pictures are seen: a little turned, zoomed, moved and recoloured, or as they are."""

    changed: Tensor    # (B,) bool
    place: Tensor      # (B, 2, 3) affine map from the new picture's coordinates to the old one's, both in [-1, 1]
    colour: Tensor     # (B, 3) brightness to add, contrast and saturation to multiply by


def random_views(count: int, share: float, generator: torch.Generator) -> Views:
    """Draw views, of which a `share` is changed."""
    changed = torch.rand(count, generator=generator) < share
    unit = torch.rand(count, 7, generator=generator) * 2 - 1                    # (B, 7) in [-1, 1)
    angle = unit[:, 0] * math.radians(MAX_TURN)
    low, high = math.log(ZOOM[0]), math.log(ZOOM[1])
    size = (-(low + high) / 2 - unit[:, 1] * (high - low) / 2).exp()            # zoomed in: a smaller part is seen
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    place = torch.cat([turn * size.view(-1, 1, 1), 2 * MAX_MOVE * unit[:, 2:4, None]], 2)
    return Views(changed, place, unit[:, 4:] * torch.tensor(COLOUR) + torch.tensor([0.0, 1.0, 1.0]))


def take_views(image: Tensor, views: Views) -> Tensor:
    """image: (B, 3, H, W) in [-1, 1].  Returns the same; pictures whose view is not `changed` come back bit for bit."""
    grid = F.affine_grid(views.place, list(image.shape), align_corners=False)
    seen = F.grid_sample(image, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = views.colour.view(-1, 3, 1, 1, 1).unbind(1)
    mean = seen.mean((1, 2, 3), keepdim=True)
    seen = (seen - mean) * contrast + mean + brightness
    gray = seen.mean(1, keepdim=True)
    seen = (gray + (seen - gray) * saturation).clamp(-1, 1)
    return torch.where(views.changed.view(-1, 1, 1, 1), seen, image)
