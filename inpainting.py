"""Complete the missing parts of pictures.

The bundled samples:  python inpainting.py
Your own:             python inpainting.py --images PICTURES --masks MASKS --output out

PICTURES and MASKS are folders (subfolders are read too) or files; a single mask serves all pictures. Black in a mask is the
hole (--mask-hole white: white is). Pictures and masks are paired by name; where no names are the same, by what is left of
them without what all have in common (image_001 and mask_001).

Writes OUTPUT/images/NAME.png. Outside the hole it says what the picture's file says: 16 bits a channel, the alpha channel,
the colour profile, EXIF data and resolution are kept. Not kept: comments, thumbnails, further frames of an animation, CMYK.
With --save-steps also OUTPUT/steps/NAME.png (the input, then the picture after every round), OUTPUT/masks/NAME.png (the
tokens still masked after every round, white) and OUTPUT/steps/NAME.gif.
"""
from __future__ import annotations

import argparse
import os
import time
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils import Parser, UserError, atomic_write, notice, pick_device, progress, run_cli, seeded, writable_folder

if TYPE_CHECKING:    # slow to import, and --help does without
    from torch import Tensor

    from models import MaskGIT
    from models.completion import Result, Snapshot
    from pictures.images import Picture

HERE = Path(__file__).resolve().parent
AT_ONCE = 16_000_000    # pixels that wait for the model or the disk; smaller sets are read before anything is written

Pair = tuple[str, Path, Path]    # name without suffix, file of the picture, file of its mask


class Task(NamedTuple):
    """One completion to make."""

    name: str        # of the output, without suffix
    picture: Picture
    hole: Tensor     # (1, H, W) bool
    seed: int


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--checkpoint", default=str(HERE / "checkpoints/cat64.safetensors"), help="model (default: the bundled one)")
    flag("--images", default=str(HERE / "samples/images"), help="picture or folder (default: the bundled samples)")
    flag("--masks", default=str(HERE / "samples/masks"), help="mask or folder; black = hole")
    flag("--mask-hole", choices=("black", "white"), default="black", help="colour of the hole (default: %(default)s)")
    flag("--output", default="out", help="folder for the results (default: %(default)s)")
    flag("--paste", action=argparse.BooleanOptionalAction, default=True, help="put the known pixels back, bit for bit")
    flag("--mask-func", default="cosine", metavar="NAME",
         help="schedule: cosine, linear, square, sqrt, cubic or arccos (default: %(default)s)")
    flag("--total-iter", type=int, default=10, help="T, rounds of the schedule (default: %(default)s)")
    flag("--sweet-spot", type=int, help="stop after this round, 1..T; the schedule still follows T (default: T)")
    flag("--decoder", default="maskgit", metavar="NAME", help="maskgit, halton or reference (default: %(default)s)")
    flag("--temperature", type=float, default=1.0,
         help="0: likeliest token, below 1: safer, above: more variety (default: %(default)s)")
    flag("--choice-temperature", type=float, default=4.5, help="noise in the order of filling (default: %(default)s)")
    flag("--num-samples", type=int, default=1, help="completions of each picture: NAME_s0.png, NAME_s1.png, ...")
    flag("--seed", type=int, default=0, help="another one gives other completions (default: %(default)s)")
    flag("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is about twice as fast (default: %(default)s)")
    flag("--compile", action="store_true",
         help="compile the transformer's blocks (torch.compile): takes about 30 s, worth it for many pictures; results "
              "differ by rounding")
    flag("--save-steps", action="store_true", help="write pictures, token masks and an animation of the rounds")
    flag("--batch-size", type=int, default=16, help="pictures computed together (default: %(default)s)")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    flag("--skip-bad", action="store_true", help="leave out pictures that can't be used instead of stopping")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before anything is read or written."""
    from models.decoding import DECODERS
    from models.schedule import SCHEDULES

    if args.mask_func not in SCHEDULES:
        raise UserError(f"unknown --mask-func {args.mask_func!r}; expected one of {', '.join(SCHEDULES)}")
    if args.decoder not in DECODERS:
        raise UserError(f"unknown --decoder {args.decoder!r}; expected one of {', '.join(DECODERS)}")
    for name in ("total_iter", "batch_size", "num_samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.sweet_spot is not None and not 1 <= args.sweet_spot <= args.total_iter:
        raise UserError(f"--sweet-spot must lie in 1..{args.total_iter} (--total-iter), got {args.sweet_spot}")
    for name in ("temperature", "choice_temperature"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}")


# ---- files ----


def find_pairs(args: argparse.Namespace) -> list[Pair]:
    """The pairs, when it is sure that nothing which is read will be written over."""
    from pictures.files import pair, refuse_overwriting

    pairs = pair(args.images, args.masks, leave_out=[args.output])
    folders = [folder for folder in (args.images, args.masks) if not is_inside(args.output, folder)]
    files = [file for _, *both in pairs for file in both]
    names = [sample_name(name, i, args) for name, *_ in pairs for i in range(args.num_samples)]
    refuse_overwriting([*files, *folders, args.checkpoint], [path for name in names for path in outputs(name, args)])
    return pairs


def is_inside(path: str, folder: str) -> bool:
    """Whether a path lies in a folder, which then is read without it."""
    real, whole = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real != whole and real.is_relative_to(whole)


def sample_name(name: str, i: int, args: argparse.Namespace) -> str:
    return f"{name}_s{i}" if args.num_samples > 1 else name


def outputs(name: str, args: argparse.Namespace) -> list[Path]:
    """The files written for one completion: the picture, and with --save-steps both strips and the animation."""
    folder = Path(args.output)
    paths = [folder / "images" / f"{name}.png"]
    if args.save_steps:
        paths += [folder / "steps" / f"{name}.png", folder / "masks" / f"{name}.png", folder / "steps" / f"{name}.gif"]
    return paths


def read_tasks(pairs: list[Pair], args: argparse.Namespace) -> Iterator[Task]:
    """Every completion to make. Its seed depends on --seed, the picture's name and the sample's number only."""
    from pictures.ahead import read_ahead
    from pictures.images import read_picture, read_size
    from pictures.masks import check_hole, read_mask

    read_mask = lru_cache(maxsize=1)(read_mask)    # one mask may serve all pictures

    def size(pair: Pair) -> int:
        width, height = read_size(pair[1])
        return width * height

    def read(pair: Pair) -> tuple[Picture, Tensor]:
        picture, mask = read_picture(pair[1]), read_mask(pair[2], args.mask_hole)
        check_hole(mask, pair[2], args.mask_hole, picture.pixels.shape[:2], pair[1].name)
        return picture, mask

    skip = (lambda error: notice(f"skipped: {error}")) if args.skip_bad else None
    for (name, image_path, mask_path), (picture, hole) in read_ahead(read, pairs, size, AT_ONCE, skip):
        if not bool(hole.any()):
            notice(f"mask {mask_path.name} has no hole; {image_path.name} is copied through", "pictures without a hole",
                   image_path.name)    # fmt: skip
        for lost in picture.lost:
            notice(f"{image_path} loses {lost}", f"pictures that lose {lost}", image_path.name)
        for i in range(args.num_samples):
            yield Task(sample_name(name, i, args), picture, hole, seeded(args.seed, name, i).initial_seed())


def write_result(task: Task, result: Result, args: argparse.Namespace) -> None:
    """Write the completion, and what --save-steps asks for."""
    from pictures.images import write_completed

    path, *steps = outputs(task.name, args)
    write_completed(path, task.picture, result.image, task.hole if args.paste else task.hole | True)
    if steps:
        write_steps(result.rounds, *steps)


def write_steps(rounds: list[Snapshot], strip: Path, mask_strip: Path, animation: Path) -> None:
    """Two strips and an animation of the rounds: pictures, and masked tokens white."""
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torchvision.utils import make_grid

    from pictures.images import write_image

    def fit(image: Tensor) -> Tensor:    # nearest: pixels stay pixels
        return F.interpolate(image[None].float(), size=rounds[-1].picture.shape[1:])[0].byte()

    pictures = [fit(snapshot.picture) for snapshot in rounds]                                    # (3, H, W) each
    masks = [fit(snapshot.masked[None].expand(3, -1, -1) * 255) for snapshot in rounds]
    for path, images in ((strip, pictures), (mask_strip, masks)):
        write_image(path, make_grid(images, nrow=min(len(images), 11), padding=2, pad_value=128))
    frames = torch.cat([torch.stack(pictures), torch.stack(masks)], dim=3)                       # (T + 1, 3, H, 2 W)
    frames = F.interpolate(frames.float(), scale_factor=max(1, 192 // frames.shape[2])).byte()
    first, *rest = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames)
    with atomic_write(animation) as temporary:
        times = [600] + [250] * (len(rest) - 1) + [1500]                                         # ms
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=times, loop=0)


# ---- completing ----


def complete(model: MaskGIT, pairs: list[Pair], args: argparse.Namespace) -> int:
    """Complete and write all pictures; returns how many. Reading, computing and writing go on side by side."""
    from models.completion import Job, complete_pictures
    from pictures.ahead import write_behind

    at_work: deque[Task] = deque()
    done = 0

    def jobs() -> Iterator[Job]:
        for task in read_tasks(pairs, args):
            at_work.append(task)
            yield Job(task.picture.rgb(), task.hole, task.seed)

    results = complete_pictures(
        model, jobs(), batch_size=args.batch_size, paste=args.paste, precision=args.precision, keep_rounds=args.save_steps,
        schedule=args.mask_func, total_iter=args.total_iter, sweet_spot=args.sweet_spot, decoder=args.decoder,
        temperature=args.temperature, choice_temperature=args.choice_temperature,
    )    # fmt: skip
    with (
        progress(total=len(pairs) * args.num_samples, desc="completing", unit="picture") as bar,
        write_behind(AT_ONCE) as write,
    ):
        try:
            for result in results:
                task = at_work.popleft()
                write(task.hole.numel(), write_result, task, result, args)
                bar.update()
                done += 1
        except UserError as error:
            if not done:
                raise
            raise UserError(f"{error}; the {done:,} picture(s) before it are completed", exit_code=1) from error
    if not done:
        raise UserError(f"none of the {len(pairs)} pictures in {args.images} could be used")
    return done


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from models import MaskGIT

    check_args(args)
    device = pick_device(args.device)
    pairs = find_pairs(args)
    model = MaskGIT.from_pretrained(args.checkpoint, device=device)
    if args.compile:
        model.transformer.compile_blocks()
    writable_folder(args.output)
    started = time.perf_counter()
    done = complete(model, pairs, args)
    seconds = time.perf_counter() - started
    print(f"completed {done} pictures in {seconds:.1f} s ({done / seconds:.1f} pictures/s): {Path(args.output) / 'images'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
