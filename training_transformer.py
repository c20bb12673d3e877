"""Train the masked-token transformer (stage 2) on the tokens of a frozen VQGAN.

CPU, one minute:  python training_transformer.py --config configs/tiny.yml --vqgan runs/vqgan/last.pt --train-dir PICTURES --val-dir PICTURES --output-dir runs/maskgit
One GPU:          python training_transformer.py --config configs/cat64.yml --vqgan runs/vqgan/last.pt --train-dir PICTURES --val-dir PICTURES --output-dir runs/maskgit
Several GPUs:     accelerate launch training_transformer.py ...   (the same flags; the batch is split over the processes)

Masked visual token modelling (Chang et al. 2022, section 3.1): hide some tokens, predict them, cross-entropy. The training
set is encoded once, with its mirror images; no encoder runs while the transformer learns. Which tokens are hidden: see
`draw_masks`. The finished model, both stages in one file, is OUTPUT/maskgit.safetensors.
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
from models.decoding import lowest
from models.maskgit import MaskGIT, patch_pixels, pixel_to_token_mask
from models.schedule import SCHEDULES, gamma
from models.transformer import TransformerConfig
from models.vqgan import VQGAN, VQGANConfig

KIND = "transformer-training"


@dataclass
class TrainTransformerConfig:
    epochs: int = 300
    batch_size: int = 64               # pictures per optimizer step, over all processes and accumulation
    accum_grad: int = 1                # micro-batches per optimizer step
    learning_rate: float = 5e-4        # peak
    warmup_steps: int = 500            # optimizer steps
    rate_schedule: str = "cosine"      # cosine: half a cosine down to 0; plateau: x 0.1 when validation stops improving
    plateau_patience: int = 10         # epochs without improvement before the rate falls
    weight_decay: float = 0.03
    grad_clip: float = 1.0             # largest gradient norm
    label_smoothing: float = 0.0
    ema_decay: float = 0.999
    precision: str = "bf16"            # bf16 or fp32
    seed: int = 0
    mirror: bool = True                # train on mirror images too
    hole_share: float = 0.6            # share of pictures whose hidden tokens lie in a hole-shaped mask
    full_share: float = 0.15           # share of pictures of which nothing is known; the rest: tokens scattered at random
    mask_schedule: str = "cosine"      # gamma of the share hidden inside holes and of unknown pictures
    log_every: int = 50                # steps
    save_every: int = 500              # steps between two last.pt
    sample_every: int = 5              # epochs between two grids of completions
    val_pictures: int = 512

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accum_grad", "log_every", "save_every", "sample_every", "val_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("hole_share", "full_share", "ema_decay", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.hole_share + self.full_share > 1 + 1e-9:
            raise ValueError(f"hole_share + full_share must not exceed 1, got {self.hole_share + self.full_share}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")
        if self.rate_schedule not in ("cosine", "plateau"):
            raise ValueError(f"rate_schedule must be cosine or plateau, got {self.rate_schedule!r}")
        if self.mask_schedule not in SCHEDULES:
            raise ValueError(f"unknown mask_schedule {self.mask_schedule!r}; expected one of {', '.join(SCHEDULES)}")
        if self.learning_rate <= 0 or self.grad_clip <= 0:
            raise ValueError("learning_rate and grad_clip must be above 0")


@dataclass
class TokenSet:
    """Pictures and their tokens."""

    images: Tensor    # (M, 3, H, W) uint8
    tokens: Tensor    # (M, 2, N) int16: as is, mirrored


@dataclass
class Run:
    """Everything that a step needs."""

    config: TrainTransformerConfig
    accelerator: Accelerator
    model: nn.Module    # MaskGIT
    ema: MaskGIT
    optimizer: torch.optim.Optimizer
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau
    total_steps: int

    @property
    def plain(self) -> MaskGIT:
        return self.accelerator.unwrap_model(self.model)


@torch.no_grad()
def encode_all(vqgan: VQGAN, images: Tensor, device: torch.device, batch_size: int = 128) -> Tensor:
    """Tokens of every picture and of its mirror image: (M, 2, N) int16."""
    rows = []
    for start in tqdm(range(0, len(images), batch_size), desc="encoding", unit="batch", disable=None):
        image = to_float(images[start : start + batch_size].to(device))                      # (B, 3, H, W)
        both = [vqgan.encode(x).to(torch.int16).cpu() for x in (image, image.flip(3))]
        rows.append(torch.stack(both, dim=1))                                                # (B, 2, N)
    return torch.cat(rows)


def draw_masks(count: int, size: int, stride: int, c: TrainTransformerConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
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


def draw_batch(data: TokenSet, step: int, stride: int, c: TrainTransformerConfig) -> tuple[Tensor, ...]:
    """The batch of one optimizer step, a function of (seed, step) alone.

    Returns images (B, 3, H, W) in [-1, 1], holes (B, 1, H, W), tokens (B, N), masked (B, N).
    """
    epoch, k = divmod(step, len(data.images) // c.batch_size)
    chosen = utils.epoch_order(len(data.images), c.seed, epoch)[k * c.batch_size : (k + 1) * c.batch_size]
    generator = utils.seeded(c.seed, "transformer batch", step)
    mirrored = (torch.rand(len(chosen), generator=generator) < 0.5) & c.mirror
    image = to_float(data.images[chosen])                                                    # (B, 3, H, W)
    image = torch.where(mirrored.view(-1, 1, 1, 1), image.flip(3), image)
    tokens = data.tokens[chosen, mirrored.long()].long()                                     # (B, N)
    holes, masked = draw_masks(len(chosen), image.shape[-1], stride, c, generator)
    return image, holes, tokens, masked


def train_step(run: Run, data: TokenSet, step: int) -> dict[str, float]:
    """One optimizer step: mean cross-entropy over all hidden tokens of the global batch, however it is split."""
    c, accelerator = run.config, run.accelerator
    stride = run.plain.vqgan.config.stride
    if c.rate_schedule == "cosine":
        utils.set_rate(run.optimizer, utils.cosine_rate(step, run.total_steps, c.learning_rate, c.warmup_steps))
    image, holes, tokens, masked = draw_batch(data, step, stride, c)
    total = masked.sum().item()    # every process draws the whole batch, so the global mean needs no communication
    processes = accelerator.num_processes
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro in range(c.accum_grad):
        mine = slice(micro * processes + accelerator.process_index, None, processes * c.accum_grad)
        x, hole, z, m = (part[mine].to(accelerator.device) for part in (image, holes, tokens, masked))
        pixels = run.plain.pixels_of(x, hole)
        with accelerator.autocast():
            losses = run.model(z, m, pixels, c.label_smoothing)                              # (M,)
        loss = losses.sum() / total * processes
        utils.check_finite(loss, "loss")
        accelerator.backward(loss)
        loss_sum += loss.detach()
    norm = accelerator.clip_grad_norm_(run.plain.transformer.parameters(), c.grad_clip)
    utils.check_finite(norm, "gradient")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    utils.update_ema(run.ema.transformer, run.plain.transformer, utils.ema_decay_at(step, c.ema_decay))
    values = utils.average_over_processes({"loss": loss_sum.item(), "gradient_norm": norm.item()}, accelerator)
    return values | {"learning_rate": run.optimizer.param_groups[0]["lr"]}


@torch.no_grad()
def validate(run: Run, data: TokenSet) -> dict[str, float]:
    """Cross-entropy and accuracy of the averaged model on fixed pictures with fixed masks."""
    c, device = run.config, run.accelerator.device
    stride, size = run.ema.vqgan.config.stride, data.images.shape[-1]
    holes, masked = draw_masks(len(data.images), size, stride, c, utils.seeded(c.seed, "validation masks"))
    loss = hits = 0.0
    for start in range(0, len(masked), c.batch_size):
        part = slice(start, start + c.batch_size)
        x, hole, m = to_float(data.images[part]).to(device), holes[part].to(device), masked[part].to(device)
        z = data.tokens[part, 0].long().to(device)
        with run.accelerator.autocast():
            logits = run.ema.transformer(torch.where(m, run.ema.mask_token_id, z), run.ema.pixels_of(x, hole))
        logits = logits[m].float()                                                           # (M, K)
        loss += nn.functional.cross_entropy(logits, z[m], reduction="sum").item()
        hits += (logits.argmax(1) == z[m]).sum().item()
    return {"val_loss": loss / masked.sum().item(), "val_accuracy": hits / masked.sum().item()}


def write_completions(run: Run, images: Tensor, path: Path) -> None:
    """A grid of validation pictures: as they are, with their holes, completed; last row: made from nothing."""
    image = to_float(images[:12]).to(run.accelerator.device)
    hole = random_holes(len(image), image.shape[-1], utils.seeded(run.config.seed, "sample holes")).to(image.device)
    with run.accelerator.autocast():
        done = run.ema.complete(image, hole, range(len(image))).images
        made = run.ema.complete(image, torch.ones_like(hole), range(len(image)), total_iter=16).images
    rows = [image, image.masked_fill(hole, 0), torch.where(hole, done, image), made]
    save_image(torch.cat(rows).cpu(), path, nrow=len(image), value_range=(-1, 1), normalize=True)


def load_vqgan(path: str) -> VQGAN:
    """The averaged VQGAN of a stage-1 training checkpoint, or the VQGAN inside a finished model."""
    if path.endswith(".safetensors"):
        try:
            return MaskGIT.from_file(path).vqgan
        except ValueError as error:
            raise utils.UserError(str(error)) from error
    state = utils.load_checkpoint(path, "vqgan-training")
    vqgan = VQGAN(VQGANConfig(**state["config"]["vqgan"]))
    vqgan.load_state_dict(state["ema"])
    return vqgan.eval().requires_grad_(False)


def state_of(run: Run, step: int, best: float, configs: dict) -> dict:
    return {
        "kind": KIND, "step": step, "best": best, "config": configs,
        "vqgan": run.plain.vqgan.state_dict(), "model": run.plain.transformer.state_dict(),
        "ema": run.ema.transformer.state_dict(), "optimizer": run.optimizer.optimizer.state_dict(),
        "plateau": run.plateau.state_dict(),
    }    # fmt: skip


def restore(run: Run, state: dict, configs: dict) -> None:
    utils.check_same_config(state["config"], configs)
    for name, value in run.plain.vqgan.state_dict().items():
        if not torch.equal(value.cpu(), state["vqgan"][name]):
            raise utils.UserError("can't resume: the checkpoint was trained on the tokens of another VQGAN than --vqgan gives")
    run.plain.transformer.load_state_dict(state["model"])
    run.ema.transformer.load_state_dict(state["ema"])
    run.optimizer.optimizer.load_state_dict(state["optimizer"])
    run.plateau.load_state_dict(state["plateau"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_training_flags(parser, "configs/cat64.yml")
    parser.add_argument("--vqgan", required=True, help="stage-1 checkpoint (last.pt), or a finished .safetensors model")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sections = utils.load_config(args.config, args.set)
    model_config = utils.build_config(TransformerConfig, sections.get("transformer", {}), "transformer")
    config = utils.build_config(
        TrainTransformerConfig, utils.with_flags(sections.get("train_transformer", {}), args), "train_transformer"
    )
    accelerator = utils.make_accelerator(args.device, config.precision)
    utils.check_split(config.batch_size, config.accum_grad, accelerator)
    folder = utils.writable_folder(args.output_dir)
    torch.manual_seed(config.seed)
    vqgan = load_vqgan(args.vqgan)
    try:
        model = MaskGIT(vqgan.config, model_config)
    except ValueError as error:
        raise utils.UserError(f"config {error}") from error
    model.vqgan.load_state_dict(vqgan.state_dict())
    configs = model.configs() | {"train_transformer": asdict(config)}

    images = torch.cat([load_folder(path, model.image_size, args.bad_images) for path in args.train_dir])
    val_images = load_folder(args.val_dir, model.image_size, args.bad_images)[: config.val_pictures]
    if len(images) < config.batch_size:
        raise utils.UserError(f"{len(images)} training pictures are fewer than one batch ({config.batch_size}); lower --batch-size")
    model.to(accelerator.device)
    train_set = TokenSet(images, encode_all(model.vqgan, images, accelerator.device))
    val_set = TokenSet(val_images, encode_all(model.vqgan, val_images, accelerator.device))

    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.transformer.parameters(), lr=config.learning_rate, betas=(0.9, 0.96), weight_decay=config.weight_decay
    )
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=config.plateau_patience)
    model, optimizer = accelerator.prepare(model, optimizer)
    total_steps = config.epochs * (len(images) // config.batch_size)
    run = Run(config, accelerator, model, ema, optimizer, plateau, total_steps)
    step, best = 0, float("inf")
    if state := utils.find_resume(folder, args.resume, KIND):
        restore(run, state, configs)
        step, best = state["step"], state["best"]
    return train(run, train_set, val_set, folder, step, best, configs)


def train(run: Run, data: TokenSet, val: TokenSet, folder: Path, step: int, best: float, configs: dict) -> int:
    c, accelerator = run.config, run.accelerator
    per_epoch = len(data.images) // c.batch_size
    logger = utils.Logger(folder, step, accelerator.is_main_process)
    progress = tqdm(total=run.total_steps * c.batch_size, initial=step * c.batch_size, unit="img", disable=not accelerator.is_main_process)
    started, seen = time.perf_counter(), 0
    run.model.train()
    with utils.StopRequest() as stop:
        while step < run.total_steps and not stop.signal:
            torch.manual_seed(utils.seeded(c.seed, "step", step, accelerator.process_index).initial_seed())
            values = train_step(run, data, step)
            step, seen = step + 1, seen + c.batch_size
            progress.update(c.batch_size)
            progress.set_postfix(loss=f"{values['loss']:.3f}", rate=f"{values['learning_rate']:.1e}")
            if step % c.log_every == 0:
                logger.log(step, **values)
            if step % per_epoch == 0:
                scores = validate(run, val)
                run.plateau.step(scores["val_loss"])
                logger.log(step, **scores)
                speed = seen / (time.perf_counter() - started)
                if accelerator.is_main_process:
                    tqdm.write(json.dumps({"step": step, "images/s": round(speed, 1)} | {k: round(v, 4) for k, v in scores.items()}))
                    if scores["val_loss"] < best:
                        best = scores["val_loss"]
                        utils.save_checkpoint(folder / "best.pt", state_of(run, step, best, configs))
                        run.ema.save_file(folder / "maskgit.safetensors", steps=str(step))
                    if (step // per_epoch) % c.sample_every == 0 or step == run.total_steps:
                        write_completions(run, val.images, folder / f"samples_{step:07d}.png")
                started, seen = time.perf_counter(), 0
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
