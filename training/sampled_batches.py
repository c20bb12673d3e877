"""A batch of the finish: pictures with holes, some with their true tokens, the others with sampled ones in the hole."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.maskgit import Known
from pictures.images import to_float
from training.speed import to_device
from training.windows import GuessPlan, make_guess
from utils import seeded

if TYPE_CHECKING:
    from training.finish import FinishRun


class Drawn(NamedTuple):
    """This process's part of the batch of one optimizer step, on the CPU; b = B / processes."""

    image: Tensor         # (b, 3, H, W) in [-1, 1], mirrored half of the time
    mask: Tensor          # (b, 1, H, W), 1 = hole
    seeds: list[int]      # b of them, for sampling
    plan: GuessPlan | None    # how guesses of the holes' content are made, for windows


def draw_batch(run: FinishRun, step: int) -> Drawn:
    """The batch of all processes is a function of (seed, step) alone."""
    c = run.config
    generator = seeded(c.seed, "finish batch", step)
    seeds = [seeded(c.seed, "finish sample", step, i).initial_seed() for i in range(c.batch_size)]
    if c.windows:
        plain = torch.rand(c.batch_size, generator=generator) < c.plain_share
        plain = (plain & (torch.arange(c.batch_size) < c.true_pictures))[run.mine]           # (b,)
        image, holes, plan, _ = run.pictures.batch(step)
        holes, plan = holes | plain.view(-1, 1, 1, 1), plan._replace(given=plan.given & ~plain)
        return Drawn(to_float(image), holes.float(), seeds[run.mine], plan)
    mirrored = torch.rand(c.batch_size, 1, 1, 1, generator=generator) < 0.5
    image = to_float(run.pictures.batch(step))                                   # (b, 3, H, W)
    holes = run.masks.train.random_holes(c.batch_size, image.shape[-1], generator)               # (B, 1, H, W)
    plain = torch.rand(c.true_pictures, 1, 1, 1, generator=generator) < c.plain_share
    holes[: len(plain)] |= plain
    return Drawn(torch.where(mirrored[run.mine], image.flip(3), image), holes[run.mine].float(), seeds[run.mine], None)


class Batch(NamedTuple):
    """A drawn batch with its tokens, on its device."""

    image: Tensor              # (b, 3, H, W) in [-1, 1]
    mask: Tensor               # (b, 1, H, W), 1 = hole
    tokens: Tensor             # (b, N), true ones of the first pictures, sampled ones in the holes of the others
    context: Tensor | None     # (b, N, D), where the decoder takes it
    guess: Tensor | None       # (b, 4, H, W) of the hole's content, for windows


@torch.no_grad()
def prepare(run: FinishRun, step: int, drawn: Drawn) -> Batch:
    """Find the tokens. Nothing in here learns, so on a GPU it is done while the step before is still running.

    Sampling takes most of a step's time, so with `reuse` the sampled tokens are kept (a kilobyte a picture) for the epochs
    after. A run that is resumed between these samples them again, with the same result.
    """
    c, model = run.config, run.model
    if step % (c.reuse * run.per_epoch) == 0:
        run.kept.clear()
    image, mask = (to_device(x, run.accelerator.device) for x in (drawn.image, drawn.mask))
    guess = None
    if drawn.plan is not None:
        plan = GuessPlan(*(to_device(x, run.accelerator.device) for x in drawn.plan))
        guess = make_guess(model.vqgan, image, mask.bool(), plan)
    true = run.true_of(image)
    seeds = drawn.seeds[true:]
    with run.accelerator.autocast():
        known = model.known(image, mask, guess)
        if all(seed in run.kept for seed in seeds):
            tokens = torch.stack([run.kept[seed] for seed in seeds]).to(known.tokens)
        else:
            part = Known(*(None if x is None else x[true:] for x in known))
            tokens = model.complete_tokens(part, seeds, total_iter=c.rounds, temperature=c.temperature)[-1].tokens
    if c.reuse > 1:
        run.kept |= dict(zip(seeds, tokens.to("cpu", torch.int32), strict=True))
    return Batch(image, mask, torch.cat([model.vqgan.encode(image[:true]), tokens]), known.context, guess)
