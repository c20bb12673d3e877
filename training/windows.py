"""Windows: small crops of photographs at every scale, with holes, half of them with a guess of the hole's content.

A photograph is completed from coarse to fine: at each size the model looks at windows of its own picture size, and in the
hole it is given the enlarged completion of the size below, a guess. Here such windows are made from photographs in memory.
All of a batch is a function of (seed, step), as everywhere.
"""

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.maskgit import MaskGIT
from models.vqgan import VQGAN
from pictures import holes as random_masks
from pictures.files import find_images
from pictures.folders import load_folder, read_all
from pictures.holes import window_holes
from pictures.images import read_image, to_float
from pictures.shards import is_shards
from training.config import GuessConfig
from training.losses import validation_holes, write_grid
from training.masks import Masks, MaskSource
from training.pictures_by_step import other_folders
from utils import UserError, notice, seeded

SHORT_SIDE = 400      # photographs are kept with at most so many pixels along their short side
NATIVE_SHARE = 1 / 3  # share of the windows that show the photograph's own pixels; the others are larger crops, shrunk
QUARTER_SHARE = 0.2   # share of the guesses that come from a quarter of the size; the others come from a half
PARTIAL_SHARE = 0.1   # share of the guesses that leave a part of the hole empty
RECODED_SHARE = 0.6   # share of the guesses that went through the tokenizer, as completions do
MAX_BLUR = 1.0        # standard deviation in pixels of the small picture
MAX_TINT = 0.1        # of smooth colour errors, in [-1, 1]
MAX_NOISE = 0.05      # of noise
MAX_HEAT = 0.08       # temperature at which other codes take the place of the nearest one


def load_photographs(paths: list[str], bad_images: str = "error", leave_out: Iterable[str] = ()) -> list[Tensor]:
    """Read the photographs of some folders, each uint8 (3, H, W), its short side at most `SHORT_SIDE`.

    A folder that is named several times counts several times and is held once.
    """
    loaded = {path: _load_folder(path, bad_images, leave_out) for path in dict.fromkeys(paths)}
    return [photograph for path in paths for photograph in loaded[path]]


def _load_folder(path: str, bad_images: str, leave_out: Iterable[str]) -> list[Tensor]:
    if is_shards(path):
        raise UserError(f"windows are cut from folders of photographs, not from shards; got --train-dir {path}")

    def load(file: Path) -> Tensor:
        image = read_image(file)
        shrink = SHORT_SIDE / min(image.shape[1:])
        return image if shrink >= 1 else resize_uint8(image, [max(1, round(side * shrink)) for side in image.shape[1:]])

    found = read_all(load, find_images(path, leave_out).values(), bad_images)
    good = [image for image in found if isinstance(image, Tensor)]
    if not good:
        raise UserError(f"none of the {len(found)} picture(s) in {path} can be read; the first: {found[0]}")
    if len(good) < len(found):
        notice(f"skipped {len(found) - len(good)} of {len(found)} pictures in {path}")
    return good


class GuessPlan(NamedTuple):
    """How the guesses of b windows are made; see `make_guess`."""

    given: Tensor      # (b,) bool, whether there is one
    quarter: Tensor    # (b,) bool, from a quarter of the size
    recoded: Tensor    # (b,) bool, through the tokenizer
    region: Tensor     # (b, 1, S, S) bool, where it is given
    blur: Tensor       # (b,) standard deviation
    heat: Tensor       # (b,) temperature of the codes
    tint: Tensor       # (b, 3, 4, 4) smooth error of the colours
    noise: Tensor      # (b, 3, S / 2, S / 2)
    seeds: Tensor      # (b,) int64, for the codes


class WindowBatch(NamedTuple):
    """A process's share of a batch: b = B / processes windows."""

    image: Tensor        # (b, 3, S, S) uint8
    holes: Tensor        # (b, 1, S, S) bool
    plan: GuessPlan
    all_holes: Tensor    # (B, 1, S, S) bool, of the whole batch


@dataclass
class Windows:
    """Windows of photographs.

    Args:
        photographs: each uint8 (3, H, W).
        size: S, side of a window.
        per_epoch: windows that make up an epoch.
        guess_share: share of the windows with a guess; stage 1 takes none.
        masks: of which the holes are drawn, see training/masks.py.
    """

    photographs: list[Tensor]
    size: int
    per_epoch: int
    batch_size: int
    seed: int
    guess_share: float = 0.5
    rank: int = 0
    processes: int = 1
    masks: Masks = random_masks

    def __len__(self) -> int:
        return self.per_epoch

    def batch(self, step: int, purpose: str = "windows") -> WindowBatch:
        """This process's windows of a step's batch: positions rank, rank + P, ... of B."""
        generator, B, mine = seeded(self.seed, purpose, step), self.batch_size, slice(self.rank, None, self.processes)
        chosen = torch.randint(len(self.photographs), (B,), generator=generator)
        place = torch.rand(B, 4, generator=generator)                   # scale, top, left, mirrored
        holes, deep = self.masks.window_holes(B, self.size, generator)  # (B, 1, S, S), (B,)
        plan = draw_guesses(holes, deep, self.guess_share, generator)
        image = torch.stack([self.cut(int(i), *u) for i, u in zip(chosen[mine], place[mine].tolist(), strict=True)])
        return WindowBatch(image, holes[mine], GuessPlan(*(part[mine] for part in plan)), holes)

    def cut(self, number: int, scale: float, top: float, left: float, mirrored: float) -> Tensor:
        """A window of a photograph: uint8 (3, S, S). The arguments lie in [0, 1)."""
        photograph = self.photographs[number]                           # (3, H, W)
        H, W = photograph.shape[1:]
        shortest, exponent = min(H, W), max(0.0, (scale - NATIVE_SHARE) / (1 - NATIVE_SHARE))
        side = shortest if shortest <= self.size else round(self.size * (shortest / self.size) ** exponent)
        y, x = int(top * (H - side + 1)), int(left * (W - side + 1))
        window = photograph[:, y : y + side, x : x + side]              # (3, side, side)
        if side != self.size:
            window = resize_uint8(window, [self.size, self.size])
        return window.flip(2) if mirrored < 0.5 else window


def draw_guesses(holes: Tensor, deep: Tensor, share: float, generator: torch.Generator) -> GuessPlan:
    """Which windows get a guess, and how it is made.

    Args:
        holes: (B, 1, S, S) bool.
        deep: (B,) bool, holes that reach beyond the window: most of these have a guess.
        share: of the windows with a guess.
    """
    B, S = len(holes), holes.shape[-1]
    kind, many = torch.rand(4, B, generator=generator), torch.rand(5, B, generator=generator)
    more = (share + 0.8 * (1 - share)) if share else 0.0
    given = kind[0] < torch.where(deep, more, share)
    partial = (kind[1] < PARTIAL_SHARE).view(-1, 1, 1, 1)
    region = torch.where(partial, ~window_holes(B, S, generator)[0], True) & holes
    tint = torch.randn(B, 3, 4, 4, generator=generator) * (MAX_TINT * many[0]).view(-1, 1, 1, 1)
    noise = torch.randn(B, 3, S // 2, S // 2, generator=generator) * (MAX_NOISE * many[1]).view(-1, 1, 1, 1)
    seeds = torch.randint(2**62, (B,), generator=generator)
    return GuessPlan(given, kind[2] < QUARTER_SHARE, kind[3] < RECODED_SHARE, region, MAX_BLUR * many[2],
                     MAX_HEAT * many[3], tint, noise, seeds)    # fmt: skip


@torch.no_grad()
def make_guess(vqgan: VQGAN, image: Tensor, holes: Tensor, plan: GuessPlan) -> Tensor:
    """The guess of a window's hole: the window shrunk, made worse as a completion is, enlarged again.

    Args:
        image: (b, 3, S, S) in [-1, 1].
        holes: (b, 1, S, S) bool.
    Returns:
        (b, 4, S, S), see `models.local_autoencoder.condition`; all zero for windows without a guess.
    """
    guess = image.new_zeros(len(image), 4, *image.shape[2:])
    for quarter, divisor in ((False, 2), (True, 4)):
        rows = (plan.given & (plan.quarter == quarter)).nonzero().squeeze(1)
        if len(rows):
            part = GuessPlan(*(x[rows] for x in plan))
            guess[rows, :3] = _degraded(vqgan, image[rows], holes[rows], part, divisor)
            guess[rows, 3:] = part.region.to(image.dtype)
    return guess * guess[:, 3:]


def _degraded(vqgan: VQGAN, image: Tensor, holes: Tensor, plan: GuessPlan, divisor: int) -> Tensor:
    """The whole window (b, 3, S, S), worse where the small picture's hole is."""
    size = image.shape[-1] // divisor
    small = resize(image, size).clamp(-1, 1)                                            # (b, 3, s, s)
    hole = F.max_pool2d(holes.to(image.dtype), divisor)                                 # (b, 1, s, s)
    worse = small.clone()
    rows = plan.recoded.nonzero().squeeze(1)
    if len(rows):
        worse[rows] = recode(vqgan, small[rows], hole[rows], plan.heat[rows], plan.seeds[rows])
    worse = blur(worse, plan.blur.to(image)) + plan.noise.to(image)[:, :, :size, :size]
    worse = worse + F.interpolate(plan.tint.to(image), size=(size, size), mode="bicubic")
    return resize(torch.where(hole.bool(), worse, small), image.shape[-1]).clamp(-1, 1)


def recode(vqgan: VQGAN, image: Tensor, hole: Tensor, heat: Tensor, seeds: Tensor) -> Tensor:
    """Pictures (b, 3, s, s) to tokens and back, the known pixels given. At times a near code takes the right one's place."""
    latents = vqgan.encoder(image)                                                      # (b, d, h, w)
    if vqgan.config.l2_normalize:
        latents = F.normalize(latents, dim=1)
    distance = torch.cdist(latents.flatten(2).transpose(1, 2), vqgan.codebook.codes())  # (b, h w, K)
    likeness = -distance.square() / 2
    uniform = [torch.rand(likeness.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds.tolist()]
    gumbel = -torch.log(-torch.log(torch.stack(uniform).to(image).clamp(1e-7, 1 - 1e-6)))
    tokens = (likeness + heat.to(image).view(-1, 1, 1) * gumbel).argmax(2)              # (b, h w)
    z_q = vqgan.codebook.lookup(tokens.view(len(image), *latents.shape[2:]))            # (b, d, h, w)
    return vqgan.decoder(z_q, image, hole).float().clamp(-1, 1)


def blur(image: Tensor, sigma: Tensor) -> Tensor:
    """A Gaussian blur of pictures (b, C, s, s), each with a standard deviation of its own (b,), in pixels."""
    steps = torch.arange(-2, 3, device=image.device, dtype=image.dtype)
    taps = torch.exp(-steps.square() / (2 * sigma.clamp_min(1e-3).square().view(-1, 1)))    # (b, 5)
    taps = taps / taps.sum(1, keepdim=True)
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    rows = sum(taps[:, k].view(-1, 1, 1, 1) * padded[:, :, k : k + image.shape[2]] for k in range(5))
    return sum(taps[:, k].view(-1, 1, 1, 1) * rows[..., k : k + image.shape[3]] for k in range(5))


def resize(image: Tensor, size: int) -> Tensor:
    """Pictures (b, C, s, s) to (b, C, size, size), antialiased."""
    return F.interpolate(image, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def resize_uint8(image: Tensor, sides: list[int]) -> Tensor:
    """A picture uint8 (3, H, W) to (3, *sides), antialiased."""
    resized = F.interpolate(image[None].float(), size=sides, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def open_sets(
    args: Any, size: int, c: Any, accelerator: Any, masks: MaskSource, whole: Callable[[], Sized]
) -> tuple[Any, Tensor, WindowBatch | None]:
    """The training set of --train-dir, for a stage's config, and the pictures of --val-dir to validate on.

    Args:
        whole: makes a training set of whole pictures.
    Returns:
        The training set; (M, 3, size, size) uint8; where these are windows, what belongs to them: half have a guess.
    """
    if not c.windows:
        val_images = load_folder(args.val_dir, size, args.bad_images, other_folders(args))[: c.val_pictures]
        pictures = whole()
        if len(pictures) < c.batch_size:
            raise UserError(
                f"{len(pictures)} training pictures are fewer than one batch ({c.batch_size}); lower --batch-size"
            )
        return pictures, val_images, None
    place = {"rank": accelerator.process_index, "processes": accelerator.num_processes}
    if c.windows < c.batch_size:
        raise UserError(f"config windows ({c.windows}, an epoch) must be at least batch_size ({c.batch_size})")
    share = c.guess_share if isinstance(c, GuessConfig) else 0.0
    photographs = load_photographs(args.train_dir, args.bad_images, other_folders(args))
    windows = Windows(photographs, size, c.windows, c.batch_size, c.seed, share, **place, masks=masks.train)
    val_photographs = load_photographs([args.val_dir], args.bad_images, other_folders(args))
    fixed = Windows(val_photographs, size, c.val_pictures, c.val_pictures, c.seed, masks=masks.val)
    val_windows = fixed.batch(0, "validation windows")
    return windows, val_windows.image, val_windows


@torch.no_grad()
def write_completions(
    run: Any, model: MaskGIT, path: Path, from_nothing: bool = False, total_iter: int | None = None
) -> None:
    """A grid of 12 validation pictures: as they are, with their holes, of windows with the guesses in them, and completed.

    Args:
        from_nothing: whole pictures are also made from nothing, in the last row.
        total_iter: rounds of whole pictures.
    """
    windows = run.val_windows
    fixed = run.val_images, windows.holes if windows else validation_holes(run), *(windows.plan if windows else ())
    image, hole, *plan = (x[:12].to(run.accelerator.device) for x in fixed)
    image, seeds, guess = to_float(image), range(len(image)), None
    known = image.masked_fill(hole, 0)
    rows = [image, known]
    if plan:
        guess, total_iter = make_guess(model.vqgan, image, hole, GuessPlan(*plan)), 4
        rows.append(torch.where(guess[:, 3:].bool(), guess[:, :3], known))
    with run.accelerator.autocast():
        done = model.complete(image, hole, seeds, guess=guess, total_iter=total_iter).images
        rows.append(torch.where(hole, done, image))
        if from_nothing and not plan:
            rows.append(model.complete(image, torch.ones_like(hole), seeds, total_iter=16).images)
    write_grid(path, *rows)
