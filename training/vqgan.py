"""Stage 1: pictures to tokens and back. `train` is the whole of it, from the flags to the last checkpoint."""

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from models.config import STRICT, Count
from models.discriminator import PatchDiscriminator, feature_matching, hinge_loss
from models.perceptual import PerceptualFeatures, laplacian_distance, perceptual_distance
from models.vqgan import VQGAN, VQGANConfig
from pictures.images import to_float
from training.config import Fraction, Positive, TrainConfig, Weight, check_size, fit_decoder
from training.loop import run_stage
from training.losses import hole_l1, hole_psnr, load_features, validation_holes, write_grid
from training.masks import open_masks
from training.optimization import cosine_rate, ema_decay_at, set_rate, update_ema
from training.options import keys_set, load_sections
from training.pictures_by_step import FolderPictures, ShardPictures, input_pictures, open_pictures
from training.processes import on_main
from training.run import Run
from training.speed import Ahead
from training.weights import fingerprint_module, trained_vqgan
from training.windows import Windows, open_sets
from utils import UserError, build_config, seeded


@dataclass(config=STRICT)
class TrainVQGANConfig(TrainConfig):
    learning_rate: Positive = 4e-4
    discriminator_rate: Positive = 2e-4    # constant
    validate_every: Count = 2
    known_share: Fraction = 0.5            # share of pictures decoded with known pixels and a hole
    l1: Weight = 1.0                       # loss weights
    laplacian: Weight = 1.0
    perceptual: Weight = 1.0
    codebook: Weight = 1.0
    adversarial: Weight = 0.1
    feature_matching: Weight = 1.0
    adversarial_from: Fraction = 0.2       # share of the training after which the discriminator joins
    freeze_tokens_from: Fraction = 1.0     # share after which encoder and codebook stand still; then stage 2 can start
    restart_every: Count = 100             # steps between two restarts of unused codes; none after freezing or 80 %
    discriminator_channels: Count = 64
    discriminator_strided: Count = 2
    perceptual_network: str = "squeezenet1_1"


def train(args: argparse.Namespace) -> int:
    """Run the command with its flags. Returns the exit code."""
    sections = load_sections(args, "train_vqgan")
    model_config = build_config(VQGANConfig, fit_decoder(sections["vqgan"], keys_set(args, "vqgan")), "vqgan")
    if model_config.image_size % 8:
        reason = "as the loss halves pictures three times"
        raise UserError(f"config vqgan.image_size must be a multiple of 8, {reason}, got {model_config.image_size}")
    c = build_config(TrainVQGANConfig, sections["train_vqgan"], "train_vqgan")
    check_size("vqgan", model_config, lambda: VQGAN(model_config))
    check_size("train_vqgan", c, lambda: build_discriminator(c))
    # Frozen tokens: DistributedDataParallel must look for parameters without a gradient.
    unused = {"find_unused_parameters": c.freeze_tokens_from < 1}
    return run_stage(args, c, VQGANRun.KIND, lambda accelerator: build_run(args, model_config, c, accelerator), **unused)


@plain_dataclass
class VQGANRun(Run):
    KIND = "vqgan-training"
    longer = "To train longer, begin a new run from this one: --init its last.pt, another --output-dir"

    config: TrainVQGANConfig
    pictures: FolderPictures | ShardPictures | Windows
    vqgan: nn.Module
    discriminator: nn.Module
    ema: VQGAN
    optimizer: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    features: PerceptualFeatures | None
    usage: Tensor    # (K,) how often each code was used since the last restart, all processes together

    def __post_init__(self) -> None:
        self.batches = Ahead(lambda step: draw_batch(self, step), threads=self.accelerator.device.type == "cuda")

    @property
    def plain(self) -> VQGAN:
        return self.unwrap(self.vqgan)

    def parts(self) -> dict:
        return {
            "model": self.plain, "ema": self.ema, "discriminator": self.unwrap(self.discriminator),
            "optimizer": self.optimizer, "optimizer_d": self.optimizer_d,
        }    # fmt: skip

    def state(self) -> dict:
        return super().state() | {"usage": self.usage}

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.usage.copy_(state["usage"])

    def train_step(self, step: int) -> dict[str, float]:
        return train_step(self, step, *(x.to(self.accelerator.device) for x in self.batches(step)))

    def validate(self, epoch: int, grid: Path) -> dict[str, float]:
        if self.accelerator.is_main_process:
            write_reconstructions(self, grid)
        return validate(self)


def build_run(
    args: argparse.Namespace, model_config: VQGANConfig, c: TrainVQGANConfig, accelerator: Accelerator
) -> VQGANRun:
    """Pictures, models, optimizers and losses, on their device."""
    size, masks = model_config.image_size, open_masks(args)
    whole = partial(open_pictures, args, size, c, accelerator)
    pictures, val_images, _ = open_sets(args, size, c, accelerator, masks, whole)
    torch.manual_seed(c.seed)
    vqgan = VQGAN(model_config)
    if args.init:
        vqgan.load_state_dict(on_main(accelerator, lambda: trained_vqgan("--init", args.init, model_config)))
    vqgan = vqgan.to(memory_format=torch.channels_last)
    discriminator = build_discriminator(c)
    ema = copy.deepcopy(vqgan).eval().requires_grad_(False).to(accelerator.device)
    features = perceptual_network(c, args.perceptual_weights)
    features = features.place(accelerator.device) if features else None
    vqgan, discriminator = accelerator.prepare(vqgan, discriminator.to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW(vqgan.parameters(), lr=c.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=c.discriminator_rate, betas=(0.5, 0.99), weight_decay=0.0)
    usage = torch.zeros(model_config.codebook_size, device=accelerator.device)
    configs = {"vqgan": asdict(model_config), "train_vqgan": asdict(c)}
    given = input_pictures(args, pictures, val_images) | {"perceptual weights": fingerprint_module(features)}
    return VQGANRun(
        c, configs, accelerator, pictures, val_images, given, masks, vqgan, discriminator, ema, optimizer,
        optimizer_d, features, usage,
    )    # fmt: skip


def build_discriminator(c: TrainVQGANConfig) -> PatchDiscriminator:
    return PatchDiscriminator(c.discriminator_channels, c.discriminator_strided)


def perceptual_network(c: TrainVQGANConfig, weights: str | None) -> PerceptualFeatures | None:
    """The perceptual network. Without weights there is a notice, and training goes on without this term."""
    try:
        return load_features(c.perceptual_network, weights, [1], "--perceptual-weights")
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        print(f"notice: {error}; training without the perceptual term", file=sys.stderr)
        return None


# ---- a step ----


def draw_batch(run: VQGANRun, step: int) -> tuple[Tensor, Tensor]:
    """This process's pictures and holes of one optimizer step; those of all processes are a function of (seed, step) alone.

    Returns (b, 3, H, W) in [-1, 1], mirrored half of the time, and (b, 1, H, W) holes, all ones where nothing is known;
    b = B / processes.
    """
    c = run.config
    generator = seeded(c.seed, "vqgan batch", step)
    mirrored = torch.rand(c.batch_size, 1, 1, 1, generator=generator) < 0.5
    known = torch.rand(c.batch_size, 1, 1, 1, generator=generator) < c.known_share
    if c.windows:
        image, _, _, holes = run.pictures.batch(step)                            # (b, 3, H, W), (B, 1, H, W)
    else:
        image = run.pictures.batch(step)                                         # (b, 3, H, W)
        holes = run.masks.train.random_holes(c.batch_size, image.shape[-1], generator)       # (B, 1, H, W)
    image = to_float(torch.where(mirrored[run.mine], image.flip(3), image))
    return image, (holes | ~known)[run.mine].float()


def train_step(run: VQGANRun, step: int, image: Tensor, mask: Tensor) -> dict[str, float]:
    """One optimizer step. Returns the terms, averaged over micro-batches and processes.

    Raises:
        NotFinite: a term or a gradient is not finite; nothing has been changed.
    """
    c, accelerator = run.config, run.accelerator
    adversarial = step >= c.adversarial_from * run.total_steps
    if step >= c.freeze_tokens_from * run.total_steps and run.plain.codebook.embedding.weight.requires_grad:
        freeze_tokens(run)
    rate = cosine_rate(step, run.total_steps, c.learning_rate, c.warmup_steps)
    set_rate(run.optimizer, rate)
    learners, optimizers = {"gradient_norm": run.vqgan.parameters()}, [run.optimizer]
    if adversarial:
        learners["discriminator_gradient_norm"] = run.discriminator.parameters()
        optimizers.append(run.optimizer_d)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    used = torch.zeros_like(run.usage)
    totals = run.micro_batches(
        lambda rows: micro_step(run, image[rows], mask[rows], adversarial, used), run.vqgan, run.discriminator
    )
    values = run.optimizer_step(step, totals, learners, *optimizers)
    update_ema(run.ema, run.plain, ema_decay_at(step, c.ema_decay))
    run.usage += accelerator.reduce(used, "sum")
    if (step + 1) % c.restart_every == 0:
        values["codes_used"] = (run.usage > 0).float().mean().item()
        restart_codes(run, image, step)
    return values | {"learning_rate": rate}


def micro_step(run: VQGANRun, image: Tensor, mask: Tensor, adversarial: bool, used: Tensor) -> dict[str, Tensor]:
    """Forward and backward of generator and discriminator on one micro-batch; gradients add up.

    Returns the terms. How often each code was used is added to `used` (K,).
    """
    c, accelerator = run.config, run.accelerator
    with accelerator.autocast():
        output, quantized = run.vqgan(image, mask)
        output = output.float()
        terms = reconstruction_terms(output, image, mask, run.features)
        terms["codebook"] = quantized.loss
        pasted = torch.where(mask.bool(), output, image)
        if adversarial:
            with run.frozen(run.discriminator) as (discriminator,):
                score, fake = discriminator(pasted)
                with torch.no_grad():
                    _, real = discriminator(image)
            terms["adversarial"] = -score.float().mean()
            terms["feature_matching"] = feature_matching(fake, real)
    terms["loss"] = sum(getattr(c, name) * term for name, term in terms.items())
    accelerator.backward(terms["loss"] / c.accum_grad)
    if adversarial:
        with accelerator.autocast():
            scores, _ = run.discriminator(torch.cat([image, pasted.detach()]))
            terms["discriminator"] = hinge_loss(*scores.float().chunk(2))
        accelerator.backward(terms["discriminator"] / c.accum_grad)
    used += torch.bincount(quantized.indices.flatten(), minlength=len(used))
    return {name: term.detach() for name, term in terms.items()}


def reconstruction_terms(
    output: Tensor, image: Tensor, mask: Tensor, features: PerceptualFeatures | None
) -> dict[str, Tensor]:
    """L1 over hole and (lightly) known pixels, Laplacian pyramid and perceptual distance of the pasted picture."""
    terms = {"l1": hole_l1(output, image, mask)}
    pasted = torch.where(mask.bool(), output, image)
    terms["laplacian"] = laplacian_distance(pasted, image)
    if features is not None:
        with torch.no_grad():
            original = features(image)
        terms["perceptual"] = perceptual_distance(features(pasted), original).mean()
    return terms


@torch.no_grad()
def restart_codes(run: VQGANRun, image: Tensor, step: int) -> None:
    """Move unused codes onto latents of this step's pictures, until tokens are frozen or 80 % of the training are over."""
    c, accelerator = run.config, run.accelerator
    if step < min(c.freeze_tokens_from, 0.8) * run.total_steps:
        latents = accelerator.gather(run.plain.encoder(image))                   # (B, d, h, w), process by process
        latents = latents.unflatten(0, (accelerator.num_processes, -1)).transpose(0, 1)    # in the batch's order
        latents = latents.flatten(0, 1).permute(0, 2, 3, 1).flatten(0, 2)        # (B h w, d)
        run.plain.codebook.restart_dead(run.usage, latents, seeded(c.seed, "restart", step))
    run.usage.zero_()


def freeze_tokens(run: VQGANRun) -> None:
    """From here on a picture's tokens are final: the averaged encoder and codebook replace the trained ones."""
    for name in ("encoder", "codebook"):
        getattr(run.plain, name).load_state_dict(getattr(run.ema, name).state_dict())
        getattr(run.plain, name).requires_grad_(False)


# ---- validation ----


@torch.no_grad()
def validate(run: VQGANRun) -> dict[str, float]:
    """Scores of the averaged model on fixed pictures with fixed holes: decoded with nothing known, and with the hole."""

    def sums() -> Iterator[dict[str, Tensor]]:
        for image, hole in run.local_batches(run.val_images, validation_holes(run)):
            image, hole, values = to_float(image), hole.float(), {}
            for kind, mask in (("plain", torch.ones_like(hole)), ("hole", hole)):
                with run.accelerator.autocast():
                    output = run.ema(image, mask)[0].float().clamp(-1, 1)
                terms = reconstruction_terms(output, image, mask, run.features)
                values |= {f"val_{kind}_{name}": term * len(image) for name, term in terms.items()}
                values[f"val_{kind}_psnr"] = hole_psnr(output, image, mask).sum()
            yield values

    scores = run.mean_scores(sums(), len(run.val_images))
    return scores | {"val_loss": sum(value for name, value in scores.items() if not name.endswith("psnr"))}


@torch.no_grad()
def write_reconstructions(run: VQGANRun, path: Path) -> None:
    """A grid of 16 validation pictures: as they are, decoded with nothing known, with their holes, decoded and pasted."""
    device = run.accelerator.device
    image = to_float(run.val_images[:16]).to(device)
    hole = validation_holes(run)[:16].to(device)
    with run.accelerator.autocast():
        plain, filled = (run.ema(image, mask.float())[0].float().clamp(-1, 1) for mask in (torch.ones_like(hole), hole))
    write_grid(path, image, plain, image.masked_fill(hole, 0), torch.where(hole, filled, image))
