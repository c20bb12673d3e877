"""Train the VQGAN (stage 1): pictures to tokens and back.

    python training_vqgan.py --config configs/tiny.yml --train-dir PICTURES --val-dir PICTURES --output-dir runs/vqgan

configs/tiny.yml takes a minute on a CPU; configs/cat64.yml makes the model that ships. Several GPUs:
`accelerate launch training_vqgan.py ...` with the same flags, the batch is split over the processes. Again after a kill, a
full disk or a stop: the same command with --resume auto. More in docs/training.md.

Losses: L1 + Laplacian pyramid + perceptual + codebook, and from `adversarial_from` on a hinge GAN with feature matching
(Esser et al. 2021, section 3.1, with a fixed weight). Half of the pictures are decoded with nothing known, the others with
everything known but a random hole; those are pasted into the picture before the perceptual and adversarial terms, which
therefore judge what a person will see: the hole and its seam.
"""
import argparse
import copy
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import save_image

from models.discriminator import PatchDiscriminator, feature_matching, hinge_loss
from models.perceptual import PerceptualFeatures, laplacian_distance, perceptual_distance
from models.vqgan import VQGAN, VQGANConfig
from pictures.folders import load_folder
from pictures.holes import random_holes
from pictures.images import to_float
from training.checkpoints import resume_run
from training.loop import StepCount, is_due, training_loop
from training.optimization import cosine_rate, ema_decay_at, set_rate, update_ema
from training.options import add_flags, check_size, load_sections, with_flags
from training.pictures_by_step import FolderPictures, ShardPictures, open_pictures
from training.processes import (
    average_over_processes,
    check_split,
    errors_told_once,
    frozen_discriminators,
    local_batches,
    local_gradients,
    on_main,
    start_accelerator,
)
from training.speed import Ahead
from training.stopping import check_all_finite
from utils import Parser, UserError, atomic_write, build_config, run_cli, seeded, writable_folder

KIND = "vqgan-training"


@dataclass
class TrainVQGANConfig:
    epochs: int = 100
    batch_size: int = 32                # pictures per optimizer step, over all processes and accumulation
    accum_grad: int = 1                 # micro-batches per optimizer step
    learning_rate: float = 4e-4         # peak, after warm-up; falls along a half cosine
    discriminator_rate: float = 2e-4    # constant
    warmup_steps: int = 200             # optimizer steps
    grad_clip: float = 1.0              # largest gradient norm
    ema_decay: float = 0.999
    precision: str = "bf16"             # bf16 or fp32
    seed: int = 0
    known_share: float = 0.5            # share of pictures decoded with known pixels and a hole
    l1: float = 1.0                     # loss weights
    laplacian: float = 1.0
    perceptual: float = 1.0
    codebook: float = 1.0
    adversarial: float = 0.1
    feature_matching: float = 1.0
    adversarial_from: float = 0.2       # share of the training after which the discriminator joins
    freeze_tokens_from: float = 1.0     # share after which encoder and codebook stand still: stage 2 can start then
    restart_every: int = 100            # steps between two restarts of unused codes; none after freezing or 80 %
    discriminator_channels: int = 64
    discriminator_strided: int = 2
    perceptual_network: str = "squeezenet1_1"
    log_every: int = 50                 # steps
    save_every: int = 500               # steps between two last.pt
    sample_every: int = 2               # epochs between two validations with a picture grid
    val_pictures: int = 256

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accum_grad", "restart_every", "log_every", "save_every", "sample_every",
                     "val_pictures", "discriminator_channels", "discriminator_strided"):    # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("known_share", "adversarial_from", "freeze_tokens_from", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("warmup_steps", "seed", "l1", "laplacian", "perceptual", "codebook", "adversarial", "feature_matching"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")
        for name in ("learning_rate", "discriminator_rate", "grad_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass
class Run(StepCount):
    """Everything that a step needs."""

    config: TrainVQGANConfig
    accelerator: Accelerator
    vqgan: nn.Module
    discriminator: nn.Module
    ema: VQGAN
    optimizer: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    features: PerceptualFeatures | None
    pictures: FolderPictures | ShardPictures
    usage: Tensor    # (K,) how often each code was used since the last restart, all processes together

    @property
    def plain(self) -> VQGAN:
        return self.accelerator.unwrap_model(self.vqgan)


def draw_batch(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """This process's pictures and holes of one optimizer step; those of all processes are a function of (seed, step) alone.

    Returns (b, 3, H, W) in [-1, 1], mirrored half of the time, and (b, 1, H, W) holes, all ones where nothing is known;
    b = B / processes.
    """
    c, mine = run.config, slice(run.accelerator.process_index, None, run.accelerator.num_processes)
    generator = seeded(c.seed, "vqgan batch", step)
    mirrored = torch.rand(c.batch_size, 1, 1, 1, generator=generator) < 0.5
    known = torch.rand(c.batch_size, 1, 1, 1, generator=generator) < c.known_share
    image = to_float(run.pictures.batch(step))                                   # (b, 3, H, W)
    holes = random_holes(c.batch_size, image.shape[-1], generator) | ~known      # (B, 1, H, W)
    return torch.where(mirrored[mine], image.flip(3), image), holes[mine].float()


def reconstruction_terms(
    output: Tensor, image: Tensor, mask: Tensor, features: PerceptualFeatures | None
) -> dict[str, Tensor]:
    """L1 over hole and (lightly) known pixels, Laplacian pyramid and perceptual distance of the pasted picture."""
    weight = mask + 0.1                                                          # (B, 1, H, W)
    l1 = ((output - image).abs().mean(1, keepdim=True) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    pasted = torch.where(mask.bool(), output, image)
    terms = {"l1": l1.mean(), "laplacian": laplacian_distance(pasted, image)}
    if features is not None:
        with torch.no_grad():
            wanted = features(image)
        terms["perceptual"] = perceptual_distance(features(pasted), wanted).mean()
    return terms


def micro_step(run: Run, image: Tensor, mask: Tensor, adversarial: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Forward and backward of generator and discriminator on one micro-batch; gradients add up.

    Returns the terms, and how often each code was used, (K,).
    """
    c, accelerator = run.config, run.accelerator
    with accelerator.autocast():
        output, quantized = run.vqgan(image, mask)
        output = output.float()
        terms = reconstruction_terms(output, image, mask, run.features)
        terms["codebook"] = quantized.loss
        pasted = torch.where(mask.bool(), output, image)
        if adversarial:
            with frozen_discriminators(accelerator, run.discriminator) as (judge,):
                score, fake = judge(pasted)
                with torch.no_grad():
                    _, real = judge(image)
            terms["adversarial"] = -score.float().mean()
            terms["feature_matching"] = feature_matching(fake, real)
    terms["loss"] = sum(getattr(c, name) * term for name, term in terms.items())
    accelerator.backward(terms["loss"] / c.accum_grad)
    if adversarial:
        with accelerator.autocast():
            scores, _ = run.discriminator(torch.cat([image, pasted.detach()]))
            terms["discriminator"] = hinge_loss(*scores.float().chunk(2))
        accelerator.backward(terms["discriminator"] / c.accum_grad)
    used = torch.bincount(quantized.indices.flatten(), minlength=len(run.usage))
    return {name: term.detach() for name, term in terms.items()}, used


def train_step(run: Run, step: int, image: Tensor, mask: Tensor) -> dict[str, float]:
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
    optimizers = (run.optimizer, run.optimizer_d) if adversarial else (run.optimizer,)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    used = torch.zeros_like(run.usage)
    for micro in range(c.accum_grad):
        part = slice(micro, None, c.accum_grad)
        with local_gradients(accelerator, micro < c.accum_grad - 1, run.vqgan, run.discriminator):
            terms, count = micro_step(run, image[part], mask[part], adversarial)
        totals = {name: totals.get(name, 0) + term / c.accum_grad for name, term in terms.items()}
        used += count
    totals["gradient_norm"] = accelerator.clip_grad_norm_(run.vqgan.parameters(), c.grad_clip)
    if adversarial:
        totals["discriminator_gradient_norm"] = accelerator.clip_grad_norm_(run.discriminator.parameters(), c.grad_clip)
    values = average_over_processes(totals, accelerator)
    check_all_finite(values, step)
    for optimizer in optimizers:
        optimizer.step()
    update_ema(run.ema, run.plain, ema_decay_at(step, c.ema_decay))
    run.usage += accelerator.reduce(used, "sum")
    if (step + 1) % c.restart_every == 0:
        values["codes_used"] = (run.usage > 0).float().mean().item()
        restart_codes(run, image, step)
    return values | {"learning_rate": rate}


@torch.no_grad()
def restart_codes(run: Run, image: Tensor, step: int) -> None:
    """Unused codes move onto latents of this step's pictures, until tokens stand still or 80 % of the training are over."""
    c, accelerator = run.config, run.accelerator
    if step < min(c.freeze_tokens_from, 0.8) * run.total_steps:
        latents = accelerator.gather(run.plain.encoder(image))                   # (B, d, h, w), process by process
        latents = latents.unflatten(0, (accelerator.num_processes, -1)).transpose(0, 1)    # in the batch's order
        latents = latents.flatten(0, 1).permute(0, 2, 3, 1).flatten(0, 2)        # (B h w, d)
        run.plain.codebook.restart_dead(run.usage, latents, seeded(c.seed, "restart", step))
    run.usage.zero_()


def freeze_tokens(run: Run) -> None:
    """From here on a picture's tokens are final: the averaged encoder and codebook replace the trained ones."""
    for name in ("encoder", "codebook"):
        getattr(run.plain, name).load_state_dict(getattr(run.ema, name).state_dict())
        getattr(run.plain, name).requires_grad_(False)


@torch.no_grad()
def validate(run: Run, images: Tensor) -> dict[str, float]:
    """Scores of the averaged model on fixed pictures with fixed holes; every process takes a share of them."""
    c, accelerator = run.config, run.accelerator
    names = ("l1", "laplacian", *(["perceptual"] if run.features else []), "psnr")
    sums = {f"val_{kind}_{name}": torch.zeros((), device=accelerator.device) for kind in ("plain", "hole") for name in names}
    for image, hole in local_batches(accelerator, images, validation_holes(images, c.seed), batch_size=c.batch_size):
        image, hole = to_float(image), hole.float()
        for kind, mask in (("plain", torch.ones_like(hole)), ("hole", hole)):
            with accelerator.autocast():
                output = run.ema(image, mask)[0].float().clamp(-1, 1)
            terms = reconstruction_terms(output, image, mask, run.features)
            error = ((output - image).pow(2).mean(1, keepdim=True) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
            terms["psnr"] = 10 * torch.log10(4 / error.clamp_min(1e-10)).mean()
            for name in names:
                sums[f"val_{kind}_{name}"] += terms[name] * len(image) / len(images) * accelerator.num_processes
    scores = average_over_processes(sums, accelerator)
    scores["val_loss"] = sum(value for name, value in scores.items() if not name.endswith("psnr"))
    return scores


def validation_holes(images: Tensor, seed: int) -> Tensor:
    return random_holes(len(images), images.shape[-1], seeded(seed, "validation holes"))


@torch.no_grad()
def write_reconstructions(run: Run, images: Tensor, path: Path) -> None:
    """A grid of 16 validation pictures: as they are, decoded with nothing known, with their holes, decoded and pasted."""
    device = run.accelerator.device
    image, hole = to_float(images[:16]).to(device), validation_holes(images, run.config.seed)[:16].to(device)
    with run.accelerator.autocast():
        plain, filled = (run.ema(image, mask.float())[0].float().clamp(-1, 1) for mask in (torch.ones_like(hole), hole))
    rows = [image, plain, image.masked_fill(hole, 0), torch.where(hole, filled, image)]
    with atomic_write(path) as temporary:
        save_image(torch.cat(rows).cpu(), temporary, format="png", nrow=len(image), value_range=(-1, 1), normalize=True)


def state_of(run: Run, configs: dict) -> dict:
    return {
        "kind": KIND, "config": configs, "model": run.plain.state_dict(), "ema": run.ema.state_dict(),
        "discriminator": run.accelerator.unwrap_model(run.discriminator).state_dict(),
        "optimizer": run.optimizer.state_dict(), "optimizer_d": run.optimizer_d.state_dict(), "usage": run.usage,
    }    # fmt: skip


def restore(run: Run, state: dict) -> None:
    run.plain.load_state_dict(state["model"])
    run.ema.load_state_dict(state["ema"])
    run.accelerator.unwrap_model(run.discriminator).load_state_dict(state["discriminator"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.optimizer_d.load_state_dict(state["optimizer_d"])
    run.usage.copy_(state["usage"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    flag = parser.add_argument
    flag("--train-pictures", type=int, help="pictures in the shards (default: counted from their headers)")
    flag("--workers", type=int, default=0, help="processes that read shards ahead (default: none)")
    flag("--perceptual-weights", help="file with the perceptual network's weights (default: torchvision downloads them)")
    return parser.parse_args(argv)


def load_features(config: TrainVQGANConfig, weights: str | None) -> PerceptualFeatures | None:
    """The perceptual network; without weights a notice, and the Laplacian pyramid stands alone."""
    try:
        return PerceptualFeatures(config.perceptual_network, weights)
    except OSError as error:
        print(
            f"notice: no weights for {config.perceptual_network} ({error}); training without the perceptual term. "
            "Give them with --perceptual-weights FILE.", file=sys.stderr,
        )    # fmt: skip
        return None
    except ValueError as error:
        raise UserError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sections = load_sections(args)
    model_config = build_config(VQGANConfig, sections.get("vqgan", {}), "vqgan")
    config = build_config(TrainVQGANConfig, with_flags(sections.get("train_vqgan", {}), args), "train_vqgan")
    check_size("vqgan", model_config, lambda: VQGAN(model_config))
    check_size("train_vqgan", config, lambda: build_discriminator(config))
    configs = {"vqgan": asdict(model_config), "train_vqgan": asdict(config)}
    # Frozen tokens: DistributedDataParallel must look for parameters without a gradient.
    accelerator = start_accelerator(args.device, config.precision, find_unused_parameters=config.freeze_tokens_from < 1)
    with errors_told_once(accelerator, args.output_dir):
        check_split(config.batch_size, config.accum_grad, accelerator)
        folder = on_main(accelerator, lambda: writable_folder(args.output_dir))
        pictures = open_pictures(args, model_config.image_size, config, accelerator)
        val_images = load_folder(args.val_dir, model_config.image_size, args.bad_images)[: config.val_pictures]
        run = build_run(model_config, config, accelerator, pictures, args.perceptual_weights)
        return run_training(run, val_images, folder, args, configs)


def run_training(run: Run, val_images: Tensor, folder: Path, args: argparse.Namespace, configs: dict) -> int:
    c, accelerator = run.config, run.accelerator
    pictures = len(run.pictures)
    progress = resume_run(folder, KIND, args.resume, accelerator, configs, pictures, lambda state: restore(run, state))
    batches = Ahead(lambda step: draw_batch(run, step), threads=accelerator.device.type == "cuda")

    def step_(step: int) -> dict[str, float]:
        return train_step(run, step, *(x.to(accelerator.device) for x in batches(step)))

    def validate_(epoch: int) -> dict[str, float] | None:
        if not is_due(epoch, c.sample_every, c.epochs):
            return None
        if accelerator.is_main_process:
            write_reconstructions(run, val_images, folder / f"samples_{epoch * run.per_epoch:07d}.png")
        return validate(run, val_images)

    return training_loop(
        c, accelerator, folder, progress, per_epoch=run.per_epoch, on_nan=args.on_nan,
        train_step=step_, validate=validate_, state=lambda: state_of(run, configs),
    )    # fmt: skip


def build_discriminator(c: TrainVQGANConfig) -> PatchDiscriminator:
    return PatchDiscriminator(c.discriminator_channels, c.discriminator_strided)


def build_run(
    model_config: VQGANConfig, c: TrainVQGANConfig, accelerator: Accelerator, pictures: Any, weights: str | None
) -> Run:
    """Models, optimizers and losses, on their device."""
    torch.manual_seed(c.seed)
    vqgan = VQGAN(model_config).to(memory_format=torch.channels_last)
    discriminator = build_discriminator(c)
    ema = copy.deepcopy(vqgan).eval().requires_grad_(False).to(accelerator.device)
    features = load_features(c, weights)
    features = features.place(accelerator.device) if features else None
    vqgan, discriminator = accelerator.prepare(vqgan, discriminator.to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW(vqgan.parameters(), lr=c.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=c.discriminator_rate, betas=(0.5, 0.99), weight_decay=0.0)
    usage = torch.zeros(model_config.codebook_size, device=accelerator.device)
    return Run(c, accelerator, vqgan, discriminator, ema, optimizer, optimizer_d, features, pictures, usage)


if __name__ == "__main__":
    run_cli(main)
