"""Train the VQGAN (stage 1): pictures to tokens and back.

CPU, one minute:  python training_vqgan.py --config configs/tiny.yml --train-dir PICTURES --val-dir PICTURES --output-dir runs/vqgan
One GPU:          python training_vqgan.py --config configs/cat64.yml --train-dir PICTURES --val-dir PICTURES --output-dir runs/vqgan
Several GPUs:     accelerate launch training_vqgan.py ...   (the same flags; the batch is split over the processes)

Losses: L1 + Laplacian pyramid + perceptual + codebook, and from `adversarial_from` on a hinge GAN with feature matching
(Esser et al. 2021, section 3.1, with a fixed weight). Half of the pictures are decoded with nothing known, the others with
everything known but a random hole; those are pasted into the picture before the perceptual and adversarial terms, which
therefore judge what a person will see: the hole and its seam.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

import utils
from data import load_folder, random_holes, to_float
from models.discriminator import PatchDiscriminator, feature_matching, hinge_loss
from models.perceptual import PerceptualFeatures, laplacian_distance, perceptual_distance
from models.vqgan import VQGAN, VQGANConfig

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
        for name in ("epochs", "batch_size", "accum_grad", "restart_every", "log_every", "save_every", "sample_every", "val_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("known_share", "adversarial_from", "freeze_tokens_from", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")
        if self.learning_rate <= 0 or self.discriminator_rate <= 0 or self.grad_clip <= 0:
            raise ValueError("learning_rate, discriminator_rate and grad_clip must be above 0")


@dataclass
class Run:
    """Everything that a step needs."""

    config: TrainVQGANConfig
    accelerator: Accelerator
    vqgan: nn.Module
    discriminator: nn.Module
    ema: VQGAN
    optimizer: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    features: PerceptualFeatures | None
    total_steps: int
    usage: Tensor    # (K,) how often each code was used since the last restart, all processes together

    @property
    def plain(self) -> VQGAN:
        return self.accelerator.unwrap_model(self.vqgan)


def draw_batch(images: Tensor, step: int, config: TrainVQGANConfig) -> tuple[Tensor, Tensor]:
    """The pictures and holes of one optimizer step, a function of (seed, step) alone.

    Returns (B, 3, H, W) in [-1, 1], mirrored half of the time, and (B, 1, H, W) holes, all ones where nothing is known.
    """
    per_epoch = len(images) // config.batch_size
    epoch, k = divmod(step, per_epoch)
    chosen = utils.epoch_order(len(images), config.seed, epoch)[k * config.batch_size : (k + 1) * config.batch_size]
    generator = utils.seeded(config.seed, "vqgan batch", step)
    mirrored = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
    known = torch.rand(len(chosen), 1, 1, 1, generator=generator) < config.known_share
    batch = to_float(images[chosen])                                             # (B, 3, H, W)
    batch = torch.where(mirrored, batch.flip(3), batch)
    holes = random_holes(len(chosen), images.shape[-1], generator) | ~known      # (B, 1, H, W)
    return batch, holes.float()


def reconstruction_terms(output: Tensor, image: Tensor, mask: Tensor, features: PerceptualFeatures | None) -> dict[str, Tensor]:
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


def micro_step(run: Run, image: Tensor, mask: Tensor, adversarial: bool) -> dict[str, float]:
    """Forward and backward of generator and discriminator on one micro-batch; gradients add up."""
    c, accelerator = run.config, run.accelerator
    with accelerator.autocast():
        output, quantized = run.vqgan(image, mask)
        output = output.float()
        terms = reconstruction_terms(output, image, mask, run.features)
        terms["codebook"] = quantized.loss
        pasted = torch.where(mask.bool(), output, image)
        if adversarial:
            run.discriminator.requires_grad_(False)
            score, fake = run.discriminator(pasted)
            with torch.no_grad():
                _, real = run.discriminator(image)
            terms["adversarial"] = -score.float().mean()
            terms["feature_matching"] = feature_matching(fake, real)
            run.discriminator.requires_grad_(True)
    loss = sum(getattr(c, name) * term for name, term in terms.items())
    run.usage += torch.bincount(accelerator.gather(quantized.indices).flatten(), minlength=len(run.usage)).to(run.usage)
    utils.check_finite(loss, "loss")
    accelerator.backward(loss / c.accum_grad)
    if adversarial:
        with accelerator.autocast():
            scores, _ = run.discriminator(torch.cat([image, pasted.detach()]))
            terms["discriminator"] = hinge_loss(*scores.float().chunk(2))
        utils.check_finite(terms["discriminator"], "discriminator loss")
        accelerator.backward(terms["discriminator"] / c.accum_grad)
    return {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}


def train_step(run: Run, images: Tensor, step: int) -> dict[str, float]:
    """One optimizer step. Returns the terms, averaged over micro-batches and processes."""
    c, accelerator = run.config, run.accelerator
    adversarial = step >= c.adversarial_from * run.total_steps
    frozen = step >= c.freeze_tokens_from * run.total_steps
    if frozen and run.plain.codebook.embedding.weight.requires_grad:
        freeze_tokens(run)
    rate = utils.cosine_rate(step, run.total_steps, c.learning_rate, c.warmup_steps)
    utils.set_rate(run.optimizer, rate)
    image, mask = (x.to(accelerator.device) for x in draw_batch(images, step, c))
    parts = accelerator.num_processes * c.accum_grad
    totals: dict[str, float] = {}
    for micro in range(c.accum_grad):
        mine = slice(micro * accelerator.num_processes + accelerator.process_index, None, parts)
        for name, value in micro_step(run, image[mine], mask[mine], adversarial).items():
            totals[name] = totals.get(name, 0.0) + value / c.accum_grad
    norm = accelerator.clip_grad_norm_(run.vqgan.parameters(), c.grad_clip)
    utils.check_finite(norm, "gradient")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if adversarial:
        norm_d = accelerator.clip_grad_norm_(run.discriminator.parameters(), c.grad_clip)
        utils.check_finite(norm_d, "discriminator gradient")
        run.optimizer_d.step()
        run.optimizer_d.zero_grad(set_to_none=True)
    utils.update_ema(run.ema, run.plain, utils.ema_decay_at(step, c.ema_decay))
    totals = utils.average_over_processes(totals, accelerator)
    totals["learning_rate"] = rate
    if (step + 1) % c.restart_every == 0:
        totals["codes_used"] = (run.usage > 0).float().mean().item()
        if not frozen and step < 0.8 * run.total_steps:
            restart_codes(run, image, step)
        run.usage.zero_()
    return totals


@torch.no_grad()
def restart_codes(run: Run, image: Tensor, step: int) -> None:
    """Unused codes move onto latents of this step's pictures; every process holds the whole batch, so all agree."""
    latents = run.plain.encoder(image)                                           # (B, d, h, w)
    latents = latents.permute(0, 2, 3, 1).flatten(0, 2)                          # (B h w, d)
    run.plain.codebook.restart_dead(run.usage, latents, utils.seeded(run.config.seed, "restart", step))


def freeze_tokens(run: Run) -> None:
    """From here on a picture's tokens are final: the averaged encoder and codebook replace the trained ones."""
    for name in ("encoder", "codebook"):
        getattr(run.plain, name).load_state_dict(getattr(run.ema, name).state_dict())
        getattr(run.plain, name).requires_grad_(False)


@torch.no_grad()
def validate(run: Run, images: Tensor, path: Path) -> dict[str, float]:
    """The averaged model on fixed pictures with fixed holes; writes a grid: picture, plain decode, pasted hole decode."""
    c, device = run.config, run.accelerator.device
    holes = random_holes(len(images), images.shape[-1], utils.seeded(c.seed, "validation holes")).float()
    sums: dict[str, float] = {}
    rows = []
    for start in range(0, len(images), c.batch_size):
        image = to_float(images[start : start + c.batch_size]).to(device)
        hole = holes[start : start + c.batch_size].to(device)
        for kind, mask in (("plain", torch.ones_like(hole)), ("hole", hole)):
            with run.accelerator.autocast():
                output = run.ema(image, mask)[0].float().clamp(-1, 1)
            terms = reconstruction_terms(output, image, mask, run.features)
            error = ((output - image).pow(2).mean(1, keepdim=True) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
            terms["psnr"] = 10 * torch.log10(4 / error.clamp_min(1e-10)).mean()
            for name, term in terms.items():
                key = f"val_{kind}_{name}"
                sums[key] = sums.get(key, 0.0) + term.item() * len(image) / len(images)
            if start == 0:
                rows.append(torch.where(mask.bool(), output, image)[:16])
        if start == 0:
            rows = [image[:16], rows[0], torch.where(hole[:16].bool(), 0.0, image[:16]), rows[1]]
    sums["val_loss"] = sum(sums[f"val_{k}_{n}"] for k in ("plain", "hole") for n in ("l1", "laplacian", "perceptual") if f"val_{k}_{n}" in sums)
    save_image(torch.cat(rows).cpu(), path, nrow=len(rows[0]), value_range=(-1, 1), normalize=True)
    return sums


def state_of(run: Run, step: int, best: float, configs: dict) -> dict:
    return {
        "kind": KIND, "step": step, "best": best, "config": configs,
        "model": run.plain.state_dict(), "ema": run.ema.state_dict(),
        "discriminator": run.accelerator.unwrap_model(run.discriminator).state_dict(),
        "optimizer": run.optimizer.optimizer.state_dict(), "optimizer_d": run.optimizer_d.optimizer.state_dict(),
        "usage": run.usage,
    }    # fmt: skip


def restore(run: Run, state: dict, configs: dict) -> None:
    utils.check_same_config(state["config"], configs, run.config)
    run.plain.load_state_dict(state["model"])
    run.ema.load_state_dict(state["ema"])
    run.accelerator.unwrap_model(run.discriminator).load_state_dict(state["discriminator"])
    run.optimizer.optimizer.load_state_dict(state["optimizer"])
    run.optimizer_d.optimizer.load_state_dict(state["optimizer_d"])
    run.usage.copy_(state["usage"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_training_flags(parser, "configs/cat64.yml")
    parser.add_argument("--perceptual-weights", help="file with the perceptual network's weights (default: torchvision downloads them)")
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
        raise utils.UserError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sections = utils.load_config(args.config, args.set)
    model_config = utils.build_config(VQGANConfig, sections.get("vqgan", {}), "vqgan")
    config = utils.build_config(TrainVQGANConfig, utils.with_flags(sections.get("train_vqgan", {}), args), "train_vqgan")
    configs = {"vqgan": asdict(model_config), "train_vqgan": asdict(config)}
    accelerator = utils.make_accelerator(args.device, config.precision, [DistributedDataParallelKwargs(find_unused_parameters=True)])
    utils.check_split(config.batch_size, config.accum_grad, accelerator)
    folder = utils.writable_folder(args.output_dir)

    images = torch.cat([load_folder(path, model_config.image_size, args.bad_images) for path in args.train_dir])
    val_images = load_folder(args.val_dir, model_config.image_size, args.bad_images)[: config.val_pictures]
    if len(images) < config.batch_size:
        raise utils.UserError(f"{len(images)} training pictures are fewer than one batch ({config.batch_size}); lower --batch-size")

    torch.manual_seed(config.seed)
    vqgan = VQGAN(model_config).to(memory_format=torch.channels_last)
    discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_strided).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vqgan.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=config.discriminator_rate, betas=(0.5, 0.99), weight_decay=0.0)
    ema = copy.deepcopy(vqgan).eval().requires_grad_(False).to(accelerator.device)
    features = load_features(config, args.perceptual_weights)
    features = features.to(accelerator.device, memory_format=torch.channels_last) if features else None
    vqgan, discriminator, optimizer, optimizer_d = accelerator.prepare(vqgan, discriminator, optimizer, optimizer_d)

    per_epoch = len(images) // config.batch_size
    usage = torch.zeros(model_config.codebook_size, device=accelerator.device)
    run = Run(config, accelerator, vqgan, discriminator, ema, optimizer, optimizer_d, features, config.epochs * per_epoch, usage)
    step, best = 0, float("inf")
    if state := utils.find_resume(folder, args.resume, KIND):
        restore(run, state, configs)
        step, best = state["step"], state["best"]
    return train(run, images, val_images, folder, step, best, configs)


def train(run: Run, images: Tensor, val_images: Tensor, folder: Path, step: int, best: float, configs: dict) -> int:
    c, accelerator = run.config, run.accelerator
    per_epoch = len(images) // c.batch_size
    logger = utils.Logger(folder, step, accelerator.is_main_process)
    progress = tqdm(total=run.total_steps * c.batch_size, initial=step * c.batch_size, unit="img", disable=not accelerator.is_main_process)
    with utils.StopRequest() as stop:
        while step < run.total_steps and not stop.signal:
            started = time.perf_counter()
            torch.manual_seed(utils.seeded(c.seed, "step", step, accelerator.process_index).initial_seed())
            values = train_step(run, images, step)
            step += 1
            progress.update(c.batch_size)
            progress.set_postfix(loss=f"{values['loss']:.3f}", rate=f"{values['learning_rate']:.1e}")
            if step % c.log_every == 0 or "codes_used" in values:
                logger.log(step, **values)
            if (step % (per_epoch * c.sample_every) == 0 or step == run.total_steps) and accelerator.is_main_process:
                scores = validate(run, val_images, folder / f"samples_{step:07d}.png")
                logger.log(step, **scores)
                tqdm.write(json.dumps({"step": step, "images/s": round(c.batch_size / (time.perf_counter() - started), 1)} | {k: round(v, 4) for k, v in scores.items()}))
                if scores["val_loss"] < best:
                    best = scores["val_loss"]
                    utils.save_checkpoint(folder / "best.pt", state_of(run, step, best, configs))
            if (step % c.save_every == 0 or step == run.total_steps or stop.signal) and accelerator.is_main_process:
                utils.save_last(folder, state_of(run, step, best, configs))
            accelerator.wait_for_everyone()
    logger.close()
    progress.close()
    if stop.signal:
        print(f"stopped by signal {stop.signal} after step {step}; continue with --resume auto", file=sys.stderr)
    return stop.exit_code


if __name__ == "__main__":
    utils.run_cli(main)
