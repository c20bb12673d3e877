"""Complete the missing parts of pictures.

The bundled samples:  python inpainting.py
Your own:             python inpainting.py --images PICTURES --masks MASKS --output out

PICTURES and MASKS are folders (subfolders are read too) or files; a single mask serves all pictures. Black in a mask is the
hole (--mask-hole white: white is); of a mask with transparent parts these decide, and a notice says how. Pictures and masks
are paired by name; where no names are the same, by what differs in them (image_001 and mask_001). Whatever Pillow can read
is a picture, whatever its suffix.

Writes OUTPUT/images/NAME.png. Outside the hole it says what the picture's file says: 16 bits a channel, the alpha channel,
the colour profile, EXIF data and resolution are kept; an EXIF orientation is applied. Not kept: comments (XMP too),
thumbnails, further frames of an animation, CMYK.
With --save-steps also OUTPUT/steps/NAME.png (the input, then the picture after every round), OUTPUT/masks/NAME.png (the
tokens still masked after every round, white) and OUTPUT/steps/NAME.gif.
"""
from __future__ import annotations

import argparse
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils import (
    Parser,
    UserError,
    amount,
    atomic_write,
    check_names,
    count,
    notice,
    pick_device,
    progress,
    run_cli,
    seeded,
    writable_folder,
)

if TYPE_CHECKING:    # slow to import, and --help does without
    from torch import Tensor

    from models import MaskGIT
    from models.completion import Result, Snapshot
    from pictures.images import Picture

SAMPLES = Path(__file__).resolve().parent / "samples"
AT_ONCE = 16_000_000    # pixels that wait for the model or the disk; smaller sets are read before anything is written
SMALL = (64, 64)        # width and height of the pictures that cat64.safetensors is for
STEP_SIDE = 512         # pixels, the longer side of a round's picture with --save-steps
LONGEST_NAME = 255      # bytes, on all common file systems

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
    flag("--checkpoint",
         help="model: cat64, photo, a file or a folder (default: cat64 for pictures of 64x64, photo for others)")
    flag("--images", default=str(SAMPLES / "images"), help="picture or folder (default: the bundled samples)")
    flag("--masks", default=str(SAMPLES / "masks"), help="mask or folder; black = hole, see --mask-hole")
    flag("--mask-hole", choices=("black", "white"), default="black", help="colour of the hole (default: %(default)s)")
    flag("--output", default="out", help="folder for the results (default: %(default)s)")
    flag("--paste", action=argparse.BooleanOptionalAction, default=True, help="put the known pixels back, bit for bit")
    flag("--total-iter", type=count, metavar="T", help="rounds of a schedule (default: as many as needed)")
    flag("--max-iter", type=count, default=8, metavar="N", help="most rounds without --total-iter (default: %(default)s)")
    flag("--mask-func", default="cosine", metavar="NAME",
         help="schedule of --total-iter: cosine, linear, square, sqrt, cubic or arccos (default: %(default)s)")
    flag("--sweet-spot", type=count, help="stop after this round, 1..T; the schedule still follows T (default: T)")
    flag("--decoder", default="maskgit", metavar="NAME", help="maskgit, halton or reference (default: %(default)s)")
    flag("--temperature", type=amount, default=1.0,
         help="0: likeliest token, below 1: safer, above: more variety (default: %(default)s)")
    flag("--choice-temperature", type=amount, default=4.5, help="noise in the order of filling (default: %(default)s)")
    flag("--num-samples", type=count, default=1, help="completions of each picture: NAME_s0.png, NAME_s1.png, ...")
    flag("--seed", type=int, default=0, help="another one gives other completions (default: %(default)s)")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto",
         help="auto: bf16, about twice as fast, where the hardware multiplies in it (default: %(default)s)")
    flag("--compile", action="store_true",
         help="compile the transformer's blocks (torch.compile): takes about 30 s, worth it for many pictures; results "
              "differ by rounding")
    flag("--save-steps", action="store_true", help="write pictures, token masks and an animation of the rounds")
    flag("--batch-size", type=count, default=16, help="pictures computed together (default: %(default)s)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (Apple; untried)")
    flag("--skip-bad", action="store_true", help="leave out pictures that can't be used instead of stopping")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what the parser can't, before anything is read or written."""
    from models.decoding import DECODERS
    from models.schedule import SCHEDULES

    check_names("--mask-func", [args.mask_func], SCHEDULES)
    check_names("--decoder", [args.decoder], DECODERS)
    if args.sweet_spot is not None and args.total_iter is None:
        raise UserError("--sweet-spot is a round of --total-iter: give --total-iter too")
    if args.sweet_spot is not None and args.sweet_spot > args.total_iter:
        raise UserError(f"--sweet-spot must lie in 1..{args.total_iter} (--total-iter), got {args.sweet_spot}")


# ---- files ----


def find_pairs(args: argparse.Namespace) -> list[Pair]:
    """The pairs, when it is sure that nothing which is read will be written over."""
    from pictures.files import pair, refuse_overwriting

    pairs = pair(args.images, args.masks, leave_out=[args.output])
    folders = [folder for folder in (args.images, args.masks) if not is_inside(args.output, folder)]
    files = [file for _, *both in pairs for file in both]
    names = [sample_name(name, i, args) for name, *_ in pairs for i in range(args.num_samples)]
    written = [path for name in names for path in outputs(name, args)]
    refuse_overwriting([*files, *folders, *([args.checkpoint] if args.checkpoint else [])], written)
    for path in written:
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UserError(f"{path} would have a name of more than {LONGEST_NAME} bytes; shorten the picture's name")
    return pairs


def by_checkpoint(pairs: list[Pair], args: argparse.Namespace) -> dict[str, list[Pair]]:
    """The pairs by the model that completes them."""
    from models.files import bundled

    small, photo = str(bundled("cat64")), str(bundled("photo"))
    if args.checkpoint:
        return {args.checkpoint: pairs}
    if not os.path.exists(photo):
        return {small: pairs}
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(photo if size_of(pair[1]) not in (SMALL, None) else small, []).append(pair)
    if photo in groups:
        notice(f"{len(groups[photo]):,} picture(s) are not {SMALL[0]}x{SMALL[1]}: completed with {Path(photo).name} "
               "(--checkpoint overrides)")    # fmt: skip
    return groups


def size_of(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture; None of a file that can't be read, which is told when it is its turn."""
    from pictures.images import read_size

    try:
        return read_size(path)
    except UserError:
        return None


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
    from pictures.images import read_picture
    from pictures.masks import check_hole, read_mask

    read_mask = lru_cache(maxsize=1)(read_mask)    # one mask may serve all pictures

    def pixels(pair: Pair) -> int:
        return math.prod(size_of(pair[1]) or (0,))

    def read(pair: Pair) -> tuple[Picture, Tensor]:
        picture, mask = read_picture(pair[1]), read_mask(pair[2], args.mask_hole)
        check_hole(mask, pair[2], args.mask_hole, picture.pixels.shape[:2], pair[1].name)
        return picture, mask

    skip = (lambda error: notice(f"skipped: {error}")) if args.skip_bad else None
    for (name, image_path, mask_path), (picture, hole) in read_ahead(read, pairs, pixels, AT_ONCE, skip):
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

    size = rounds[-1].picture.shape[1:]
    size = [max(1, round(side * min(1, STEP_SIDE / max(size)))) for side in size]

    def fit(image: Tensor) -> Tensor:    # nearest: pixels stay pixels
        return F.interpolate(image[None].float(), size=size)[0].byte()

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


def complete(
    model: MaskGIT, pairs: list[Pair], precision: str, args: argparse.Namespace, on_written: Callable[[int], None]
) -> None:
    """Complete and write pictures. Reading, computing and writing go on side by side.

    `on_written` is called for each picture with the number of its rounds.
    """
    from models.completion import Job, complete_pictures
    from pictures.ahead import write_behind

    at_work: deque[Task] = deque()

    def jobs() -> Iterator[Job]:
        for task in read_tasks(pairs, args):
            at_work.append(task)
            yield Job(task.picture.rgb(), task.hole, task.seed)

    results = complete_pictures(
        model, jobs(), batch_size=args.batch_size, paste=args.paste, precision=precision, keep_rounds=args.save_steps,
        schedule=args.mask_func, total_iter=args.total_iter, max_iter=args.max_iter, sweet_spot=args.sweet_spot,
        decoder=args.decoder, temperature=args.temperature, choice_temperature=args.choice_temperature,
    )    # fmt: skip
    with write_behind(AT_ONCE) as write:
        for result in results:
            task = at_work.popleft()
            write(task.hole.numel(), write_result, task, result, args)
            on_written(result.steps)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from models import MaskGIT
    from models.files import find
    from models.precision import pick_precision

    check_args(args)
    if args.checkpoint:    # what is read for this name, so that it is not written over
        args.checkpoint = str(find(args.checkpoint)[0])
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    pairs = find_pairs(args)
    groups = [(MaskGIT.from_pretrained(path, device=device), part) for path, part in by_checkpoint(pairs, args).items()]
    if args.compile:
        for model, _ in groups:
            model.transformer.compile_blocks()
    writable_folder(args.output)
    started = time.perf_counter()
    steps: list[int] = []
    with progress(total=len(pairs) * args.num_samples, desc="completing", unit="picture") as bar:

        def written(rounds: int) -> None:
            steps.append(rounds)
            bar.update()

        try:
            for model, part in groups:
                complete(model, part, precision, args, written)
        except UserError as error:
            if not steps:
                raise
            raise UserError(f"{error}; {len(steps):,} picture(s) are completed, the others are not", exit_code=1) from error
    if not steps:
        raise UserError(f"none of the {len(pairs)} pictures in {args.images} could be used")
    seconds = time.perf_counter() - started
    speed = f"{len(steps) / seconds:.1f} pictures/s, {sum(steps) / len(steps):.1f} rounds each, {precision}"
    print(f"completed {len(steps)} pictures in {seconds:.1f} s ({speed}): {Path(args.output) / 'images'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
