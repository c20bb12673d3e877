"""Pictures a second: the reference's loop, the reference's weights in our loop, and the default."""

import argparse
import copy
from functools import partial

import torch
from torch import Tensor

from models import MaskGIT
from tools.benchmark.timing import Case, describe, draw_pictures, load_models, take_turns


@torch.no_grad()
def reference_loop(model: MaskGIT, image: Tensor, mask: Tensor, total_iter: int) -> None:
    """What the reference does: one picture after the other, float32, its own decoder, every round decoded to pixels."""
    for i in range(len(image)):
        x, m = image[i : i + 1], mask[i : i + 1]
        known = model.known(x, m)
        for r in model.complete_tokens(known, [i], decoder="reference", total_iter=total_iter):
            model.decode(r.tokens, x.masked_fill(m, 0), m, known.context)


def complete(model: MaskGIT, image: Tensor, mask: Tensor, **options) -> None:
    """Our loop: a batch at once, the last round decoded."""
    model.complete(image, mask, range(len(image)), **options)


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    model, reference = load_models(args, device)
    T, B = args.total_iter, args.batch_size
    R = B if device.type == "cuda" else min(4, B)    # a batch of 16 of the reference's takes a minute on a CPU
    image, mask = draw_pictures(B, model.image_size, device)
    x, m = draw_pictures(R, reference.image_size, device)
    cases = [Case("reference loop", 1, lambda: reference_loop(reference, x[:1], m[:1], T))]
    for precision in ("fp32", "bf16"):
        call = partial(complete, reference, x, m, precision=precision, decoder="reference", total_iter=T)
        cases.append(Case(f"reference weights in batches, {precision}", R, call))
    models = {"default": model}
    if args.compile:
        models["default, compiled"] = copy.deepcopy(model)
        models["default, compiled"].transformer.compile_blocks()
    for name, one in models.items():
        for precision in ("fp32", "bf16"):
            call = partial(complete, one, image, mask, precision=precision, total_iter=T)
            cases.append(Case(f"{name}, {precision}", B, call))
    return describe(model, reference, args, device) | {"T": T, "completion": take_turns(cases, args.rounds, device)}
