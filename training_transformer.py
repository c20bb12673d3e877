"""Train the masked-token transformer (stage 2) on the tokens of a frozen VQGAN.

    python training_transformer.py --config configs/tiny.yml --vqgan runs/vqgan/last.pt ...

(--train-dir, --val-dir and --output-dir as in stage 1). configs/tiny.yml takes a minute on a CPU; configs/cat64.yml makes
the model that ships. Several GPUs: `accelerate launch training_transformer.py ...` with the same flags, the batch is split
over the processes. Again after a kill, a full disk or a stop: the same command with --resume auto. More in
docs/training.md.

Masked visual token modelling (Chang et al. 2022, section 3.1): hide tokens, predict them, cross-entropy. The set is
encoded once, with its mirror images if `mirror` is set, into a cache on disk (`token_cache.py`); no encoder runs while the
transformer learns. Which tokens are hidden: see `draw_masks`. The finished model, both stages in one file, is
OUTPUT/maskgit.safetensors, which `inpainting.py --checkpoint` takes.
"""
import argparse
import copy
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import save_image

import tasks
from models.decoding import lowest, places
from models.maskgit import MaskGIT, pixel_to_token_mask
from models.schedule import SCHEDULES, gamma
from models.transformer import TransformerConfig
from models.vqgan import VQGAN, VQGANConfig
from pictures.folders import load_folder
from pictures.holes import random_holes
from pictures.images import to_float
from pictures.views import Views, random_views, take_views
from training import token_cache
from training.checkpoints import load_checkpoint, resume_run
from training.loop import StepCount, is_due, training_loop
from training.muon import Muon
from training.optimization import cosine_rate, ema_decay_at, set_rate, update_ema
from training.options import add_flags, check_size, load_sections, with_flags
from training.pictures_by_step import check_one_batch, epoch_order
from training.processes import (
    average_over_processes,
    check_split,
    errors_told_once,
    local_batches,
    local_gradients,
    on_main,
    start_accelerator,
)
from training.speed import Ahead, CapturedGradients, check_capture, padded_positions, to_device
from training.stopping import check_all_finite
from training.weights import export_model, trained_transformer
from utils import Parser, UserError, atomic_write, build_config, fingerprint, run_cli, seeded, writable_folder

KIND = "transformer-training"


@dataclass
class TrainTransformerConfig:
    epochs: int = 300
    batch_size: int = 64               # pictures per optimizer step, over all processes and accumulation
    accum_grad: int = 1                # micro-batches per optimizer step
    optimizer: str = "adamw"           # adamw, or muon for the blocks' matrices (half the steps to the same loss)
    learning_rate: float = 5e-4        # peak
    warmup_steps: int = 500            # optimizer steps
    rate_schedule: str = "cosine"      # cosine: half a cosine down to 0; plateau: x 0.1 when validation stops improving;
                                       # constant: for a run from which another one goes on (--init)
    plateau_patience: int = 10         # validations without improvement before the rate falls
    weight_decay: float = 0.03
    grad_clip: float = 1.0             # largest gradient norm
    label_smoothing: float = 0.0
    ema_decay: float = 0.999
    precision: str = "bf16"            # bf16 or fp32
    seed: int = 0
    mirror: bool = True                # train on mirror images too
    augment: float = 0.0               # share of pictures turned, zoomed, moved and recoloured a little, encoded anew
    hole_share: float = 0.6            # share of pictures whose hidden tokens lie in a hole-shaped mask
    full_share: float = 0.15           # share of pictures of which nothing is known; the rest: tokens scattered at random
    mask_schedule: str = "cosine"      # gamma of the share hidden inside holes and of unknown pictures
    log_every: int = 50                # steps
    save_every: int = 500              # steps between two last.pt
    sample_every: int = 5              # epochs between two grids of completions
    validate_every: int = 1            # epochs between two validations, each of which may write a checkpoint
    val_pictures: int = 512

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accum_grad", "log_every", "save_every", "sample_every", "validate_every",
                     "val_pictures"):    # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("augment", "hole_share", "full_share", "ema_decay", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("warmup_steps", "plateau_patience", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.hole_share + self.full_share > 1 + 1e-9:
            raise ValueError(f"hole_share + full_share must not exceed 1, got {self.hole_share + self.full_share}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, got {self.optimizer!r}")
        if self.rate_schedule not in ("cosine", "plateau", "constant"):
            raise ValueError(f"rate_schedule must be cosine, plateau or constant, got {self.rate_schedule!r}")
        if self.mask_schedule not in SCHEDULES:
            raise ValueError(f"mask_schedule must be one of {', '.join(SCHEDULES)}, got {self.mask_schedule!r}")
        for name in ("learning_rate", "grad_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass
class Run(StepCount):
    """Everything that a step needs."""

    config: TrainTransformerConfig
    accelerator: Accelerator
    model: nn.Module    # MaskGIT
    ema: MaskGIT
    optimizer: torch.optim.Optimizer
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau
    pictures: token_cache.TokenCache
    captured: CapturedGradients | None = None    # `gradients`, with --capture

    @property
    def plain(self) -> MaskGIT:
        return self.accelerator.unwrap_model(self.model)


@torch.no_grad()
def encode(vqgan: VQGAN, images: Tensor, device: torch.device, batch_size: int = 128) -> Tensor:
    """Tokens of pictures (M, 3, H, W) uint8: (M, N)."""
    return torch.cat([vqgan.encode(to_float(part.to(device))).cpu() for part in images.split(batch_size)])


def open_tokens(
    args: argparse.Namespace, vqgan: VQGAN, mirror: bool, pixels: bool, accelerator: Accelerator
) -> token_cache.TokenCache:
    """The training set's tokens, read from --token-cache; what is not there is made first, by all processes together."""
    folder, c = Path(args.token_cache or Path(args.output_dir) / "tokens"), vqgan.config
    if c.codebook_size > 65536:
        raise UserError(f"config vqgan.codebook_size ({c.codebook_size}) must be at most 65536, for tokens of 16 bits")
    pieces = token_cache.list_pieces(args.train_dir)
    weights = [*vqgan.encoder.state_dict().values(), *vqgan.codebook.state_dict().values()]
    about = {
        "tokenizer": fingerprint(c.encoder, c.image_size, c.stride, c.l2_normalize, *weights),
        "pictures": token_cache.fingerprint_pictures(pieces), "pixels": pixels,
    }    # fmt: skip
    on_main(accelerator, lambda: token_cache.check_about(folder, about))
    mine = pieces[accelerator.process_index :: accelerator.num_processes]
    encode_ = partial(encode, vqgan, device=accelerator.device)
    token_cache.build(folder, mine, encode_, c.image_size, mirror, pixels, args.bad_images)
    accelerator.wait_for_everyone()
    return token_cache.TokenCache(folder, pieces, c.grid**2, c.image_size, mirror, pixels)


def draw_masks(
    count: int, size: int, stride: int, c: TrainTransformerConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Holes and hidden tokens of a batch.

    Three kinds of pictures: with a hole like those to be completed; wholly unknown; and with tokens missing here and there,
    as many as a uniform draw says (the reference's only kind). In the first two a share gamma(r), r uniform, of the hole's
    tokens is hidden and the others are shown: that is what the transformer meets between two rounds of decoding.

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
    holes = torch.where(hole_like.view(-1, 1, 1, 1), random_holes(count, size, generator), holes)
    holes = holes | full.view(-1, 1, 1, 1)                                                   # (B, 1, H, W)
    inside = pixel_to_token_mask(holes, stride)                                              # (B, N)
    share = gamma(c.mask_schedule, torch.rand(count, generator=generator, dtype=torch.float64))
    share = torch.where(hole_like | full, share, 1.0)                                        # (B,)
    hidden = (share * inside.sum(1)).ceil().long().clamp_min(1)                              # (B,)
    order = torch.rand(count, N, generator=generator).masked_fill(~inside, float("inf"))
    return holes, lowest(order, hidden)


class Batch(NamedTuple):
    """This process's part of the batch of one optimizer step, on the CPU; b = B / processes."""

    image: Tensor | None     # (b, 3, H, W) uint8, where pixels are asked for
    views: Views | None      # how these are seen, where they are augmented
    tokens: Tensor           # (b, N), of the pictures as they are
    holes: Tensor            # (b, 1, H, W) bool
    masked: Tensor           # (b, N) bool, tokens to be predicted
    total: Tensor            # scalar, how many these are in the whole batch
    wanted: list[Tensor]     # their places (M,) in each micro-batch


def draw_batch(run: Run, step: int) -> Batch:
    """The batch of all processes is a function of (seed, step) alone."""
    c, vqgan = run.config, run.ema.vqgan.config
    mine = slice(run.accelerator.process_index, None, run.accelerator.num_processes)
    epoch, k = divmod(step, run.per_epoch)
    chosen = epoch_order(len(run.pictures), c.seed, epoch)[k * c.batch_size : (k + 1) * c.batch_size]
    generator = seeded(c.seed, "transformer batch", step)
    mirrored = (torch.rand(len(chosen), generator=generator) < 0.5) & c.mirror               # (B,)
    holes, masked = draw_masks(len(chosen), vqgan.image_size, vqgan.stride, c, generator)    # (B, 1, H, W), (B, N)
    tokens, image = run.pictures.rows(chosen[mine], mirrored[mine])                          # (b, N), (b, 3, H, W)
    if image is not None:
        image = torch.where(mirrored[mine].view(-1, 1, 1, 1), image.flip(3), image)
    views = None
    if c.augment:
        views = Views(*(part[mine] for part in random_views(len(chosen), c.augment, generator)))
    total, masked, parts = masked.sum(), masked[mine], c.accum_grad
    find = padded_positions if run.captured else places
    wanted = [find(masked[micro::parts]) for micro in range(parts)]
    return Batch(image, views, tokens, holes[mine], masked, total, wanted)


class Prepared(NamedTuple):
    """A batch as the model takes it, on its device."""

    tokens: Tensor           # (b, N)
    masked: Tensor           # (b, N) bool
    pixels: Tensor | None    # (b, N, pixel_dim), where the transformer takes them
    total: Tensor            # scalar
    wanted: list[Tensor]     # (M,) for each micro-batch


@torch.no_grad()
def prepare(run: Run, batch: Batch) -> Prepared:
    send = partial(to_device, device=run.accelerator.device)
    tokens, pixels = send(batch.tokens), None
    if batch.image is not None:
        image = to_float(send(batch.image))                                                  # (b, 3, H, W)
        if batch.views is not None:
            image = take_views(image, Views(*map(send, batch.views)))
            tokens = run.ema.vqgan.encode(image)                                             # (b, N)
        pixels = run.ema.pixels_of(image, send(batch.holes))
    return Prepared(tokens, send(batch.masked), pixels, send(batch.total), [*map(send, batch.wanted)])


def gradients(
    run: Run, tokens: Tensor, masked: Tensor, pixels: Tensor | None, total: Tensor, *wanted: Tensor
) -> Tensor:
    """The gradients of one optimizer step, for a `Prepared` batch.

    Returns the mean cross-entropy of this process's part, times the processes. No number is read back from the device here,
    so that all of it can be captured.
    """
    accelerator, parts = run.accelerator, len(wanted)
    run.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=accelerator.device)
    for micro, chosen in enumerate(wanted):
        part = slice(micro, None, parts)
        with local_gradients(accelerator, micro < parts - 1, run.model):
            with accelerator.autocast():
                x = None if pixels is None else pixels[part]
                losses = run.model(tokens[part], masked[part], x, run.config.label_smoothing, chosen)    # (M,)
            # Gradients are averaged over processes, each of which holds a share of the hidden tokens.
            mean = losses.sum() / total * accelerator.num_processes
            accelerator.backward(mean)
        loss += mean.detach()
    return loss


def train_step(run: Run, step: int, batch: Batch) -> dict[str, float]:
    """One optimizer step: mean cross-entropy over all hidden tokens of the whole batch, however it is split.

    Raises:
        NotFinite: loss or gradient is not finite; nothing has been changed.
    """
    c, accelerator = run.config, run.accelerator
    *parts, wanted = prepare(run, batch)
    if c.rate_schedule != "plateau":
        steps = run.total_steps if c.rate_schedule == "cosine" else math.inf
        set_rate(run.optimizer, cosine_rate(step, steps, c.learning_rate, c.warmup_steps))
    loss = (run.captured or partial(gradients, run))(*parts, *wanted)
    norm = accelerator.clip_grad_norm_(run.plain.transformer.parameters(), c.grad_clip)
    values = average_over_processes({"loss": loss, "gradient_norm": norm}, accelerator)
    check_all_finite(values, step)
    run.optimizer.step()
    update_ema(run.ema.transformer, run.plain.transformer, ema_decay_at(step, c.ema_decay))
    return values | {"learning_rate": run.optimizer.param_groups[0]["lr"]}


@torch.no_grad()
def validate(run: Run, images: Tensor, tokens: Tensor) -> dict[str, float]:
    """Cross-entropy and accuracy of the averaged model on fixed pictures with fixed masks; every process takes a share."""
    c, accelerator, model = run.config, run.accelerator, run.ema
    generator = seeded(c.seed, "validation masks")
    holes, masked = draw_masks(len(images), model.image_size, model.vqgan.config.stride, c, generator)
    zero = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    sums = {"val_loss": zero.clone(), "val_accuracy": zero.clone()}
    for image, hole, z, m in local_batches(accelerator, images, holes, tokens, masked, batch_size=c.batch_size):
        with accelerator.autocast():
            logits = model.transformer(torch.where(m, model.mask_token_id, z), model.pixels_of(to_float(image), hole))
        logits = logits[m].float()                                                           # (M, K)
        sums["val_loss"] += nn.functional.cross_entropy(logits, z[m], reduction="sum")
        sums["val_accuracy"] += (logits.argmax(1) == z[m]).sum()
    share = accelerator.num_processes / masked.sum().item()
    return average_over_processes({name: value * share for name, value in sums.items()}, accelerator)


@torch.no_grad()
def write_completions(run: Run, images: Tensor, path: Path) -> None:
    """A grid of 12 validation pictures: as they are, with their holes, completed; last row: made from nothing."""
    image = to_float(images[:12]).to(run.accelerator.device)
    hole = random_holes(len(image), image.shape[-1], seeded(run.config.seed, "sample holes")).to(image.device)
    with run.accelerator.autocast():
        done = run.ema.complete(image, hole, range(len(image))).images
        made = run.ema.complete(image, torch.ones_like(hole), range(len(image)), total_iter=16).images
    rows = [image, image.masked_fill(hole, 0), torch.where(hole, done, image), made]
    with atomic_write(path) as temporary:
        save_image(torch.cat(rows).cpu(), temporary, format="png", nrow=len(image), value_range=(-1, 1), normalize=True)


def load_vqgan(path: str) -> VQGAN:
    """The averaged VQGAN of a stage-1 training checkpoint, or the VQGAN inside a finished model."""
    if path.endswith(".safetensors"):
        return tasks.load_model(path, torch.device("cpu")).vqgan.without_context()
    state = load_checkpoint(path, "vqgan-training")
    try:
        vqgan = VQGAN(VQGANConfig(**state["config"]["vqgan"]))
        vqgan.load_state_dict(state["ema"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"checkpoint {path} does not fit its own config ({reason})") from error
    return vqgan.eval().requires_grad_(False)


def state_of(run: Run, configs: dict) -> dict:
    return {
        "kind": KIND, "config": configs, "vqgan": run.plain.vqgan.state_dict(),
        "model": run.plain.transformer.state_dict(), "ema": run.ema.transformer.state_dict(),
        "optimizer": run.optimizer.state_dict(), "plateau": run.plateau.state_dict(),
    }    # fmt: skip


def restore(run: Run, state: dict) -> None:
    for name, value in run.plain.vqgan.state_dict().items():
        if not torch.equal(value.cpu(), state["vqgan"][name]):
            raise UserError("can't resume: the checkpoint was trained with another VQGAN than --vqgan gives")
    run.plain.transformer.load_state_dict(state["model"])
    run.ema.transformer.load_state_dict(state["ema"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.plateau.load_state_dict(state["plateau"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--vqgan", required=True, help="stage-1 checkpoint (last.pt), or a finished .safetensors model")
    parser.add_argument("--init", metavar="FILE", help="begin from the transformer of this model, not from random weights")
    parser.add_argument("--token-cache", metavar="DIR", help="where the training set's tokens lie (default: OUTPUT/tokens)")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks (torch.compile): for GPUs")
    parser.add_argument("--capture", action="store_true", help="capture a step's gradients as CUDA graphs: faster on a GPU")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sections = load_sections(args)
    model_config = build_config(TransformerConfig, sections.get("transformer", {}), "transformer")
    config = build_config(
        TrainTransformerConfig, with_flags(sections.get("train_transformer", {}), args), "train_transformer"
    )
    accelerator = start_accelerator(args.device, config.precision)
    with errors_told_once(accelerator, args.output_dir):
        check_split(config.batch_size, config.accum_grad, accelerator)
        check_capture(args.capture, accelerator)
        folder = on_main(accelerator, lambda: writable_folder(args.output_dir))
        vqgan = on_main(accelerator, lambda: load_vqgan(args.vqgan))
        return run_training(args, vqgan, model_config, config, folder, accelerator)


def make_optimizer(transformer: nn.Module, c: TrainTransformerConfig) -> torch.optim.Optimizer:
    options = {"lr": c.learning_rate, "betas": (0.9, 0.96), "weight_decay": c.weight_decay}
    if c.optimizer == "adamw":
        return torch.optim.AdamW(transformer.parameters(), fused=transformer.pos_embed.is_cuda or None, **options)
    kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in transformer.named_parameters():
        kinds[parameter.ndim == 2 and name.startswith(("blocks.", "head."))].append(parameter)
    return Muon(kinds[True], kinds[False], **options)


def run_training(
    args: argparse.Namespace, vqgan: VQGAN, model_config: TransformerConfig, config: TrainTransformerConfig,
    folder: Path, accelerator: Accelerator,
) -> int:    # fmt: skip
    try:
        check_size("transformer", model_config, lambda: MaskGIT(vqgan.config, model_config))
    except ValueError as error:    # the two configs don't fit each other
        raise error if isinstance(error, UserError) else UserError(f"config {error}") from error
    torch.manual_seed(config.seed)
    model = MaskGIT(vqgan.config, model_config)
    model.vqgan.load_state_dict(vqgan.state_dict())
    if args.init:
        begin = on_main(accelerator, lambda: trained_transformer("--init", args.init, model))
        model.transformer.load_state_dict(begin)
    else:
        model.embed_codes(seeded(config.seed, "embed codes"))
    model.to(accelerator.device)
    configs = model.configs() | {"train_transformer": asdict(config)}

    val_images = load_folder(args.val_dir, model.image_size, args.bad_images)[: config.val_pictures]
    val_tokens = encode(model.vqgan, val_images, accelerator.device)
    pixels = model_config.pixel_dim > 0 or config.augment > 0
    data = open_tokens(args, model.vqgan, config.mirror, pixels, accelerator)
    check_one_batch(len(data), config)

    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model.transformer, config)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=config.plateau_patience)
    run = Run(config, accelerator, accelerator.prepare(model), ema, optimizer, plateau, data)
    run.model.train()
    if args.compile:
        run.plain.transformer.compile_blocks()
    if args.capture:
        run.captured = CapturedGradients(partial(gradients, run), run.plain.transformer.parameters())
    progress = resume_run(folder, KIND, args.resume, accelerator, configs, len(data), lambda state: restore(run, state))
    batches = Ahead(lambda step: draw_batch(run, step), threads=8 if accelerator.device.type == "cuda" else 0)

    def step_(step: int) -> dict[str, float]:
        return train_step(run, step, batches(step))

    def validate_(epoch: int) -> dict[str, float] | None:
        if not is_due(epoch, config.validate_every, config.epochs):
            return None
        if accelerator.is_main_process and is_due(epoch, config.sample_every, config.epochs):
            write_completions(run, val_images, folder / f"samples_{epoch * run.per_epoch:07d}.png")
        scores = validate(run, val_images, val_tokens)
        run.plateau.step(scores["val_loss"])
        return scores

    return training_loop(
        config, accelerator, folder, progress, per_epoch=run.per_epoch, on_nan=args.on_nan,
        train_step=step_, validate=validate_, state=lambda: state_of(run, configs),
        export=lambda: export_model(run.ema, folder / "maskgit.safetensors", steps=str(progress.step)),
    )    # fmt: skip


if __name__ == "__main__":
    run_cli(main)
