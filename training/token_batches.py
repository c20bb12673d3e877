"""A batch of stage 2: which pictures, which of their tokens are hidden, and what the transformer sees of their pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.decoding import lowest, masked_positions
from models.maskgit import pixel_to_token_mask
from models.schedule import gamma
from pictures.holes import random_holes
from pictures.images import to_float
from pictures.views import Views, random_views, take_views
from training.pictures_by_step import epoch_order
from training.speed import padded_positions, to_device
from training.windows import GuessPlan, make_guess
from utils import seeded

if TYPE_CHECKING:
    from training.transformer import TrainTransformerConfig, TransformerRun


def draw_masks(
    count: int, size: int, stride: int, c: TrainTransformerConfig, generator: torch.Generator,
    draw: Callable[[int, int, torch.Generator], Tensor] = random_holes,
) -> tuple[Tensor, Tensor]:    # fmt: skip
    """Holes and hidden tokens of a batch. `draw` gives holes like those to be completed.

    There are three kinds of pictures: with a hole like those to be completed; wholly unknown; and with tokens missing here
    and there, as many as a uniform draw says (the reference's only kind). In the first two a share gamma(r), r uniform, of
    the hole's tokens is hidden and the others are shown: that is what the transformer meets between two rounds of decoding.

    Returns:
        holes: (B, 1, H, W) bool, pixels that are not shown.
        masked: (B, N) bool, tokens to be predicted, at least one in each row and all of them inside the hole.
    """
    grid = size // stride
    N = grid * grid
    kind = torch.rand(count, generator=generator)
    hole_like, full = kind < c.hole_share, kind >= 1 - c.full_share
    scattered = (torch.rand(count, N, generator=generator).argsort(1)
                 < torch.randint(1, N + 1, (count, 1), generator=generator))                 # (B, N), fmt: skip
    holes = scattered.view(count, 1, grid, grid).repeat_interleave(stride, 2).repeat_interleave(stride, 3)
    holes = torch.where(hole_like.view(-1, 1, 1, 1), draw(count, size, generator), holes)
    holes = holes | full.view(-1, 1, 1, 1)                                                   # (B, 1, H, W)
    return holes, hide_tokens(holes, stride, c.mask_schedule, generator, hole_like | full)


def hide_tokens(
    holes: Tensor, stride: int, schedule: str, generator: torch.Generator, partly: Tensor | bool = True
) -> Tensor:
    """Hide a share gamma(r), r uniform, of the tokens inside each hole (B, 1, H, W): (B, N) bool, at least one in a row.

    `partly`: (B,) bool; where it is False, all of them are hidden.
    """
    inside = pixel_to_token_mask(holes, stride)                                              # (B, N)
    share = gamma(schedule, torch.rand(len(holes), generator=generator, dtype=torch.float64))
    share = torch.where(torch.as_tensor(partly), share, 1.0)                                 # (B,)
    hidden = (share * inside.sum(1)).ceil().long().clamp_min(1)                              # (B,)
    order = torch.rand(inside.shape, generator=generator).masked_fill(~inside, float("inf"))
    return lowest(order, hidden)


class Drawn(NamedTuple):
    """This process's part of the batch of one optimizer step, on the CPU; b = B / processes."""

    image: Tensor | None        # (b, 3, H, W) uint8, where pixels are needed
    views: Views | None         # how these are seen, where they are augmented
    plan: GuessPlan | None      # how guesses of the holes' content are made, for windows
    tokens: Tensor | None       # (b, N), of the pictures as they are; None for windows
    holes: Tensor               # (b, 1, H, W) bool
    masked: Tensor              # (b, N) bool, tokens to be predicted
    total: Tensor               # scalar, how many these are in the whole batch
    positions: list[Tensor]     # (M,) where they are, for each micro-batch


def draw_batch(run: TransformerRun, step: int) -> Drawn:
    """The batch of all processes is a function of (seed, step) alone."""
    c, vqgan = run.config, run.ema.vqgan.config
    if c.windows:
        window, generator = run.pictures.batch(step), seeded(c.seed, "hidden tokens", step)
        masked = hide_tokens(window.all_holes, vqgan.stride, c.mask_schedule, generator)     # (B, N)
        positions = find_positions(run, masked[run.mine])
        return Drawn(window.image, None, window.plan, None, window.holes, masked[run.mine], masked.sum(), positions)
    epoch, k = divmod(step, run.per_epoch)
    chosen = epoch_order(len(run.pictures), c.seed, epoch)[k * c.batch_size : (k + 1) * c.batch_size]
    generator = seeded(c.seed, "transformer batch", step)
    mirrored = (torch.rand(len(chosen), generator=generator) < 0.5) & c.mirror               # (B,)
    draw = run.masks.train.random_holes
    holes, masked = draw_masks(len(chosen), vqgan.image_size, vqgan.stride, c, generator, draw)    # (B, 1, H, W), (B, N)
    tokens, image = run.pictures.rows(chosen[run.mine], mirrored[run.mine])                  # (b, N), (b, 3, H, W)
    if image is not None:
        image = torch.where(mirrored[run.mine].view(-1, 1, 1, 1), image.flip(3), image)
    views = None
    if c.augment:
        views = Views(*(part[run.mine] for part in random_views(len(chosen), c.augment, generator)))
    positions = find_positions(run, masked[run.mine])
    return Drawn(image, views, None, tokens, holes[run.mine], masked[run.mine], masked.sum(), positions)


def find_positions(run: TransformerRun, masked: Tensor) -> list[Tensor]:
    """Where the hidden tokens (b, N) are, for each micro-batch."""
    find, parts = padded_positions if run.captured else masked_positions, run.config.accum_grad
    return [find(masked[micro::parts]) for micro in range(parts)]


class Batch(NamedTuple):
    """A drawn batch as the model takes it, on its device."""

    tokens: Tensor              # (b, N)
    masked: Tensor              # (b, N) bool
    pixels: Tensor | None       # (b, N, pixel_dim), where the transformer takes them
    total: Tensor               # scalar
    positions: list[Tensor]     # (M,) for each micro-batch


@torch.no_grad()
def prepare(run: TransformerRun, drawn: Drawn) -> Batch:
    send = partial(to_device, device=run.accelerator.device)
    tokens, pixels, guess = drawn.tokens, None, None
    if drawn.image is not None:
        image, holes = to_float(send(drawn.image)), send(drawn.holes)                        # (b, 3, H, W), (b, 1, H, W)
        if drawn.views is not None:
            image = take_views(image, Views(*map(send, drawn.views)))
        if drawn.plan is not None:
            guess = make_guess(run.ema.vqgan, image, holes, GuessPlan(*map(send, drawn.plan)))
        if drawn.views is not None or drawn.plan is not None:
            tokens = run.ema.vqgan.encode(image)                                             # (b, N)
        pixels = run.ema.pixels_of(image, holes, guess)
    return Batch(send(tokens), send(drawn.masked), pixels, send(drawn.total), [*map(send, drawn.positions)])
