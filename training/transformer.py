"""Stage 2: the masked-token transformer. `train` is the whole of it, from the flags to the last checkpoint."""

import argparse
import copy
import math
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from models.config import STRICT, Count
from models.maskgit import MaskGIT, pixel_to_token_mask
from models.schedule import SCHEDULES
from models.transformer import TransformerConfig
from models.vqgan import VQGANConfig
from pictures.images import to_float
from training.config import Fraction, GuessConfig, Positive, Steps, Weight, check_size, fit_transformer
from training.loop import is_due, run_stage
from training.masks import open_masks
from training.muon import Muon
from training.optimization import cosine_rate, ema_decay_at, moved_further, set_rate, update_ema
from training.options import keys_set, load_sections
from training.pictures_by_step import input_pictures
from training.processes import on_main
from training.run import Run
from training.speed import Ahead, Captured
from training.token_batches import Batch, draw_batch, draw_masks, prepare
from training.token_cache import TokenCache, encode, open_tokens
from training.weights import guess_inputs, load_vqgan, trained_transformer, vqgan_with_guess
from training.windows import GuessPlan, WindowBatch, Windows, make_guess, open_sets, write_completions
from utils import UserError, build_config, seeded


@dataclass(config=STRICT)
class TrainTransformerConfig(GuessConfig):
    epochs: Count = 300
    batch_size: Count = 64
    optimizer: Literal["adamw", "muon"] = "adamw"    # muon: for the blocks' matrices; half the steps to the same loss
    learning_rate: Positive = 5e-4
    warmup_steps: Steps = 500
    # cosine: half a cosine down to 0; plateau: x 0.1 when validation stops improving; constant: for a run from which
    # another one continues (--init)
    rate_schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    plateau_patience: Steps = 10       # validations without improvement before the rate falls
    weight_decay: Weight = 0.03
    label_smoothing: Fraction = 0.0
    mirror: bool = True                # train on mirror images too
    augment: Fraction = 0.0            # share of pictures turned, zoomed, moved and recoloured a little, encoded anew
    hole_share: Fraction = 0.6         # share of pictures whose hidden tokens lie in a hole-shaped mask
    full_share: Fraction = 0.15        # share of pictures of which nothing is known; the rest: tokens scattered at random
    mask_schedule: Literal[tuple(SCHEDULES)] = "cosine"    # gamma of the share hidden in holes and of unknown pictures
    sample_every: Count = 5            # epochs between two grids of completions, written with a validation
    val_pictures: Count = 512

    def __post_init__(self) -> None:
        if self.hole_share + self.full_share > 1 + 1e-9:
            raise ValueError(f"hole_share + full_share must not exceed 1, got {self.hole_share + self.full_share}")
        if self.windows and self.augment:
            raise ValueError("augment is for whole pictures; with windows it must be 0")


def train(args: argparse.Namespace) -> int:
    """Run the command with its flags. Returns the exit code."""
    sections = load_sections(args, "train_transformer")
    c = build_config(TrainTransformerConfig, sections["train_transformer"], "train_transformer")
    return run_stage(args, c, TransformerRun.KIND, lambda accelerator: build_run(args, sections, c, accelerator))


@plain_dataclass
class TransformerRun(Run):
    KIND = "transformer-training"
    longer = "To train longer, begin a new run from this one: --init its maskgit.safetensors, another --output-dir"

    config: TrainTransformerConfig
    pictures: TokenCache | Windows
    val_tokens: Tensor    # (M, N) of the validation pictures
    val_windows: WindowBatch | None    # where they are windows
    model: nn.Module      # MaskGIT
    ema: MaskGIT
    optimizer: torch.optim.Optimizer
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau
    captured: Captured | None = None    # `gradients`, with --capture

    def __post_init__(self) -> None:
        self.drawn = Ahead(lambda step: draw_batch(self, step), threads=8 if self.accelerator.device.type == "cuda" else 0)

    @property
    def plain(self) -> MaskGIT:
        return self.unwrap(self.model)

    def parts(self) -> dict:
        return {
            "model": self.plain.transformer, "ema": self.ema.transformer, "optimizer": self.optimizer,
            "plateau": self.plateau,
        }    # fmt: skip

    def state(self) -> dict:
        return super().state() | {"vqgan": self.plain.vqgan.state_dict()}

    def restore(self, state: dict) -> None:
        for name, value in self.plain.vqgan.state_dict().items():
            if not torch.equal(value.cpu(), state["vqgan"][name]):
                raise UserError("can't resume: the checkpoint was trained with another VQGAN than --vqgan gives")
        super().restore(state)

    def train_step(self, step: int) -> dict[str, float]:
        return train_step(self, step, prepare(self, self.drawn(step)))

    def validate(self, epoch: int, grid: Path) -> dict[str, float]:
        if self.accelerator.is_main_process and is_due(epoch, self.config.sample_every, self.config.epochs):
            write_completions(self, self.ema, grid, from_nothing=True)
        scores = validate(self)
        self.plateau.step(scores["val_loss"])
        return scores

    def export(self, path: Path, step: int) -> None:
        self.ema.save_file(path, steps=str(step))


def build_run(
    args: argparse.Namespace, sections: dict[str, dict], c: TrainTransformerConfig, accelerator: Accelerator
) -> TransformerRun:
    """Model, pictures, tokens and optimizer, on their device."""
    vqgan = on_main(accelerator, lambda: load_vqgan(args.vqgan))
    vqgan = vqgan_with_guess(vqgan) if c.windows else vqgan
    check_vqgan(args, sections["vqgan"], vqgan.config)
    values = fit_transformer(sections["transformer"], vqgan.config, keys_set(args, "transformer"))
    model_config = build_config(TransformerConfig, values, "transformer")
    check_size("transformer", model_config, lambda: MaskGIT(vqgan.config, model_config))
    torch.manual_seed(c.seed)
    model = MaskGIT(vqgan.config, model_config)
    model.vqgan.load_state_dict(vqgan.state_dict())
    if args.init:
        first = on_main(accelerator, lambda: trained_transformer("--init", args.init, model))
        model.transformer.load_state_dict(first)
    else:
        embed_codes(model, seeded(c.seed, "embed codes"))
    model.to(accelerator.device)

    masks, pixels = open_masks(args), model_config.pixel_dim > 0 or c.augment > 0
    whole = partial(open_tokens, args, model.vqgan, c.mirror, pixels, accelerator)
    pictures, val_images, val_windows = open_sets(args, model.image_size, c, accelerator, masks, whole)
    val_tokens = encode(model.vqgan, val_images, accelerator.device)

    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model.transformer, c)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=c.plateau_patience)
    configs = model.configs() | {"train_transformer": asdict(c)}
    run = TransformerRun(
        c, configs, accelerator, pictures, val_images, input_pictures(args, pictures, val_images), masks, val_tokens,
        val_windows, accelerator.prepare(model), ema, optimizer, plateau,
    )    # fmt: skip
    run.model.train()
    if args.compile:
        run.plain.transformer.compile_blocks()
    if args.capture:
        run.captured = Captured(partial(gradients, run), run.plain.transformer.parameters())
    return run


def check_vqgan(args: argparse.Namespace, section: dict[str, Any], config: VQGANConfig) -> None:
    """Refuse a --set of the VQGAN that is not what --vqgan was trained with."""
    for name in keys_set(args, "vqgan"):
        trained = getattr(config, name, None)
        if section[name] != trained:
            raise UserError(f"--set vqgan.{name}={section[name]}: --vqgan {args.vqgan} was trained with {trained}")


def make_optimizer(transformer: nn.Module, c: TrainTransformerConfig) -> torch.optim.Optimizer:
    options = {"lr": c.learning_rate, "betas": (0.9, 0.96), "weight_decay": c.weight_decay}
    if c.optimizer == "adamw":
        return torch.optim.AdamW(transformer.parameters(), fused=transformer.pos_embed.is_cuda or None, **options)
    kinds: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in transformer.named_parameters():
        kinds[parameter.ndim == 2 and name.startswith(("blocks.", "head."))].append(parameter)
    return Muon(kinds[True], kinds[False], **options)


# ---- a step ----


def train_step(run: TransformerRun, step: int, batch: Batch) -> dict[str, float]:
    """One optimizer step: mean cross-entropy over all hidden tokens of the whole batch, however it is split.

    Raises:
        NotFinite: loss or gradient is not finite; nothing has been changed.
    """
    c, transformer = run.config, run.plain.transformer
    if c.rate_schedule != "plateau":
        steps = run.total_steps if c.rate_schedule == "cosine" else math.inf
        set_rate(run.optimizer, cosine_rate(step, steps, c.learning_rate, c.warmup_steps))
    *inputs, positions = batch
    loss = (run.captured or partial(gradients, run))(*inputs, *positions)
    learners = {"gradient_norm": transformer.parameters()}
    with moved_further(guess_inputs(transformer) if c.windows else [], c.guess_gain):
        values = run.optimizer_step(step, {"loss": loss}, learners, run.optimizer)
    update_ema(run.ema.transformer, transformer, ema_decay_at(step, c.ema_decay))
    return values | {"learning_rate": run.optimizer.param_groups[0]["lr"]}


def gradients(
    run: TransformerRun, tokens: Tensor, masked: Tensor, pixels: Tensor | None, total: Tensor, *positions: Tensor
) -> Tensor:
    """The gradients of one optimizer step, for a `Batch`.

    Returns the mean cross-entropy of this process's part, times the processes. No number is read back from the device, so
    that all of it can be captured.
    """
    accelerator = run.accelerator
    run.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=accelerator.device)
    for micro, chosen in enumerate(positions):
        with run.micro_batch(micro, run.model) as rows:
            with accelerator.autocast():
                x = None if pixels is None else pixels[rows]
                losses = run.model(tokens[rows], masked[rows], x, run.config.label_smoothing, chosen)    # (M,)
            # Gradients are averaged over processes, each of which holds a share of the hidden tokens.
            mean = losses.sum() / total * accelerator.num_processes
            accelerator.backward(mean)
        loss += mean.detach()
    return loss


@torch.no_grad()
def embed_codes(model: MaskGIT, generator: torch.Generator) -> None:
    """Start the token embedding from a random projection of the codes, so that tokens which look alike start alike.

    The embedding is tied to the output, so a prediction starts as a smooth function of where its code lies, and a
    small training set need not teach the transformer anew which of the K tokens resemble each other. Our addition.
    """
    codes, embedding = model.vqgan.codebook.codes(), model.transformer.token_embed.weight    # (K, d), (K + 1, D)
    projection = torch.randn(codes.shape[1], embedding.shape[1], generator=generator)        # (d, D)
    projected = (codes - codes.mean(0)) @ projection.to(codes)                               # (K, D)
    std = embedding.std()
    embedding[: len(codes)] = 0.9 * std * projected / projected.std() + 0.4 * embedding[: len(codes)]


# ---- validation ----


@torch.no_grad()
def validate(run: TransformerRun) -> dict[str, float]:
    """Cross-entropy and accuracy of the averaged model on fixed pictures with fixed masks."""
    c, model, images = run.config, run.ema, run.val_images
    stride, windows = model.vqgan.config.stride, run.val_windows
    if windows is None:
        holes, masked = draw_masks(
            len(images), model.image_size, stride, c, seeded(c.seed, "validation masks"), run.masks.val.random_holes
        )
        fixed = images, holes, run.val_tokens, masked
    else:
        masked = pixel_to_token_mask(windows.holes, stride)
        fixed = images, windows.holes, run.val_tokens, masked, *windows.plan

    def sums() -> Iterator[dict[str, Tensor]]:
        for image, hole, z, m, *plan in run.local_batches(*fixed):
            image = to_float(image)
            guess = make_guess(model.vqgan, image, hole, GuessPlan(*plan)) if plan else None
            with run.accelerator.autocast():
                pixels = model.pixels_of(image, hole, guess)
                logits = model.transformer(torch.where(m, model.mask_token_id, z), pixels)
            logits = logits[m].float()                                                       # (M, K)
            losses = nn.functional.cross_entropy(logits, z[m], reduction="none")             # (M,)
            values = {"val_loss": losses.sum(), "val_accuracy": (logits.argmax(1) == z[m]).sum()}
            guessed = {"val_guessed": (losses * GuessPlan(*plan).given.view(-1, 1).expand_as(m)[m]).sum()} if plan else {}
            yield values | guessed

    scores = run.mean_scores(sums(), int(masked.sum()))
    if windows is not None:    # of the windows with a guess alone
        scores["val_guessed"] *= int(masked.sum()) / max(1, int(masked[windows.plan.given].sum()))
    return scores
