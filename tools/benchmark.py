"""Measure speed and memory here: completing pictures against the reference's loop, and training against encoding every step.

Completion:  python benchmark.py inpaint
Training:    python benchmark.py train
A first try: python benchmark.py inpaint --quick     (tiny models: it shows that all of it runs, the numbers mean nothing)

The cases of a table take turns, round after round, so that a busy moment of the machine meets all of them; times are medians
over the rounds, and a ratio is the median of the rounds' ratios. The reference is configs/maskgit_reference.yml with random
weights, which cost as much as trained ones: float32, one picture at a time, every round decoded (see `reference_loop`).
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from models import MaskGIT
from models.attention import count_parameters, use_fused_attention
from models.decoding import places
from models.maskgit import pixel_to_token_mask
from models.transformer import TransformerConfig
from models.vqgan import VQGANConfig
from pictures.holes import random_holes
from tasks import load_model
from training.optimization import update_ema
from training.speed import Ahead, Captured, CapturedGradients, padded_positions, to_device
from utils import Parser, UserError, atomic_write, build_config, load_config, pick_device, run_cli, seeded, writable_folder

HERE = Path(__file__).resolve().parent.parent
# --quick: what makes either config small, its shape kept
QUICK = {
    "vqgan": dict(image_size=16, codebook_size=32, codebook_dim=8, encoder_width=16, encoder_depth=1, encoder_down=[0, 1],
                  encoder_channels=[32, 32, 32], decoder_channels=[32, 32, 32], decoder_blocks=[1, 1, 1], decoder_up=[0, 1],
                  attention_size=4),
    "transformer": dict(codebook_size=32, seq_len=16, embed_dim=32, depth=2, num_heads=2, mlp_dim=64),
}    # fmt: skip


@dataclass
class Case:
    """One line of a table."""

    name: str
    pictures: int    # that one call handles
    call: Callable[[], object]


@dataclass
class Bench:
    """What all measurements share."""

    device: torch.device
    quick: bool
    rounds: int
    batch_size: int
    total_iter: int
    compile: bool = False


# ---- clocks and counters ----


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, with everything that it starts on the device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(cases: list[Case], bench: Bench) -> list[dict]:
    """Seconds a picture of every case, and how many times as fast as the first case it is: medians over the rounds."""
    for case in cases:
        case.call()    # warm up: allocations, kernels chosen, graphs captured
    times: list[list[float]] = [[] for _ in cases]
    for _ in tqdm(range(bench.rounds), desc="rounds", unit="round", leave=False, disable=None):
        for case, list_ in zip(cases, times, strict=True):
            list_.append(seconds(case.call, bench.device) / case.pictures)
    return [
        {
            "case": case.name, "batch": case.pictures, "pictures/s": 1 / statistics.median(mine),
            "seconds a picture": statistics.median(mine),
            "times as fast": statistics.median(first / one for first, one in zip(times[0], mine, strict=True)),
        }
        for case, mine in zip(cases, times, strict=True)
    ]    # fmt: skip


def memory_now(device: torch.device) -> float | None:
    """Memory in use in MiB: the device's allocations on CUDA, else the process's; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    # What was freed is still the process's, and would be used again unnoticed: glibc gives it back when asked.
    gc.collect()
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return process_memory("VmRSS")


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """Like `memory_now`, the largest value while `call` runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        wait(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")    # Linux: the high-water mark starts anew
    except OSError:
        return None
    call()
    return process_memory("VmHWM")


def process_memory(field: str) -> float | None:
    """A line of Linux's /proc/self/status, in MiB."""
    try:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return None


def count_flops(call: Callable[[], object], *modules: nn.Module) -> float:
    """Floating-point operations of a call (a multiply-add is two); with attention written out, which the counter knows."""
    for module in modules:
        use_fused_attention(module, False)
    with FlopCounterMode(display=False) as counter:
        call()
    for module in modules:
        use_fused_attention(module, True)
    return float(counter.get_total_flops())


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Operations a second of a large matrix product here: the best of a few."""
    side = 256 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(3 if quick else 10))


# ---- models and pictures ----


def build(config: Path, bench: Bench) -> MaskGIT:
    """A model of a config file with random weights, always the same."""
    sections = load_config(config)
    if bench.quick:
        for name, small in QUICK.items():
            sections[name] |= small
        if sections["transformer"]["pixel_dim"]:
            sections["transformer"]["pixel_dim"] = 4 * sections["vqgan"]["stride"] ** 2
    vqgan = build_config(VQGANConfig, sections["vqgan"], "vqgan")
    transformer = build_config(TransformerConfig, sections["transformer"], "transformer")
    torch.manual_seed(0)
    return MaskGIT(vqgan, transformer).eval().to(bench.device)


def shipped(args: argparse.Namespace, bench: Bench) -> tuple[MaskGIT, str]:
    """The bundled model, or one of its config where it is not there; with words that say which."""
    path = args.checkpoint or HERE / "checkpoints/cat64.safetensors"
    if bench.quick or (args.checkpoint is None and not path.exists()):
        return build(HERE / "configs/cat64.yml", bench), "configs/cat64.yml with random weights"
    return load_model(path, bench.device), path.name


def reference(args: argparse.Namespace, bench: Bench) -> tuple[MaskGIT, str]:
    if args.reference_checkpoint is not None:
        return load_model(args.reference_checkpoint, bench.device), args.reference_checkpoint.name
    return build(HERE / "configs/maskgit_reference.yml", bench), "configs/maskgit_reference.yml with random weights"


def draw_pictures(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise (count, 3, size, size) in [-1, 1] and holes (count, 1, size, size); what is seen does not change the time."""
    generator = seeded("benchmark", count)
    image = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    return image.to(device), random_holes(count, size, generator).to(device)


def half(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


# ---- completion ----


@torch.no_grad()
def reference_loop(model: MaskGIT, image: Tensor, mask: Tensor, total_iter: int) -> None:
    """What the reference does: one picture after the other, float32, its own decoder, every round decoded to pixels."""
    for i in range(len(image)):
        x, m = image[i : i + 1], mask[i : i + 1]
        known = model.known(x, m)
        for r in model.complete_tokens(known, [i], decoder="reference", total_iter=total_iter):
            model.decode(r.tokens, x.masked_fill(m, 0), m, known.context)


def complete(model: MaskGIT, image: Tensor, mask: Tensor, batch_size: int, **options) -> None:
    """Our path: batches, the last round decoded."""
    for start in range(0, len(image), batch_size):
        part = slice(start, start + batch_size)
        model.complete(image[part], mask[part], range(start, start + len(image[part])), **options)


@torch.no_grad()
def complete_int8(model: MaskGIT, quantised: MaskGIT, image: Tensor, mask: Tensor, **options) -> None:
    """Transformer with 8-bit weights and activations, decoder in bfloat16."""
    known = quantised.known(image, mask)
    rounds = quantised.complete_tokens(known, range(len(image)), **options)
    with half(image.device):
        model.decode(rounds[-1].tokens, image.masked_fill(mask, 0), mask, known.context)


def quantise(model: MaskGIT) -> MaskGIT:
    """A copy whose transformer's linear layers multiply 8-bit numbers; the tied head stays in float32. CPU only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # it will move to another package
        small = copy.deepcopy(model)
        small.transformer = torch.ao.quantization.quantize_dynamic(small.transformer, {nn.Linear}, dtype=torch.qint8)
    return small.eval()


class CapturedTransformer:
    """The transformer as one CUDA graph: a replay costs one launch instead of hundreds. One batch size, bfloat16."""

    def __init__(self, transformer: nn.Module, tokens: Tensor, pixels: Tensor | None) -> None:
        self.eager, self.shape = transformer.features, tokens.shape
        self.graph = Captured(self.in_half, (tokens, pixels))

    @torch.no_grad()
    def in_half(self, tokens: Tensor, pixels: Tensor | None) -> Tensor:
        # Without a cache, as the casts that it holds would be freed while the graph still reads them.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return self.eager(tokens, pixels)                                             # (B, N, D)

    def __call__(self, tokens: Tensor, pixels: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        if tokens.shape != self.shape:    # the last, smaller batch
            return self.eager(tokens, pixels, wanted)
        features = self.graph(tokens, pixels)
        return features.clone() if wanted is None else features.flatten(0, 1)[wanted]


def compiled(model: MaskGIT) -> MaskGIT:
    """A copy of the model with compiled blocks."""
    fast = copy.deepcopy(model)
    fast.transformer.compile_blocks()
    return fast


def captured(fast: MaskGIT, image: Tensor, mask: Tensor) -> MaskGIT:
    """The model, which from here on replays its transformer for batches like this one."""
    known = fast.known(image, mask)
    fast.transformer.features = CapturedTransformer(fast.transformer, known.tokens, known.pixels)
    return fast


@torch.no_grad()
def agreement(model: MaskGIT, others: dict[str, Callable[[Tensor, Tensor | None], Tensor]], image: Tensor, mask: Tensor,
              total_iter: int) -> dict[str, float]:
    """Share of masked tokens whose likeliest code is the one of float32, over all rounds of the reference's decoder."""
    known, equal, total = model.known(image, mask), dict.fromkeys(others, 0), 0
    tokens, masked, pixels = known.tokens, known.hidden, known.pixels                     # (B, N), (B, N), (B, N, P)
    for r in model.complete_tokens(known, range(len(image)), decoder="reference", total_iter=total_iter):
        given = torch.where(masked, model.mask_token_id, tokens)
        expected = model.masked_logits(given, pixels).argmax(-1)                          # (M,)
        total += len(expected)
        for name, logits in others.items():
            equal[name] += int((logits(given, pixels).argmax(-1) == expected).sum())
        tokens, masked = r.tokens, r.masked
    return {name: count / total for name, count in equal.items()}


def in_bfloat16(model: MaskGIT, image: Tensor, mask: Tensor, bench: Bench) -> dict[str, MaskGIT]:
    """The model, and what can be made of it to be faster in bfloat16 here."""
    cuda = bench.device.type == "cuda"
    models = {"bfloat16": model}
    if bench.compile:
        models["compiled"] = compiled(model)
    if cuda:
        models["captured"] = captured(copy.deepcopy(model), image, mask)
    if bench.compile and cuda:
        models["compiled and captured"] = captured(compiled(model), image, mask)
    return models


def compare_inpainting(model: MaskGIT, base: MaskGIT, bench: Bench) -> tuple[list[dict], dict[str, float]]:
    """Pictures a second of the default and of the reference's weights on our path, against the reference's loop."""
    T, B = bench.total_iter, bench.batch_size
    R = B if bench.device.type == "cuda" else min(4, B)    # a batch of 16 of the reference's takes a minute on a CPU
    image, mask = draw_pictures(B, model.image_size, bench.device)
    x, m = draw_pictures(R, base.image_size, bench.device)
    same = {"decoder": "reference", "total_iter": T}
    cases = [
        Case("reference loop", 1, lambda: reference_loop(base, x[:1], m[:1], T)),
        Case("reference weights, batched, decoded once", R, lambda: complete(base, x, m, R, precision="fp32", **same)),
        Case("reference weights, in bfloat16", R, lambda: complete(base, x, m, R, precision="bf16", **same)),
    ]

    def in_half(given: Tensor, pixels: Tensor | None) -> Tensor:
        with half(bench.device):
            return base.masked_logits(given, pixels)

    others = {"bfloat16": in_half}
    if bench.device.type == "cpu":
        small = quantise(base)
        cases.append(Case("reference weights, int8 transformer", R, lambda: complete_int8(base, small, x, m, **same)))
        others["int8"] = small.masked_logits
    cases.append(Case("default, float32", B, lambda: complete(model, image, mask, B, precision="fp32", total_iter=T)))
    for name, fast in in_bfloat16(model, image, mask, bench).items():
        cases.append(Case(f"default, {name}", B, partial(complete, fast, image, mask, B, precision="bf16", total_iter=T)))
    return take_turns(cases, bench), agreement(base, others, x, m, T)


@torch.no_grad()
def parts(model: MaskGIT, bench: Bench) -> list[dict]:
    """Where the time of a completion goes: seconds a picture in bfloat16, and the share of what a matrix product reaches."""
    B, T = bench.batch_size, bench.total_iter
    image, mask = draw_pictures(B, model.image_size, bench.device)
    tokens, known = model.vqgan.encode(image), model.known(image, mask)
    logits = torch.randn(*tokens.shape, model.mask_token_id, device=bench.device)
    stub = copy.copy(model)                        # decoding without its network
    stub.masked_logits = lambda tokens, pixels, features: logits[tokens == model.mask_token_id]
    calls = {
        "encoder (float32)": (1, lambda: model.vqgan.encode(image)),
        f"transformer, {T} rounds": (T, lambda: model.masked_logits(known.tokens, known.pixels)),
        "decoder": (1, lambda: model.decode(tokens, image, mask, known.context)),
        f"choosing tokens, {T} rounds": (1, lambda: stub.complete_tokens(known, range(B), total_iter=T)),
    }
    peak = {dtype: matmul_peak(bench.device, dtype, bench.quick) for dtype in (torch.float32, torch.bfloat16)}
    rows = []
    for name, (times, call) in calls.items():
        flops = count_flops(call, model) * times / B
        with half(bench.device):
            call()
            taken = statistics.median(seconds(call, bench.device) for _ in range(bench.rounds)) * times / B
        best = peak[torch.float32 if "float32" in name else torch.bfloat16]
        rows.append({"part": name, "GF": flops / 1e9, "ms": taken * 1e3, "floor ms": flops / best * 1e3})
    rows[-1] |= {"GF": 0.0, "floor ms": 0.0}       # choosing multiplies nothing
    return rows


def growth(model: MaskGIT, bench: Bench) -> dict[str, list[dict]]:
    """Time over the number of pictures and over T, and memory over the number of pictures, in batches of at most 8."""
    batch = 2 if bench.quick else 8
    counts, totals = ((1, 2, 4), (1, 2)) if bench.quick else ((1, 8, 64), (1, 5, 10, 20))
    image, mask = draw_pictures(max(counts), model.image_size, bench.device)

    def measure(count: int, total_iter: int) -> dict:
        def call() -> None:
            complete(model, image[:count], mask[:count], batch, precision="bf16", total_iter=total_iter)

        call()
        memory = peak_memory(call, bench.device)
        taken = statistics.median(seconds(call, bench.device) for _ in range(bench.rounds))
        return {"pictures": count, "T": total_iter, "seconds": taken, "ms a picture": taken / count * 1e3,
                "ms a picture and round": taken / count / total_iter * 1e3, "peak MiB": memory}    # fmt: skip

    return {
        "pictures": [measure(count, bench.total_iter) for count in counts],
        "rounds": [measure(batch, total_iter) for total_iter in totals],
    }


def inpaint(args: argparse.Namespace, bench: Bench) -> dict:
    (model, name), (base, base_name) = shipped(args, bench), reference(args, bench)
    compared, equal = compare_inpainting(model, base, bench)
    return {
        "default": name, "reference": base_name, "T": bench.total_iter, "completion": compared,
        "equal arg-max tokens": equal, "parts of the default": parts(model, bench),
    } | {f"growth with {key}": rows for key, rows in growth(model, bench).items()}    # fmt: skip


# ---- training ----


@dataclass
class Plan:
    """One way to train stage 2."""

    name: str
    model: MaskGIT
    batch: int
    cached: bool    # tokens computed once, instead of at every step
    half: bool      # bfloat16
    captured: bool = False    # forward and backward pass as a CUDA graph


def training_step(
    plan: Plan, batch: int, device: torch.device, compile: bool = False
) -> tuple[MaskGIT, Callable[[], None]]:
    """A copy of the model and an optimizer step on it: get holes and tokens, forward, backward, AdamW, EMA.

    As in training_transformer.py, the holes for a GPU are drawn on the CPU beside the steps before.
    """
    model = copy.deepcopy(plan.model).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=1e-4, betas=(0.9, 0.96), fused=True)
    if compile:
        model.transformer.compile_blocks()
    image, _ = draw_pictures(batch, model.image_size, device)
    cache, count = model.vqgan.encode(image), itertools.count()

    def draw(step: int) -> tuple[Tensor, ...]:
        mask = random_holes(batch, model.image_size, seeded("benchmark holes", step))
        masked = pixel_to_token_mask(mask, model.vqgan.config.stride)
        return mask, masked, (padded_positions if plan.captured else places)(masked)

    def gradients(tokens: Tensor, masked: Tensor, pixels: Tensor | None, wanted: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.half):
            losses = model(tokens, masked, pixels, wanted=wanted)
        loss = losses.mean()
        loss.backward()
        return loss.detach()

    draws = Ahead(draw, threads=8 if device.type == "cuda" else 0)
    run = CapturedGradients(gradients, model.transformer.parameters()) if plan.captured else gradients

    def step() -> None:
        mask, masked, wanted = (to_device(x, device) for x in draws(next(count)))         # (B, 1, H, W), (B, N), (M,)
        tokens = cache if plan.cached else model.vqgan.encode(image)
        run(tokens, masked, model.pixels_of(image, mask), wanted)
        optimizer.step()
        update_ema(average.transformer, model.transformer, 0.999)

    return model, step


def train(args: argparse.Namespace, bench: Bench) -> dict:
    """Pictures a second of stage 2, with the share of a matrix product's speed and the memory that it takes."""
    (model, name), (base, base_name) = shipped(args, bench), reference(args, bench)
    B, cuda = bench.batch_size, bench.device.type == "cuda"
    R = min(24 if cuda else 4, B)    # 24 is the reference's batch; a CPU would take a minute a step
    plans = [
        Plan("reference, encoded at every step, float32", base, R, False, False),
        Plan("reference, tokens cached, float32", base, R, True, False),
        Plan("reference, tokens cached, bfloat16", base, B if cuda else R, True, True),
        Plan("default, tokens cached, bfloat16", model, B, True, True),
    ]
    if cuda:
        plans += [replace(plan, name=f"{plan.name}, captured", captured=True) for plan in plans[2:]]
    dtypes = {False: torch.float32, True: torch.bfloat16}
    peak = {half: matmul_peak(bench.device, dtype, bench.quick) for half, dtype in dtypes.items()}
    cases, columns = [], []
    for plan in plans:
        counted, few = training_step(replace(plan, captured=False), 4, bench.device)
        flops = count_flops(few, counted) / 4    # holes differ, and with them the number of tokens to be predicted
        before = memory_now(bench.device)
        _, step = training_step(plan, plan.batch, bench.device, bench.compile and plan.half)
        # Twice: a captured step takes its memory at the first call, another has its optimizer's state from the second on.
        most = peak_memory(lambda step=step: [step(), step()], bench.device)
        cases.append(Case(plan.name, plan.batch, step))
        columns.append({"GF a picture": flops / 1e9, "MiB": None if None in (before, most) else most - before})
    rows = take_turns(cases, bench)
    for row, column, plan in zip(rows, columns, plans, strict=True):
        row |= column | {"share of peak": column["GF a picture"] * 1e9 / row["seconds a picture"] / peak[plan.half]}
    return {
        "default": f"{name}, {count_parameters(model.transformer) / 1e6:.1f} M parameters",
        "reference": f"{base_name}, {count_parameters(base.transformer) / 1e6:.1f} M parameters",
        "matrix product, TF/s": {"float32": peak[False] / 1e12, "bfloat16": peak[True] / 1e12}, "training": rows,
    }    # fmt: skip


# ---- report ----


def describe(bench: Bench) -> dict:
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": bench.rounds, "quick": bench.quick,
    }    # fmt: skip


def text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def markdown(report: dict) -> str:
    """Lists of rows as tables, dicts and single values as lines."""
    lines = []
    for key, value in report.items():
        if isinstance(value, list):
            head = list(value[0])
            lines += ["", f"**{key}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [f"| {' | '.join(text(row[name]) for name in head)} |" for row in value]
            lines.append("")
        elif isinstance(value, dict):
            lines.append(f"{key}: " + ", ".join(f"{name} {text(item)}" for name, item in value.items()))
        else:
            lines.append(f"{key}: {text(value)}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("inpaint", "train"))
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the bundled one, else its config")
    parser.add_argument("--reference-checkpoint", type=Path, metavar="FILE", help="trained reference weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, help="how often every case is timed (default: 5, with --quick 2)")
    parser.add_argument("--batch-size", type=int, help="default: 16 on a CPU, 256 on CUDA, with --quick 4")
    parser.add_argument("--total-iter", type=int, help="T (default: 10, with --quick 2)")
    parser.add_argument("--compile", action="store_true", help="compile blocks in bfloat16 (torch.compile)")
    parser.add_argument("--quick", action="store_true", help="tiny models: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = pick_device(args.device)
    defaults = {"rounds": 2 if args.quick else 5, "total_iter": 2 if args.quick else 10,
                "batch_size": 4 if args.quick else 256 if device.type == "cuda" else 16}    # fmt: skip
    for name, value in defaults.items():
        given = getattr(args, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {given}")
        setattr(args, name, value if given is None else given)
    if args.quick and (args.checkpoint or args.reference_checkpoint):
        raise UserError("--quick makes tiny models of its own: leave the checkpoints out")
    if args.json is not None:
        writable_folder(args.json.parent)
    bench = Bench(device, args.quick, args.rounds, args.batch_size, args.total_iter, args.compile)
    report = {"machine": describe(bench)} | (inpaint if args.what == "inpaint" else train)(args, bench)
    print(markdown(report))
    if args.json is not None:
        with atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_cli(main)
