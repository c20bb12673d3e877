"""Pictures a second: the reference's loop, the reference's weights in our loop, and the model on the sample pictures."""

import argparse
import copy
import importlib.util
import itertools
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import MaskGIT
from models.completion import Job, complete_pictures
from models.precision import pick_precision
from pictures.files import pair
from pictures.masks import read_pair
from tools.benchmark.timing import ROOT, Case, describe, draw_pictures, load_models, say, take_turns


@torch.no_grad()
def reference_loop(model: MaskGIT, image: Tensor, mask: Tensor, total_iter: int) -> None:
    """What the reference does: one picture after the other, float32, its own decoder, every round decoded to pixels."""
    for i in range(len(image)):
        x, m = image[i : i + 1], mask[i : i + 1]
        known = model.known(x, m)
        for r in model.complete_tokens(known, [i], decoder="reference", total_iter=total_iter):
            model.decode(r.tokens, x.masked_fill(m, 0), m, known.context)


def complete(model: MaskGIT, jobs: list[Job], batch_size: int | None = None, **options) -> float:
    """Our loop: batches (default: one of all jobs), the last round decoded. Returns the mean number of rounds."""
    steps = [result.steps for result in complete_pictures(model, jobs, batch_size=batch_size or len(jobs), **options)]
    return sum(steps) / len(steps)


def sample_jobs(count: int, size: int) -> list[Job]:
    """The sample pictures with their holes, again and again; their middles, where the model is smaller."""
    files = pair(ROOT / "samples/images", ROOT / "samples/masks")
    first = max(0, (64 - size) // 2)
    middle = (slice(None), slice(first, first + size), slice(first, first + size))
    pictures = [[x[middle] for x in read_pair(image, mask)] for _, image, mask in files]
    return [Job(*pictures[i % len(pictures)], seed=i) for i in range(count)]


def onnx_case(model: MaskGIT, batch: int, total_iter: int, folder: Path) -> Case:
    """The same networks in onnxruntime: encoder, T times the transformer, decoder."""
    import onnxruntime

    from tools.export.onnx_files import write_onnx

    write_onnx(copy.deepcopy(model), folder)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    encoder, transformer, decoder = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx", settings, providers=["CPUExecutionProvider"])
        for name in ("encoder", "transformer", "decoder")
    )
    image, mask = draw_pictures(batch, model.image_size, torch.device("cpu"))
    inputs = {"image": image.numpy(), "mask": mask.float().numpy(),
              "guess": np.zeros((batch, 4, *image.shape[2:]), np.float32)}    # fmt: skip

    def run(session: onnxruntime.InferenceSession, tokens: np.ndarray | None = None) -> list[np.ndarray]:
        return session.run(None, {x.name: (inputs | {"tokens": tokens})[x.name] for x in session.get_inputs()})

    def call() -> None:
        (tokens,) = run(encoder)
        for _ in range(total_iter):
            _, inputs["features"] = run(transformer, tokens.reshape(batch, -1))
        run(decoder, tokens)

    return Case(f"model, T={total_iter}, fp32, onnxruntime (networks alone)", batch, call)


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    model, reference = load_models(args, device)
    T, B, auto = args.total_iter[0], args.batch_size, pick_precision("auto", device)
    R = B if device.type == "cuda" else min(4, B)    # a batch of 16 of the reference's takes a minute on a CPU
    x, m = draw_pictures(R, reference.image_size, device)
    jobs, precisions = sample_jobs(B, model.image_size), list(dict.fromkeys(["fp32", auto]))
    rounds = complete(model, jobs, precision=auto)
    cases = [Case("reference loop", 1, lambda: reference_loop(reference, x[:1], m[:1], T))]
    for precision in precisions:
        call = partial(reference.complete, x, m, range(R), precision=precision, decoder="reference", total_iter=T)
        cases.append(Case(f"reference weights in batches, {precision}", R, call))
    models = {"model": model}
    if args.compile:
        models["compiled model"] = copy.deepcopy(model)
        models["compiled model"].transformer.compile_blocks()
    for name, one in models.items():
        for precision, t in itertools.product(precisions, args.total_iter):
            call = partial(complete, one, jobs, precision=precision, total_iter=t)
            cases.append(Case(f"{name}, T={t}, {precision}", B, call))
        cases.append(Case(f"{name}, defaults: {rounds:.1f} rounds, {auto}", B, partial(complete, one, jobs, precision=auto)))
    with tempfile.TemporaryDirectory() as folder:
        if device.type != "cpu" or not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
            say("without onnxruntime: it takes a CPU and the packages onnx and onnxruntime")
        else:
            cases.append(onnx_case(model, B, T, Path(folder)))
        return describe(model, reference, args, device) | {"T": T, "completion": take_turns(cases, args.rounds, device)}
