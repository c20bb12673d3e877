"""The finish: the decoder learns from sampled tokens. `train` is the whole of it, from the flags to the last checkpoint."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from models.config import STRICT, Count
from models.discriminator import FeatureDiscriminator, PatchDiscriminator
from models.maskgit import MaskGIT
from models.perceptual import PerceptualFeatures, perceptual_distance
from pictures.images import to_float
from training.config import Fraction, GuessConfig, Positive, Steps, Weight
from training.finish_losses import decoder_terms, discriminator_terms
from training.finish_models import continue_discriminators, load_discriminators, load_model, load_networks
from training.loop import run_stage
from training.losses import hole_psnr, validation_holes
from training.masks import open_masks
from training.optimization import cosine_rate, ema_decay_at, moved_further, set_rate, update_ema
from training.options import load_sections
from training.pictures_by_step import FolderPictures, ShardPictures, input_pictures, open_pictures
from training.processes import on_main
from training.run import Run
from training.sampled_batches import Batch, draw_batch, prepare
from training.speed import Ahead, Captured, in_side_stream
from training.weights import fingerprint_module, guess_inputs
from training.windows import GuessPlan, WindowBatch, Windows, make_guess, open_sets, write_completions
from utils import UserError, build_config

Scales = Annotated[list[Count], Field(min_length=1)]    # enlargements at which a perceptual network looks


@dataclass(config=STRICT)
class FinishConfig(GuessConfig):
    epochs: Count = 5
    sampled_share: float = 0.75                  # share of pictures whose holes have sampled tokens, not true ones
    discriminator_rate: Positive = 1e-4          # constant
    feature_discriminator_rate: Positive = 1e-3  # constant
    warmup_steps: Steps = 50
    ema_decay: Fraction = 0.998
    rounds: Count = 3                            # decoding rounds that make the sampled tokens
    reuse: Count = 1                             # epochs in a row that see the same holes and sampled tokens
    temperature: Positive = 1.0                  # of the sampling
    context: bool = True                         # let the decoder see the transformer's features, too
    decoder_blocks: list[Steps] | None = None    # at each scale, of a deeper decoder than the model has
    plain_share: Fraction = 0.1    # share of true-token pictures of which nothing is known, for pictures from nothing
    l1: Weight = 1.0                             # loss weights, true tokens
    laplacian: Weight = 1.0
    perceptual: Weight = 2.0
    sampled_l1: Weight = 0.5                     # loss weights, sampled tokens: the truth is one answer of many
    sampled_perceptual: Weight = 6.0
    adversarial: Weight = 0.03                   # both
    feature_matching: Weight = 0.0
    feature_adversarial: Weight = 1.0            # of the discriminator on the perceptual network's features
    seam: Weight = 2.0                           # mean step across the hole's rim
    detail: Weight = 4.0                         # mean step inside the hole
    discriminator_channels: Count = 64           # as in stage 1
    discriminator_strided: Count = 2
    perceptual_network: str = "squeezenet1_1"
    perceptual_scales: Scales = field(default_factory=lambda: [1, 2])
    second_network: str | None = None            # another perceptual network
    second_scales: Scales = field(default_factory=lambda: [1, 2, 3])
    second_perceptual: Weight = 40.0             # weight of its distance over the whole picture
    save_every: Count = 200

    def __post_init__(self) -> None:
        if not 0 < self.true_pictures < self.batch_size:
            raise ValueError(
                f"sampled_share must leave pictures of both kinds in a batch of {self.batch_size}, got {self.sampled_share}"
            )

    @property
    def true_pictures(self) -> int:
        """How many of a batch keep their true tokens; they come first."""
        return self.batch_size - round(self.sampled_share * self.batch_size)


def train(args: argparse.Namespace) -> int:
    """Run the command with its flags. Returns the exit code."""
    c = build_config(FinishConfig, load_sections(args, "train_finish")["train_finish"], "train_finish")
    return run_stage(args, c, FinishRun.KIND, lambda accelerator: build_run(args, c, accelerator))


@plain_dataclass
class FinishRun(Run):
    KIND = "finish-training"
    longer = "To train longer, begin a new run: --model its maskgit.safetensors, no --vqgan, another --output-dir"

    config: FinishConfig
    pictures: FolderPictures | ShardPictures | Windows
    val_windows: WindowBatch | None      # where the validation pictures are windows
    model: MaskGIT                       # its decoder is the averaged one
    decoder: nn.Module                   # the only part of the model that learns
    discriminator: nn.Module
    feature_discriminator: nn.Module     # on the perceptual network's features
    optimizer: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    features: PerceptualFeatures
    second: PerceptualFeatures | None    # the second network
    captured: Captured | None = None     # `gradients`, with --capture
    kept: dict[int, Tensor] = field(default_factory=dict)    # sampling seed -> tokens (N,), for epochs that reuse them

    def __post_init__(self) -> None:
        device = self.accelerator.device
        threads = 1 if isinstance(self.pictures, ShardPictures) else 8    # shards are read in order
        drawn = Ahead(lambda step: draw_batch(self, self.drawn_at(step)), threads if device.type == "cuda" else 0)
        self.batch = lambda step: prepare(self, step, drawn(step))
        self.batches = Ahead(in_side_stream(device, self.batch), int(device.type == "cuda"))

    def drawn_at(self, step: int) -> int:
        """The step whose pictures, holes and sampled tokens this one sees: its own, or one of an epoch before."""
        epoch = step // self.per_epoch
        return step - epoch % self.config.reuse * self.per_epoch

    @property
    def discriminators(self) -> tuple[nn.Module, nn.Module]:
        return self.discriminator, self.feature_discriminator

    def true_of(self, part: Tensor) -> int:
        """How many pictures of a part of a batch, the first ones, keep their true tokens: the same share in every part."""
        return len(part) * self.config.true_pictures // self.config.batch_size

    def parts(self) -> dict:
        return {
            "decoder": self.unwrap(self.decoder), "ema": self.model.vqgan.decoder,
            "discriminator": self.unwrap(self.discriminator),
            "feature_discriminator": self.unwrap(self.feature_discriminator),
            "optimizer": self.optimizer, "optimizer_d": self.optimizer_d,
        }    # fmt: skip

    def train_step(self, step: int) -> dict[str, float]:
        # While the graph is captured nothing else may run on the GPU, so the first batch is made here.
        capturing = self.captured is not None and not self.captured.replays
        return train_step(self, step, (self.batch if capturing else self.batches)(step))

    def validate(self, epoch: int, grid: Path) -> dict[str, float]:
        if self.accelerator.is_main_process:
            write_completions(self, self.model, grid, total_iter=8)
        return validate(self)

    def export(self, path: Path, step: int) -> None:
        self.model.save_file(path, finish_steps=str(step))


def build_run(args: argparse.Namespace, c: FinishConfig, accelerator: Accelerator) -> FinishRun:
    """Models, optimizers, losses and pictures, on their device."""
    parts = accelerator.num_processes * c.accum_grad
    if c.true_pictures % parts:
        message = f"must be a multiple of processes x accum_grad ({parts}); change batch_size or sampled_share"
        raise UserError(f"the pictures of a batch with true tokens ({c.true_pictures} of {c.batch_size}) {message}")
    model, first = on_main(accelerator, lambda: load_model(args.model, args.vqgan, c))
    torch.manual_seed(c.seed)    # for a discriminator that begins here
    discriminator = PatchDiscriminator(c.discriminator_channels, c.discriminator_strided)
    features, second = on_main(accelerator, lambda: load_networks(c, args))
    given = {
        "perceptual weights": fingerprint_module(features), "second weights": fingerprint_module(second),
        "model": fingerprint_module(model.transformer, model.vqgan.encoder, model.vqgan.codebook),
    }    # fmt: skip
    decoder = copy.deepcopy(model.vqgan.decoder).requires_grad_(True)
    feature_discriminator = FeatureDiscriminator(features.widths)
    both = {"discriminator": discriminator, "feature_discriminator": feature_discriminator}
    if args.discriminators:
        earlier = on_main(accelerator, lambda: load_discriminators(args.discriminators, FinishRun.KIND))
        continue_discriminators(args.discriminators, earlier, both)
    elif first is not None:
        continue_discriminators(args.vqgan, {"discriminator": first}, both)
    masks = open_masks(args)
    whole = partial(open_pictures, args, model.image_size, c, accelerator)    # last: a large set takes minutes
    pictures, val_images, val_windows = open_sets(args, model.image_size, c, accelerator, masks, whole)
    given |= input_pictures(args, pictures, val_images)

    layout = {"memory_format": torch.channels_last}
    learners = (module.to(**layout) for module in (decoder, discriminator, feature_discriminator))
    decoder, discriminator, feature_discriminator = accelerator.prepare(*learners)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=c.learning_rate, betas=(0.9, 0.99))
    rates = {discriminator: c.discriminator_rate, feature_discriminator: c.feature_discriminator_rate}
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates.items()]
    optimizer_d = torch.optim.Adam(groups, betas=(0.5, 0.99))
    model.to(accelerator.device, **layout)
    for network in filter(None, (features, second)):
        network.place(accelerator.device)
    run = FinishRun(
        c, {"train_finish": asdict(c)}, accelerator, pictures, val_images, given, masks, val_windows, model, decoder,
        discriminator, feature_discriminator, optimizer, optimizer_d, features, second,
    )    # fmt: skip
    if args.capture:
        parameters = [x for module in (decoder, *run.discriminators) for x in module.parameters()]
        # The spectral norms' vectors are renewed at each call.
        run.captured = Captured(partial(gradients, run), parameters, feature_discriminator.buffers())
    return run


# ---- a step ----


def train_step(run: FinishRun, step: int, batch: Batch) -> dict[str, float]:
    """One optimizer step. Returns the terms, averaged over micro-batches and processes.

    Raises:
        NotFinite: a term or a gradient is not finite; nothing has been changed.
    """
    c = run.config
    rate = cosine_rate(step, run.total_steps, c.learning_rate, c.warmup_steps)
    set_rate(run.optimizer, rate)
    totals = (run.captured or partial(gradients, run))(*batch)
    learners = {
        "gradient_norm": run.decoder.parameters(),
        "discriminator_gradient_norm": [x for module in run.discriminators for x in module.parameters()],
    }
    decoder = run.unwrap(run.decoder)
    with moved_further(guess_inputs(decoder) if c.windows else [], c.guess_gain):
        values = run.optimizer_step(step, totals, learners, run.optimizer, run.optimizer_d)
    update_ema(run.model.vqgan.decoder, decoder, ema_decay_at(step, c.ema_decay))
    return values | {"learning_rate": rate}


def gradients(run: FinishRun, *batch: Tensor | None) -> dict[str, Tensor]:
    """The gradients of one optimizer step, for a `Batch`. Returns the terms, averaged over micro-batches.

    No number is read back from the device, so that all of it can be captured.
    """
    for optimizer in (run.optimizer, run.optimizer_d):
        optimizer.zero_grad(set_to_none=True)
    run.unwrap(run.feature_discriminator).renew_norms()

    def micro(rows: slice) -> dict[str, Tensor]:
        return micro_step(run, Batch(*(None if x is None else x[rows] for x in batch)))

    return run.micro_batches(micro, run.decoder, *run.discriminators)


def micro_step(run: FinishRun, batch: Batch) -> dict[str, Tensor]:
    """Forward and backward of decoder and discriminators on one micro-batch; gradients add up. Returns the terms."""
    accelerator, share = run.accelerator, run.config.accum_grad
    with accelerator.autocast():
        terms, images, features = decoder_terms(run, batch)
    terms["loss"] = sum(terms.values())
    accelerator.backward(terms["loss"] / share)
    with accelerator.autocast():
        judged = discriminator_terms(run, images, features, batch.mask)
    accelerator.backward(sum(judged.values()) / share)
    return {name: term.detach() for name, term in (terms | judged).items()}


# ---- validation ----


@torch.no_grad()
def validate(run: FinishRun) -> dict[str, float]:
    """Scores of the averaged decoder on fixed pictures and holes, with true and with sampled tokens."""
    model, images, windows = run.model, run.val_images, run.val_windows

    def sums() -> Iterator[dict[str, Tensor]]:
        holes = windows.holes if windows else validation_holes(run)
        fixed = images, holes, torch.arange(len(images)), *(windows.plan if windows else ())
        for image, mask, seeds, *plan in run.local_batches(*fixed):
            image, mask, values = to_float(image), mask.float(), {}
            guess = make_guess(model.vqgan, image, mask.bool(), GuessPlan(*plan)) if plan else None
            with run.accelerator.autocast():
                sampled, _, known = model.complete(image, mask, seeds.tolist(), guess=guess, total_iter=3 if plan else 8)
                true = model.decode(model.vqgan.encode(image), image, mask, known.context, guess)
            original = run.features(image)
            for kind, output in (("true", true), ("sampled", sampled)):
                pasted = torch.where(mask.bool(), output, image)
                values[f"val_{kind}_psnr"] = hole_psnr(pasted, image, mask).sum()
                values[f"val_{kind}_perceptual"] = perceptual_distance(run.features(pasted), original, mask).sum()
            yield values

    scores = run.mean_scores(sums(), len(images))
    return scores | {"val_loss": scores["val_true_perceptual"] + scores["val_sampled_perceptual"]}
