"""Finish the decoder on sampled tokens (after stage 2): a completed hole is made of predictions, not of true tokens.

    python training_finish.py --model runs/maskgit/maskgit.safetensors --vqgan runs/vqgan/last.pt ...

(--config, --train-dir, --val-dir, --output-dir and the other flags as in the two stages; more in docs/training.md).

Encoder, codebook and transformer stand still; the decoder and its discriminator go on from stage 1 (`--vqgan`). A quarter of
every batch keeps its true tokens and the losses of stage 1, so that the decoder forgets nothing; the others get their holes'
tokens from the transformer in a few rounds, and it learns to make them look like the originals: to an ImageNet network, as
sharp on the hole's rim and inside it, real to the discriminator. From here on it also sees the transformer's features of the
known part. The finished model, all parts in one file, is OUTPUT/maskgit.safetensors. Without `--vqgan` a finished model is
finished further, with new discriminators or those of an earlier finish (`--discriminators`).
"""
import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import save_image

import tasks
from models.discriminator import FeatureDiscriminator, PatchDiscriminator, feature_matching, hinge_loss, mean_score
from models.maskgit import Known, MaskGIT
from models.perceptual import (
    PerceptualFeatures,
    check_scales,
    detail_gap,
    laplacian_distance,
    perceptual_distance,
    seam_gap,
    weighted_mean,
)
from models.vqgan import VQGAN, VQGANConfig
from pictures.folders import load_folder
from pictures.holes import random_holes
from pictures.images import to_float
from training.checkpoints import load_checkpoint, resume_run
from training.loop import StepCount, is_due, training_loop
from training.optimization import cosine_rate, ema_decay_at, set_rate, update_ema
from training.options import add_flags, load_sections, with_flags
from training.pictures_by_step import FolderPictures, open_pictures
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
from training.speed import Ahead, Captured, check_capture, in_side_stream, to_device
from training.stopping import check_all_finite
from training.weights import export_model, tokenizer_difference
from utils import Parser, UserError, atomic_write, build_config, run_cli, seeded, writable_folder

KIND = "finish-training"
Pair = tuple[Tensor, Tensor]    # of originals, and of completed pictures


@dataclass
class FinishConfig:
    epochs: int = 5
    batch_size: int = 32                # pictures per optimizer step
    sampled_share: float = 0.75         # share of them whose holes have sampled tokens, the others' have true ones
    accum_grad: int = 1                 # micro-batches per optimizer step
    learning_rate: float = 1e-4         # peak; falls along a half cosine
    discriminator_rate: float = 1e-4    # constant
    feature_discriminator_rate: float = 1e-3    # constant
    warmup_steps: int = 50
    grad_clip: float = 1.0
    ema_decay: float = 0.998
    precision: str = "bf16"             # bf16 or fp32
    seed: int = 0
    rounds: int = 3                     # decoding rounds that make the sampled tokens
    reuse: int = 1                      # epochs in a row that see the same holes and sampled tokens
    temperature: float = 1.0            # of the sampling
    context: bool = True                # let the decoder see the transformer's features, too
    decoder_blocks: list[int] | None = None    # at each scale, of a deeper decoder than the model has
    plain_share: float = 0.1            # share of the true-token pictures of which nothing is known, for generate.py
    l1: float = 1.0                     # loss weights, true tokens
    laplacian: float = 1.0
    perceptual: float = 2.0
    sampled_l1: float = 0.5             # loss weights, sampled tokens: the truth is one answer of many
    sampled_perceptual: float = 6.0
    adversarial: float = 0.03           # both
    feature_matching: float = 0.0
    feature_adversarial: float = 1.0    # of the discriminator on the perceptual network's features
    seam: float = 2.0                   # mean step across the hole's rim
    detail: float = 4.0                 # mean step inside the hole
    discriminator_channels: int = 64    # as in stage 1
    discriminator_strided: int = 2
    perceptual_network: str = "squeezenet1_1"
    perceptual_scales: list[int] = field(default_factory=lambda: [1, 2])    # enlargements that the network looks at
    second_network: str | None = None   # another perceptual network
    second_scales: list[int] = field(default_factory=lambda: [1, 2, 3])
    second_perceptual: float = 40.0     # weight of its distance over the whole picture
    log_every: int = 50
    save_every: int = 200
    val_pictures: int = 256
    validate_every: int = 1             # epochs between two validations

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accum_grad", "rounds", "reuse", "log_every", "save_every", "val_pictures",
                     "validate_every"):    # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.true_pictures < self.batch_size:
            raise ValueError(
                f"sampled_share must leave pictures of both kinds in a batch of {self.batch_size}, got {self.sampled_share}"
            )
        if not 0 <= self.plain_share <= 1:
            raise ValueError(f"plain_share must lie in [0, 1], got {self.plain_share}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32, got {self.precision!r}")
        for name in ("learning_rate", "discriminator_rate", "feature_discriminator_rate", "grad_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("perceptual_scales", "second_scales"):
            check_scales(getattr(self, name), name)

    @property
    def true_pictures(self) -> int:
        """How many of a batch keep their true tokens; they come first."""
        return self.batch_size - round(self.sampled_share * self.batch_size)


class Batch(NamedTuple):
    """This process's part of the batch of one optimizer step, on its device; b = B / processes."""

    image: Tensor              # (b, 3, H, W) in [-1, 1]
    mask: Tensor               # (b, 1, H, W), 1 = hole
    tokens: Tensor             # (b, N), true ones of the first pictures, sampled ones in the holes of the others
    context: Tensor | None     # (b, N, D), where the decoder takes it


@dataclass
class Run(StepCount):
    """Everything that a step needs."""

    config: FinishConfig
    accelerator: Accelerator
    model: MaskGIT              # its decoder is the averaged one
    decoder: nn.Module          # the only part that learns
    discriminator: nn.Module
    feature_discriminator: nn.Module    # on the perceptual network's features
    optimizer: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    features: PerceptualFeatures
    second: PerceptualFeatures | None   # the second network
    pictures: Any               # training.FolderPictures or ShardPictures
    captured: Callable[[Batch], dict[str, Tensor]] | None = None    # `gradients`, with --capture from the first step on
    kept: dict[int, Tensor] = field(default_factory=dict)    # sampling seed -> tokens (N,), for the epochs that reuse them

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


def draw_batch(run: Run, step: int) -> tuple[Tensor, Tensor, list[int]]:
    """This process's pictures, holes and sampling seeds of one step; those of all are a function of (seed, step) alone.

    Returns (b, 3, H, W) in [-1, 1], mirrored half of the time, (b, 1, H, W) holes, and b numbers; b = B / processes.
    """
    c, mine = run.config, slice(run.accelerator.process_index, None, run.accelerator.num_processes)
    generator = seeded(c.seed, "finish batch", step)
    mirrored = torch.rand(c.batch_size, 1, 1, 1, generator=generator) < 0.5
    image = to_float(run.pictures.batch(step))                                   # (b, 3, H, W)
    holes = random_holes(c.batch_size, image.shape[-1], generator)               # (B, 1, H, W)
    plain = torch.rand(c.true_pictures, 1, 1, 1, generator=generator) < c.plain_share
    holes[: len(plain)] |= plain
    seeds = [seeded(c.seed, "finish sample", step, i).initial_seed() for i in range(c.batch_size)]
    return torch.where(mirrored[mine], image.flip(3), image), holes[mine].float(), seeds[mine]


def sampled_batch(run: Run, step: int, image: Tensor, mask: Tensor, seeds: list[int]) -> Batch:
    """A step's drawn batch with its tokens: nothing in it learns, so on a GPU it is made while the step before it runs."""
    if step % (run.config.reuse * run.per_epoch) == 0:
        run.kept.clear()
    image, mask = (to_device(x, run.accelerator.device) for x in (image, mask))
    return Batch(image, mask, *mixed_tokens(run, image, mask, seeds))


@torch.no_grad()
def mixed_tokens(run: Run, image: Tensor, mask: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor | None]:
    """True tokens for the first pictures of the batch, sampled ones in the holes of the others: (B, N); and the context."""
    true = run.true_of(image)
    with run.accelerator.autocast():
        known = run.model.known(image, mask)
        sampled = Known(*(None if part is None else part[true:] for part in known))
        tokens = sampled_tokens(run, sampled, seeds[true:])
    return torch.cat([run.model.vqgan.encode(image[:true]), tokens]), known.context


def sampled_tokens(run: Run, known: Known, seeds: list[int]) -> Tensor:
    """A completion's tokens for each picture: (b, N). Most of a step's time goes here, so `reuse` keeps them (a kilobyte a
    picture) for the epochs after; a run that was resumed between them makes them again, the same ones."""
    c = run.config
    if all(seed in run.kept for seed in seeds):
        return torch.stack([run.kept[seed] for seed in seeds]).to(known.tokens)
    tokens = run.model.complete_tokens(known, seeds, total_iter=c.rounds, temperature=c.temperature)[-1].tokens
    if c.reuse > 1:
        run.kept |= dict(zip(seeds, tokens.to("cpu", torch.int32), strict=True))
    return tokens


def hole_l1(output: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error, the hole counting ten times as much as the known pixels."""
    return weighted_mean((output - image).abs().mean(1, keepdim=True), mask + 0.1).mean()


def generator_terms(
    run: Run, image: Tensor, mask: Tensor, tokens: Tensor, context: Tensor | None
) -> tuple[dict[str, Tensor], Pair, list[Pair]]:
    """The weighted terms of the decoder's loss; originals and completed pictures, and each feature map of both."""
    c, true, grid = run.config, run.true_of(image), run.model.vqgan.config.grid
    z_q = run.model.vqgan.codebook.lookup(tokens.view(-1, grid, grid))           # (B, d, h, w)
    output = run.decoder(z_q, image, mask, context).float()                      # (B, 3, H, W)
    pasted = torch.where(mask.bool(), output, image)
    with torch.no_grad():
        wanted = run.features(image)
    made = run.features(pasted)
    distance = perceptual_distance(made, wanted, mask)                           # (B,)
    terms = {
        "l1": c.l1 * hole_l1(output[:true], image[:true], mask[:true]),
        "laplacian": c.laplacian * laplacian_distance(pasted[:true], image[:true]),
        "perceptual": c.perceptual * distance[:true].mean(),
        "sampled_l1": c.sampled_l1 * hole_l1(output[true:], image[true:], mask[true:]),
        "sampled_perceptual": c.sampled_perceptual * distance[true:].mean(),
        "seam": c.seam * seam_gap(pasted, image, mask).mean(),
        "detail": c.detail * detail_gap(pasted, image, mask).mean(),
    }
    if run.second is not None:
        with torch.no_grad():
            other = run.second(image)
        # Over the whole picture: what is in a hole also changes what the deep layers see around it.
        terms["second_perceptual"] = c.second_perceptual * perceptual_distance(run.second(pasted), other).mean()
    return terms | adversarial_terms(run, image, pasted, made, mask), (image, pasted), list(zip(wanted, made, strict=True))


def adversarial_terms(run: Run, image: Tensor, pasted: Tensor, made: list[Tensor], mask: Tensor) -> dict[str, Tensor]:
    """What the discriminators, which only judge here, think of completed pictures and of their features."""
    c = run.config
    with frozen_discriminators(run.accelerator, *run.discriminators) as (judge, critic):
        with torch.no_grad():
            _, real = judge(image)
        score, fake = judge(pasted)
        scores = critic(made)
    return {
        "adversarial": -c.adversarial * mean_score(score.float(), mask),
        "feature_matching": c.feature_matching * feature_matching(fake, real),
        "feature_adversarial": -c.feature_adversarial * mean_of([mean_score(s.float(), mask) for s in scores]),
    }


def discriminator_terms(run: Run, images: Pair, features: list[Pair], mask: Tensor) -> dict[str, Tensor]:
    """The losses of the discriminators, from originals and completed pictures and from the features of both."""
    score, _ = run.discriminator(torch.cat(images).detach())
    scores = run.feature_discriminator([torch.cat(pair).detach() for pair in features])
    return {
        "discriminator": hinge_loss(*score.float().chunk(2), mask),
        "feature_discriminator": mean_of([hinge_loss(*s.float().chunk(2), mask) for s in scores]),
    }


def mean_of(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()


def micro_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Forward and backward of decoder and discriminators on one micro-batch; gradients add up. Returns the terms."""
    accelerator, share = run.accelerator, run.config.accum_grad
    with accelerator.autocast():
        terms, images, features = generator_terms(run, *batch)
    terms["loss"] = sum(terms.values())
    accelerator.backward(terms["loss"] / share)
    with accelerator.autocast():
        judged = discriminator_terms(run, images, features, batch.mask)
    accelerator.backward(sum(judged.values()) / share)
    return {name: term.detach() for name, term in (terms | judged).items()}


def gradients(run: Run, batch: Batch) -> dict[str, Tensor]:
    """The gradients of one optimizer step. Returns the terms, averaged over micro-batches.

    No number is read back from the device here, so that all of it can be captured.
    """
    accelerator, parts = run.accelerator, run.config.accum_grad
    for optimizer in (run.optimizer, run.optimizer_d):
        optimizer.zero_grad(set_to_none=True)
    accelerator.unwrap_model(run.feature_discriminator).renew_norms()
    totals: dict[str, Tensor] = {}
    for micro in range(parts):
        part = Batch(*(None if x is None else x[micro::parts] for x in batch))
        with local_gradients(accelerator, micro < parts - 1, run.decoder, *run.discriminators):
            terms = micro_step(run, part)
        totals = {name: totals.get(name, 0) + term / parts for name, term in terms.items()}
    return totals


def capture(run: Run, batch: Batch) -> Callable[[Batch], dict[str, Tensor]]:
    """`gradients` as one CUDA graph, for batches like this one."""
    buffers = list(run.accelerator.unwrap_model(run.feature_discriminator).buffers())
    before = [buffer.clone() for buffer in buffers]
    graph = Captured(lambda *parts: gradients(run, Batch(*parts)), batch)
    for buffer, value in zip(buffers, before, strict=True):    # the spectral norms were renewed while it warmed up
        buffer.copy_(value)
    return lambda batch: graph(*batch)


def train_step(run: Run, step: int, batch: Batch) -> dict[str, float]:
    """One optimizer step. Returns the terms, averaged over micro-batches and processes.

    Raises:
        NotFinite: a term or a gradient is not finite; nothing has been changed.
    """
    c, accelerator = run.config, run.accelerator
    rate = cosine_rate(step, run.total_steps, c.learning_rate, c.warmup_steps)
    set_rate(run.optimizer, rate)
    totals = dict(run.captured(batch) if run.captured else gradients(run, batch))
    totals["gradient_norm"] = accelerator.clip_grad_norm_(run.decoder.parameters(), c.grad_clip)
    totals["discriminator_gradient_norm"] = accelerator.clip_grad_norm_(
        [x for module in run.discriminators for x in module.parameters()], c.grad_clip
    )
    values = average_over_processes(totals, accelerator)
    check_all_finite(values, step)
    for optimizer in (run.optimizer, run.optimizer_d):
        optimizer.step()
    average = run.model.vqgan.decoder
    update_ema(average, accelerator.unwrap_model(run.decoder), ema_decay_at(step, c.ema_decay))
    return values | {"learning_rate": rate}


@torch.no_grad()
def validate(run: Run, images: Tensor) -> dict[str, float]:
    """The averaged decoder on fixed pictures and holes, with true and with sampled tokens; every process takes a share."""
    c, accelerator, model = run.config, run.accelerator, run.model
    zero = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    sums = {f"val_{kind}_{name}": zero.clone() for kind in ("true", "sampled") for name in ("perceptual", "psnr")}
    fixed = (images, validation_holes(run, images), torch.arange(len(images)))
    for image, mask, seeds in local_batches(accelerator, *fixed, batch_size=c.batch_size):
        image, mask = to_float(image), mask.float()
        with accelerator.autocast():
            sampled, _, known = model.complete(image, mask, seeds.tolist(), total_iter=8)
            true = model.decode(model.vqgan.encode(image), image, mask, known.context)
        wanted = run.features(image)
        for kind, output in (("true", true), ("sampled", sampled)):
            pasted = torch.where(mask.bool(), output, image)
            error = weighted_mean((pasted - image).pow(2).mean(1, keepdim=True), mask)
            sums[f"val_{kind}_psnr"] += (10 * torch.log10(4 / error.clamp_min(1e-10))).sum()
            sums[f"val_{kind}_perceptual"] += perceptual_distance(run.features(pasted), wanted, mask).sum()
    share = accelerator.num_processes / len(images)
    scores = average_over_processes({name: value * share for name, value in sums.items()}, accelerator)
    return scores | {"val_loss": scores["val_true_perceptual"] + scores["val_sampled_perceptual"]}


def validation_holes(run: Run, images: Tensor) -> Tensor:
    return random_holes(len(images), images.shape[-1], seeded(run.config.seed, "validation holes"))


@torch.no_grad()
def write_completions(run: Run, images: Tensor, path: Path) -> None:
    """A grid of 12 validation pictures: as they are, with their holes, completed and pasted."""
    hole = validation_holes(run, images)[:12].to(run.accelerator.device)
    image = to_float(images[:12]).to(run.accelerator.device)
    with run.accelerator.autocast():
        done = run.model.complete(image, hole, range(len(image)), total_iter=8).images
    rows = [image, image.masked_fill(hole, 0), torch.where(hole, done, image)]
    with atomic_write(path) as temporary:
        save_image(torch.cat(rows).cpu(), temporary, format="png", nrow=len(image), value_range=(-1, 1), normalize=True)


def state_of(run: Run, configs: dict) -> dict:
    unwrap = run.accelerator.unwrap_model
    return {
        "kind": KIND, "config": configs, "decoder": unwrap(run.decoder).state_dict(),
        "ema": run.model.vqgan.decoder.state_dict(), "discriminator": unwrap(run.discriminator).state_dict(),
        "feature_discriminator": unwrap(run.feature_discriminator).state_dict(),
        "optimizer": run.optimizer.state_dict(), "optimizer_d": run.optimizer_d.state_dict(),
    }    # fmt: skip


def restore(run: Run, state: dict) -> None:
    unwrap = run.accelerator.unwrap_model
    unwrap(run.decoder).load_state_dict(state["decoder"])
    run.model.vqgan.decoder.load_state_dict(state["ema"])
    unwrap(run.discriminator).load_state_dict(state["discriminator"])
    unwrap(run.feature_discriminator).load_state_dict(state["feature_discriminator"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.optimizer_d.load_state_dict(state["optimizer_d"])


def load_model(path: str, vqgan: str | None, c: FinishConfig) -> tuple[MaskGIT, dict | None]:
    """The model of stage 2 with the decoder of stage 1, which must have been trained on the same tokens; or, where no stage
    1 is given, a finished model with the decoder it has. What `c` asks for more is added.

    Returns it and the weights of stage 1's discriminator.
    """
    model = tasks.load_model(path, torch.device("cpu"))
    if not model.vqgan.conditioned:
        raise UserError("the finish needs the conditioned decoder; this model has the reference decoder")
    judge = None
    if vqgan is not None:
        state = load_checkpoint(vqgan, "vqgan-training")
        if name := tokenizer_difference(state["ema"], model.vqgan.state_dict()):
            raise UserError(f"{vqgan} has other tokens than {path}: {name} differs; give its own VQGAN")
        model.vqgan, judge = model.vqgan.without_context(), state["discriminator"]
        model.vqgan.load_state_dict(state["ema"])
    config = model.vqgan.config
    if config.context_dim and not c.context:
        raise UserError(
            f"train_finish.context is false, and the decoder of {path} takes the transformer's features; give --vqgan, to "
            "begin with the decoder of stage 1"
        )
    has = config.decoder_blocks
    blocks = has if c.decoder_blocks is None else c.decoder_blocks
    if len(blocks) != len(has) or any(wanted < there for wanted, there in zip(blocks, has, strict=True)):
        raise UserError(f"train_finish.decoder_blocks must be {has} or more at each scale, got {blocks}")
    dim = model.transformer.config.embed_dim if c.context else 0
    model.vqgan = grown(model.vqgan, replace(config, context_dim=dim, decoder_blocks=blocks), c.seed)
    return model.requires_grad_(False).eval(), judge


def grown(vqgan: VQGAN, config: VQGANConfig, seed: int) -> VQGAN:
    """The same VQGAN, its decoder with more in it: blocks that are the identity, an input that it doesn't listen to yet."""
    torch.manual_seed(seed)    # a block begins at random inside; only its last layer is zero
    larger = VQGAN(config)
    larger.load_state_dict(larger.state_dict() | vqgan.state_dict())
    return larger


def load_features(network: str, weights: str | None, scales: list[int], flag: str, or_else: str = "") -> PerceptualFeatures:
    try:
        return PerceptualFeatures(network, weights, scales)
    except (OSError, ValueError) as error:
        raise UserError(f"no perceptual weights ({error}); give them with {flag} FILE{or_else}") from error


def load_networks(c: FinishConfig, args: argparse.Namespace) -> tuple[PerceptualFeatures, PerceptualFeatures | None]:
    first = load_features(c.perceptual_network, args.perceptual_weights, c.perceptual_scales, "--perceptual-weights")
    if c.second_network is None:
        if args.second_weights is not None:
            raise UserError("--second-weights is for train_finish.second_network, which is not set; set it too")
        return first, None
    without = ", or do without: --set train_finish.second_network=null"
    return first, load_features(c.second_network, args.second_weights, c.second_scales, "--second-weights", without)


def load_judges(path: str) -> dict[str, dict]:
    """The weights of both discriminators in a checkpoint of the finish; its rest need not reach the other processes."""
    state = load_checkpoint(path, KIND)
    return {name: state[name] for name in ("discriminator", "feature_discriminator")}


def go_on_from(path: str, state: dict, discriminators: dict[str, nn.Module]) -> None:
    """Give the discriminators the weights that the checkpoint `path` has of them: stage 1's has no feature discriminator."""
    try:
        for name in discriminators.keys() & state.keys():
            discriminators[name].load_state_dict(state[name])
    except RuntimeError as error:
        settings = "train_finish's discriminator_channels, discriminator_strided, perceptual_network and perceptual_scales"
        raise UserError(f"the discriminators of {path} have another size than {settings} make") from error


def build_run(args: argparse.Namespace, c: FinishConfig, accelerator: Accelerator) -> Run:
    """Models, optimizers, losses and pictures, on their device."""
    model, judge = on_main(accelerator, lambda: load_model(args.model, args.vqgan, c))
    torch.manual_seed(c.seed)    # for a discriminator that begins here
    discriminator = PatchDiscriminator(c.discriminator_channels, c.discriminator_strided)
    features, second = on_main(accelerator, lambda: load_networks(c, args))
    decoder = copy.deepcopy(model.vqgan.decoder).requires_grad_(True)
    layout = {"memory_format": torch.channels_last}
    critic = FeatureDiscriminator(features.widths)
    judges = {"discriminator": discriminator, "feature_discriminator": critic}
    if args.discriminators:
        earlier = on_main(accelerator, lambda: load_judges(args.discriminators))
        go_on_from(args.discriminators, earlier, judges)
    elif judge is not None:
        go_on_from(args.vqgan, {"discriminator": judge}, judges)
    pictures = open_pictures(args, model.image_size, c, accelerator)    # last: a large set takes minutes
    learners = (module.to(**layout) for module in (decoder, discriminator, critic))
    decoder, discriminator, critic = accelerator.prepare(*learners)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=c.learning_rate, betas=(0.9, 0.99))
    rates = {discriminator: c.discriminator_rate, critic: c.feature_discriminator_rate}
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates.items()]
    optimizer_d = torch.optim.Adam(groups, betas=(0.5, 0.99))
    model.to(accelerator.device, **layout)
    for network in filter(None, (features, second)):
        network.place(accelerator.device)
    return Run(c, accelerator, model, decoder, discriminator, critic, optimizer, optimizer_d, features, second, pictures)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    flag = parser.add_argument
    flag("--model", required=True, help="the model of stage 2 (maskgit.safetensors)")
    flag("--vqgan", help="stage-1 checkpoint (last.pt) with decoder and discriminator (default: the model's own decoder, "
                         "to finish it further, and a new discriminator)")    # fmt: skip
    flag("--discriminators", metavar="FILE", help="a last.pt of the finish, whose discriminators go on (default: that of "
                                                  "--vqgan, or new ones)")    # fmt: skip
    flag("--train-pictures", type=int, help="pictures in the shards (default: counted from their headers)")
    flag("--workers", type=int, default=0, help="processes that read shards ahead (default: none)")
    flag("--perceptual-weights", help="file with the perceptual network's weights (default: torchvision downloads them)")
    flag("--capture", action="store_true", help="capture a step's gradients as one CUDA graph: faster on a GPU")
    flag("--second-weights", help="file with the weights of train_finish.second_network (default: they are downloaded)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    section = load_sections(args).get("train_finish", {})
    config = build_config(FinishConfig, with_flags(section, args), "train_finish")
    accelerator = start_accelerator(args.device, config.precision)
    with errors_told_once(accelerator, args.output_dir):
        check_split(config.batch_size, config.accum_grad, accelerator)
        check_capture(args.capture, accelerator)
        parts, true = accelerator.num_processes * config.accum_grad, config.true_pictures
        if true % parts:
            message = f"must be a multiple of processes x accum_grad ({parts}); change batch_size or sampled_share"
            raise UserError(f"the pictures of a batch with true tokens ({true} of {config.batch_size}) {message}")
        folder = on_main(accelerator, lambda: writable_folder(args.output_dir))
        run = build_run(args, config, accelerator)
        val_images = load_folder(args.val_dir, run.model.image_size, args.bad_images)[: config.val_pictures]
        return run_training(run, val_images, folder, args)


def run_training(run: Run, val_images: Tensor, folder: Path, args: argparse.Namespace) -> int:
    c, accelerator = run.config, run.accelerator
    configs = {"train_finish": asdict(c)}
    progress = resume_run(
        folder, KIND, args.resume, accelerator, configs, len(run.pictures), lambda state: restore(run, state)
    )

    cuda = accelerator.device.type == "cuda"
    threads = 8 if isinstance(run.pictures, FolderPictures) else 1    # shards are read in order
    drawn = Ahead(lambda step: draw_batch(run, run.drawn_at(step)), threads if cuda else 0)

    def sample(step: int) -> Batch:
        return sampled_batch(run, step, *drawn(step))

    sampled = Ahead(in_side_stream(accelerator.device, sample), int(cuda))

    def step_(step: int) -> dict[str, float]:
        if args.capture and run.captured is None:
            batch = sample(step)    # here, so that nothing else runs while the graph is captured
            run.captured = capture(run, batch)
        else:
            batch = sampled(step)
        return train_step(run, step, batch)

    def validate_(epoch: int) -> dict[str, float] | None:
        if not is_due(epoch, c.validate_every, c.epochs):
            return None
        if accelerator.is_main_process:
            write_completions(run, val_images, folder / f"samples_{epoch * run.per_epoch:07d}.png")
        return validate(run, val_images)

    return training_loop(
        c, accelerator, folder, progress, per_epoch=run.per_epoch, on_nan=args.on_nan,
        train_step=step_, validate=validate_, state=lambda: state_of(run, configs),
        export=lambda: export_model(run.model, folder / "maskgit.safetensors", finish_steps=str(progress.step)),
    )    # fmt: skip


if __name__ == "__main__":
    run_cli(main)
