"""Holes for training that are drawn from a folder of masks, in place of the random ones of pictures/holes.py."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pictures.files import find_images
from pictures.folders import read_all
from pictures.masks import read_mask
from utils import UserError


@dataclass
class OwnMasks:
    """Masks of any size, drawn at random and mirrored half of the time."""

    masks: list[Tensor]    # each (1, H, W) bool, True = hole, with a hole and a known pixel

    def random_holes(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """Whole masks, squeezed to the pictures' size: (count, 1, size, size) bool. Like `holes.random_holes`."""
        return torch.stack([squeeze(self._draw(generator), size) for _ in range(count)])

    def window_holes(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Square parts of masks around a pixel of the hole, at every scale. Like `holes.window_holes`.

        Returns (count, 1, size, size) bool, and (count,) bool, where more than half is hole.
        """
        holes = torch.stack([self._window(self._draw(generator), size, generator) for _ in range(count)])
        return holes, holes.float().mean((1, 2, 3)) > 0.5

    def _draw(self, generator: torch.Generator) -> Tensor:
        number = int(torch.randint(len(self.masks), (1,), generator=generator))
        turned = torch.rand(2, generator=generator) < 0.5
        return self.masks[number].flip([dim for dim, yes in zip((1, 2), turned.tolist(), strict=True) if yes])

    def _window(self, mask: Tensor, size: int, generator: torch.Generator) -> Tensor:
        inside = mask[0].nonzero()                                              # (M, 2)
        scale, y, x = torch.rand(3, generator=generator).tolist()
        row, column = inside[int(torch.randint(len(inside), (1,), generator=generator))].tolist()
        shortest = min(mask.shape[1:])
        side = round(min(size, shortest) * (shortest / min(size, shortest)) ** scale)
        # The pixel lies anywhere in the window, as far as the mask goes.
        top, left = (min(max(0, place - int(u * side)), length - side)
                     for place, u, length in zip((row, column), (y, x), mask.shape[1:], strict=True))    # fmt: skip
        return squeeze(mask[:, top : top + side, left : left + side], size)


def squeeze(mask: Tensor, size: int) -> Tensor:
    """A mask (1, H, W) bool to (1, size, size): hole where any of its pixels is."""
    return F.adaptive_max_pool2d(mask.float(), size).bool()


def load_masks(path: str) -> OwnMasks:
    """Read every mask of a folder; the hole is black. Masks without a hole or without anything known are refused."""
    files = list(find_images(path).values())
    masks = read_all(read_mask, files, "error")
    for file, mask in zip(files, masks, strict=True):
        if not bool(mask.any()) or bool(mask.all()):
            what = "all hole" if bool(mask.any()) else "without a hole"
            raise UserError(f"mask {file} is {what}; black marks the hole; change or remove it")
    return OwnMasks(masks)
