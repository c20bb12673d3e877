"""Finish the decoder on sampled tokens (after stage 2): a completed hole is made of predictions, not of true tokens.

    python training_finish.py --model runs/maskgit/maskgit.safetensors --vqgan runs/vqgan/last.pt ...

(the other flags are those of the two stages: --config, --train-dir, --val-dir, --output-dir, ...)

Encoder, codebook and transformer stand still; the decoder and its discriminator go on from stage 1 (`--vqgan`). Half of
every batch keeps its true tokens and the losses of stage 1, so that the decoder forgets nothing; the other half gets its
hole's tokens from the transformer in a few rounds, and learns to make them look real (adversarial, feature matching) and to
join the known pixels. The finished model, all parts in one file, is OUTPUT/maskgit.safetensors.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

import utils
from data import load_folder, random_holes, to_float
from models.discriminator import PatchDiscriminator, feature_matching, hinge_loss
from models.maskgit import MaskGIT
from models.perceptual import PerceptualFeatures, laplacian_distance, perceptual_distance

KIND = "finish-training"


@dataclass
class FinishConfig:
    epochs: int = 5
    batch_size: int = 32                # pictures per optimizer step; half of them with sampled tokens
    learning_rate: float = 1e-4         # peak; falls along a half cosine
    discriminator_rate: float = 1e-4    # constant
    warmup_steps: int = 50
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    precision: str = "bf16"             # bf16 or fp32
    seed: int = 0
    rounds: int = 3                     # decoding rounds that make the sampled tokens
    temperature: float = 1.0            # of the sampling
    l1: float = 1.0                     # loss weights, true tokens
    laplacian: float = 1.0
    perceptual: float = 1.0
    sampled_l1: float = 0.3             # loss weights, sampled tokens: the truth is one answer of many
    sampled_perceptual: float = 0.5
    adversarial: float = 0.1            # both
    feature_matching: float = 1.0
    discriminator_channels: int = 64    # as in stage 1
    discriminator_strided: int = 2
    perceptual_network: str = "squeezenet1_1"
    log_every: int = 50
    save_every: int = 200
    val_pictures: int = 256

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "rounds", "log_every", "save_every", "val_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % 2:
            raise ValueError(f"batch_size must be even (half true, half sampled tokens), got {self.batch_size}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")
        if self.learning_rate <= 0 or self.discriminator_rate <= 0 or self.grad_clip <= 0:
            raise ValueError("learning_rate, discriminator_rate and grad_clip must be above 0")


@dataclass
class Run:
    """Everything that a step needs."""

    config: FinishConfig
    accelerator: Accelerator
    model: MaskGIT
    decoder: nn.Module    # model.vqgan.decoder, the only part that learns
    discriminator: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    features: PerceptualFeatures
    total_steps: int


def draw_batch(images: Tensor, step: int, c: FinishConfig) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) in [-1, 1] and holes (B, 1, H, W) of one step, a function of (seed, step) alone."""
    epoch, k = divmod(step, len(images) // c.batch_size)
    chosen = utils.epoch_order(len(images), c.seed, epoch)[k * c.batch_size : (k + 1) * c.batch_size]
    generator = utils.seeded(c.seed, "finish batch", step)
    mirrored = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
    batch = to_float(images[chosen])
    return torch.where(mirrored, batch.flip(3), batch), random_holes(len(chosen), images.shape[-1], generator).float()


@torch.no_grad()
def mixed_tokens(run: Run, image: Tensor, mask: Tensor, step: int) -> Tensor:
    """True tokens for the first half of the batch, sampled ones in the holes of the second: (B, N)."""
    c, half = run.config, len(image) // 2
    seeds = [utils.seeded(c.seed, "finish sample", step, i).initial_seed() for i in range(len(image) - half)]
    with run.accelerator.autocast():
        rounds = run.model.complete_tokens(
            image[half:], mask[half:], seeds, total_iter=c.rounds, temperature=c.temperature
        )
    return torch.cat([run.model.vqgan.encode(image[:half]), rounds[-1].tokens])


def hole_l1(output: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error, the hole counting ten times as much as the known pixels."""
    weight = mask + 0.1                                                          # (B, 1, H, W)
    return (((output - image).abs().mean(1, keepdim=True) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))).mean()


def generator_terms(run: Run, image: Tensor, mask: Tensor, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The weighted terms of the decoder's loss, and the completed pictures."""
    c, half, grid = run.config, len(image) // 2, run.model.vqgan.config.grid
    z_q = run.model.vqgan.codebook.lookup(tokens.view(-1, grid, grid))           # (B, d, h, w)
    output = run.decoder(z_q, image, mask).float()                               # (B, 3, H, W)
    pasted = torch.where(mask.bool(), output, image)
    with torch.no_grad():
        wanted = run.features(image)
        _, real = run.discriminator(image)
    distance = perceptual_distance(run.features(pasted), wanted)                 # (B,)
    run.discriminator.requires_grad_(False)
    score, fake = run.discriminator(pasted)
    run.discriminator.requires_grad_(True)
    terms = {
        "l1": c.l1 * hole_l1(output[:half], image[:half], mask[:half]),
        "laplacian": c.laplacian * laplacian_distance(pasted[:half], image[:half]),
        "perceptual": c.perceptual * distance[:half].mean(),
        "sampled_l1": c.sampled_l1 * hole_l1(output[half:], image[half:], mask[half:]),
        "sampled_perceptual": c.sampled_perceptual * distance[half:].mean(),
        "adversarial": -c.adversarial * score.float().mean(),
        "feature_matching": c.feature_matching * feature_matching(fake, real),
    }
    return terms, pasted


def train_step(run: Run, images: Tensor, step: int) -> dict[str, float]:
    c, accelerator = run.config, run.accelerator
    utils.set_rate(run.optimizer, utils.cosine_rate(step, run.total_steps, c.learning_rate, c.warmup_steps))
    image, mask = (x.to(accelerator.device) for x in draw_batch(images, step, c))
    tokens = mixed_tokens(run, image, mask, step)
    with accelerator.autocast():
        terms, pasted = generator_terms(run, image, mask, tokens)
    loss = sum(terms.values())
    utils.check_finite(loss, "loss")
    accelerator.backward(loss)
    with accelerator.autocast():
        scores, _ = run.discriminator(torch.cat([image, pasted.detach()]))
        loss_d = hinge_loss(*scores.float().chunk(2))
    utils.check_finite(loss_d, "discriminator loss")
    accelerator.backward(loss_d)
    for module, optimizer in ((run.decoder, run.optimizer), (run.discriminator, run.optimizer_d)):
        utils.check_finite(accelerator.clip_grad_norm_(module.parameters(), c.grad_clip), "gradient")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    utils.update_ema(run.ema, run.decoder, utils.ema_decay_at(step, c.ema_decay))
    return {"loss": loss.item(), "discriminator": loss_d.item()} | {name: term.item() for name, term in terms.items()}


@torch.no_grad()
def validate(run: Run, images: Tensor, path: Path) -> dict[str, float]:
    """The averaged decoder on fixed pictures and holes, with true and with sampled tokens; writes a grid."""
    c, model = run.config, run.model
    learned, model.vqgan.decoder = model.vqgan.decoder, run.ema
    holes = random_holes(len(images), images.shape[-1], utils.seeded(c.seed, "validation holes")).float()
    sums = dict.fromkeys(("val_true_perceptual", "val_true_psnr", "val_sampled_perceptual", "val_sampled_psnr"), 0.0)
    for start in range(0, len(images), c.batch_size):
        image = to_float(images[start : start + c.batch_size]).to(model.device)
        mask = holes[start : start + c.batch_size].to(model.device)
        with run.accelerator.autocast():
            true = model.decode(model.vqgan.encode(image), image, mask)
            sampled = model.complete(image, mask, range(start, start + len(image)), total_iter=8).images
        for name, output in (("true", true), ("sampled", sampled)):
            pasted = torch.where(mask.bool(), output, image)
            error = ((pasted - image).pow(2).mean(1, keepdim=True) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
            distance = perceptual_distance(run.features(pasted), run.features(image), mask)
            sums[f"val_{name}_psnr"] += (10 * torch.log10(4 / error.clamp_min(1e-10))).sum().item() / len(images)
            sums[f"val_{name}_perceptual"] += distance.sum().item() / len(images)
            if start == 0 and name == "sampled":
                rows = [image[:12], image[:12] * (1 - mask[:12]), pasted[:12]]
                save_image(torch.cat(rows).cpu(), path, nrow=12, value_range=(-1, 1), normalize=True)
    model.vqgan.decoder = learned
    return sums


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_training_flags(parser, "configs/cat64.yml")
    parser.add_argument("--model", required=True, help="the model of stage 2 (maskgit.safetensors)")
    parser.add_argument("--vqgan", required=True, help="stage-1 checkpoint (last.pt) with decoder and discriminator")
    parser.add_argument("--perceptual-weights", help="file with the perceptual network's weights")
    return parser.parse_args(argv)


def load_parts(args: argparse.Namespace, config: FinishConfig) -> tuple[MaskGIT, PatchDiscriminator]:
    """The model of stage 2 with the decoder of stage 1, which must have been trained on the same tokens."""
    try:
        model = MaskGIT.from_file(args.model)
    except ValueError as error:
        raise utils.UserError(str(error)) from error
    if not model.vqgan.conditioned:
        raise utils.UserError("the finish needs the conditioned decoder; this model has the reference decoder")
    state = utils.load_checkpoint(args.vqgan, "vqgan-training")
    saved, own = state["ema"], model.vqgan.state_dict()
    for name, value in own.items():
        # The model file holds half precision, so the comparison is made there too.
        if not name.startswith("decoder") and not torch.equal(saved[name].half(), value.half()):
            raise utils.UserError(f"{args.vqgan} has other tokens than {args.model}: {name} differs; give its own VQGAN")
    model.vqgan.load_state_dict(saved)
    discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_strided)
    discriminator.load_state_dict(state["discriminator"])
    return model, discriminator


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    section = utils.load_config(args.config, args.set).get("train_finish", {})
    section = {k: v for k, v in utils.with_flags(section, args).items() if k != "accum_grad"}
    config = utils.build_config(FinishConfig, section, "train_finish")
    accelerator = utils.make_accelerator(args.device, config.precision)
    folder = utils.writable_folder(args.output_dir)
    model, discriminator = load_parts(args, config)
    images = torch.cat([load_folder(path, model.image_size, args.bad_images) for path in args.train_dir])
    val_images = load_folder(args.val_dir, model.image_size, args.bad_images)[: config.val_pictures]
    if len(images) < config.batch_size:
        raise utils.UserError(f"{len(images)} training pictures are fewer than one batch ({config.batch_size})")

    model.requires_grad_(False).eval().to(accelerator.device, memory_format=torch.channels_last)
    decoder = model.vqgan.decoder.requires_grad_(True)
    ema = copy.deepcopy(decoder).requires_grad_(False)
    discriminator = discriminator.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=config.discriminator_rate, betas=(0.5, 0.99))
    try:
        features = PerceptualFeatures(config.perceptual_network, args.perceptual_weights)
    except (OSError, ValueError) as error:
        raise utils.UserError(f"no perceptual weights ({error}); give them with --perceptual-weights FILE") from error
    features = features.to(accelerator.device, memory_format=torch.channels_last)
    decoder, discriminator, optimizer, optimizer_d = accelerator.prepare(decoder, discriminator, optimizer, optimizer_d)
    total = config.epochs * (len(images) // config.batch_size)
    run = Run(config, accelerator, model, decoder, discriminator, ema, optimizer, optimizer_d, features, total)
    step = 0
    if state := utils.find_resume(folder, args.resume, KIND):
        step = restore(run, state, config)
    return train(run, images, val_images, folder, step)


def state_of(run: Run, step: int) -> dict:
    return {
        "kind": KIND, "step": step, "config": {"train_finish": asdict(run.config)},
        "decoder": run.accelerator.unwrap_model(run.decoder).state_dict(), "ema": run.ema.state_dict(),
        "discriminator": run.accelerator.unwrap_model(run.discriminator).state_dict(),
        "optimizer": run.optimizer.optimizer.state_dict(), "optimizer_d": run.optimizer_d.optimizer.state_dict(),
    }    # fmt: skip


def restore(run: Run, state: dict, config: FinishConfig) -> int:
    utils.check_same_config(state["config"], {"train_finish": asdict(config)})
    run.accelerator.unwrap_model(run.decoder).load_state_dict(state["decoder"])
    run.accelerator.unwrap_model(run.discriminator).load_state_dict(state["discriminator"])
    run.ema.load_state_dict(state["ema"])
    run.optimizer.optimizer.load_state_dict(state["optimizer"])
    run.optimizer_d.optimizer.load_state_dict(state["optimizer_d"])
    return state["step"]


def save_model(run: Run, folder: Path, step: int) -> None:
    """The finished model: everything as in stage 2, with the averaged decoder."""
    learned, run.model.vqgan.decoder = run.model.vqgan.decoder, run.ema
    run.model.save_file(folder / "maskgit.safetensors", finish_steps=str(step))
    run.model.vqgan.decoder = learned


def train(run: Run, images: Tensor, val_images: Tensor, folder: Path, step: int) -> int:
    c, accelerator = run.config, run.accelerator
    per_epoch = len(images) // c.batch_size
    logger = utils.Logger(folder, step, accelerator.is_main_process)
    progress = tqdm(total=run.total_steps * c.batch_size, initial=step * c.batch_size, unit="img")
    started, seen = time.perf_counter(), 0
    with utils.StopRequest() as stop:
        while step < run.total_steps and not stop.signal:
            values = train_step(run, images, step)
            step, seen = step + 1, seen + c.batch_size
            progress.update(c.batch_size)
            progress.set_postfix(loss=f"{values['loss']:.3f}")
            if step % c.log_every == 0:
                logger.log(step, **values)
            if step % per_epoch == 0 or step == run.total_steps:
                scores = validate(run, val_images, folder / f"samples_{step:07d}.png")
                logger.log(step, **scores)
                speed = round(seen / (time.perf_counter() - started), 1)
                tqdm.write(json.dumps({"step": step, "images/s": speed} | {k: round(v, 4) for k, v in scores.items()}))
                save_model(run, folder, step)
                started, seen = time.perf_counter(), 0
            if step % c.save_every == 0 or step == run.total_steps or stop.signal:
                utils.save_last(folder, state_of(run, step))
    logger.close()
    progress.close()
    if stop.signal:
        print(f"stopped by signal {stop.signal} after step {step}; continue with --resume auto", file=sys.stderr)
    return stop.exit_code


if __name__ == "__main__":
    utils.run_cli(main)
