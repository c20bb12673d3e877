"""Complete the missing parts of pictures.

The bundled samples:  python inpainting.py
Your own:             python inpainting.py --images PICTURES --masks MASKS --mask-func cosine --total-iter 10 --output out

Pictures and masks are paired by name (a single mask serves all pictures); black in a mask is the hole. Any size works: the
picture is shrunk to the model's size, completed, and the hole's content pasted into the untouched original.

Writes OUTPUT/images/NAME.png, and with --save-steps OUTPUT/steps/NAME.png (the input, then the picture after every round),
OUTPUT/masks/NAME.png (the tokens still masked after every round, white) and OUTPUT/steps/NAME.gif.
"""
import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from models import MaskGIT
from models.decoding import DECODERS, Round
from models.convert import finish, shrink
from models.schedule import SCHEDULES
from pictures.images import to_uint8, write_image
from tasks import Pair, add_flags, check_counts, load_model, read_pair, usable_pairs
from utils import Parser, UserError, atomic_write, pick_device, run_cli, seeded, writable_folder


@dataclass
class Job:
    """One completion to make."""

    name: str        # of the output file, without suffix
    image: Tensor    # (3, H, W) uint8
    hole: Tensor     # (1, H, W) bool
    seed: int


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    flag = parser.add_argument
    flag("--mask-func", default="cosine", metavar="NAME", help=f"schedule: {', '.join(SCHEDULES)} (default: %(default)s)")
    flag("--total-iter", type=int, default=10, help="T, rounds of the schedule (default: %(default)s)")
    flag("--sweet-spot", type=int, help="stop after this round, 1..T; the schedule still follows T (default: T)")
    flag("--decoder", default="maskgit", metavar="NAME", help=f"{', '.join(DECODERS)} (default: %(default)s)")
    flag("--temperature", type=float, default=1.0, help="0: likeliest token, below 1: safer, above: more variety "
                                                   "(default: %(default)s)")    # fmt: skip
    flag("--choice-temperature", type=float, default=4.5, help="noise in the order of filling (default: %(default)s)")
    flag("--num-samples", type=int, default=1, help="completions of each picture: NAME_s0.png, NAME_s1.png, ...")
    flag("--seed", type=int, default=0)
    flag("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is about twice as fast (default: %(default)s)")
    flag("--compile", action="store_true", help="compile the transformer's blocks (torch.compile): half a minute's wait, "
                                                "which pays for many pictures; it rounds otherwise")    # fmt: skip
    flag("--save-steps", action="store_true", help="write pictures, token masks and an animation of the rounds")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before anything is read or written."""
    if args.mask_func not in SCHEDULES:
        raise UserError(f"unknown --mask-func {args.mask_func!r}; expected one of {', '.join(SCHEDULES)}")
    if args.decoder not in DECODERS:
        raise UserError(f"unknown --decoder {args.decoder!r}; expected one of {', '.join(DECODERS)}")
    check_counts(args, "total_iter", "batch_size", "num_samples")
    if args.sweet_spot is not None and not 1 <= args.sweet_spot <= args.total_iter:
        raise UserError(f"--sweet-spot must lie in 1..{args.total_iter} (--total-iter), got {args.sweet_spot}")
    for name in ("temperature", "choice_temperature"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}")


def jobs(args: argparse.Namespace, pairs: list[Pair]) -> Iterator[Job]:
    """Every completion to make. Its seed depends on --seed, the picture's name and the sample's number only."""
    for stem, image_path, mask_path in pairs:
        image, hole = read_pair(image_path, mask_path, args.mask_hole)
        if not bool(hole.any()):
            print(f"notice: mask {mask_path.name} has no hole; {image_path.name} is copied through", file=sys.stderr)
        for i in range(args.num_samples):
            name = f"{stem}_s{i}" if args.num_samples > 1 else stem
            yield Job(name, image, hole, seeded(args.seed, stem, i).initial_seed())


def complete_batch(model: MaskGIT, batch: list[Job], args: argparse.Namespace, output: Path) -> None:
    """Complete the pictures of a batch and write what was asked for."""
    small = [shrink(job.image, job.hole, model.image_size) for job in batch]
    image = torch.cat([x for x, _ in small]).to(model.device)                  # (B, 3, H, W)
    mask = torch.cat([m for _, m in small]).to(model.device)                   # (B, 1, H, W)
    done = model.complete(
        image, mask, [job.seed for job in batch], schedule=args.mask_func, total_iter=args.total_iter,
        sweet_spot=args.sweet_spot, decoder=args.decoder, temperature=args.temperature,
        choice_temperature=args.choice_temperature,
    )    # fmt: skip
    for job, picture in zip(batch, done.images.cpu(), strict=True):
        write_image(output / "images" / f"{job.name}.png", finish(picture, job.image, job.hole, args.paste))
    if args.save_steps:
        pictures = [model.decode(r.tokens, image, mask, done.known.context) for r in done.rounds]
        decoded = torch.stack(pictures)                                                       # (T, B, 3, H, W)
        for i, job in enumerate(batch):
            shown = torch.where(mask[i].bool(), decoded[:, i], image[i]) if args.paste else decoded[:, i]
            before = image[i].masked_fill(mask[i].bool(), 0)
            pictures = to_uint8(torch.cat([before[None], shown])).cpu()                       # (T + 1, 3, H, W)
            write_steps(job, pictures, token_masks(model, mask, done.rounds, i), output)


def token_masks(model: MaskGIT, mask: Tensor, rounds: list[Round], i: int) -> Tensor:
    """Picture i's masked tokens before the first and after every round: (T + 1, 3, H, W) uint8, white = masked."""
    stride = model.vqgan.config.stride
    first = F.max_pool2d(mask[i : i + 1], stride).flatten(1).bool()            # (1, N)
    grids = torch.cat([first] + [r.masked[i : i + 1] for r in rounds])         # (T + 1, N)
    grids = grids.view(len(grids), 1, mask.shape[2] // stride, -1).float() * 255
    return F.interpolate(grids, scale_factor=stride).expand(-1, 3, -1, -1).to(torch.uint8).cpu()


def write_steps(job: Job, pictures: Tensor, masks: Tensor, output: Path) -> None:
    """Two strips and an animation of the rounds; pictures and masks: (T + 1, 3, H, W) uint8."""
    per_row = min(len(pictures), 11)
    for folder, images in (("steps", pictures), ("masks", masks)):
        write_image(output / folder / f"{job.name}.png", make_grid(images, nrow=per_row, padding=2, pad_value=128))
    frames = torch.cat([pictures, masks], dim=3)                               # (T + 1, 3, H, 2 W)
    frames = F.interpolate(frames.float(), scale_factor=3).to(torch.uint8)     # nearest: pixels stay pixels
    first, *rest = (Image.fromarray(f.permute(1, 2, 0).numpy()) for f in frames)
    with atomic_write(output / "steps" / f"{job.name}.gif") as temporary:
        times = [600] + [250] * (len(rest) - 1) + [1500]                       # ms
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=times, loop=0)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_args(args)
    device = pick_device(args.device)
    pairs = usable_pairs(args)
    model = load_model(args.checkpoint, device)
    if args.compile:
        model.transformer.compile_blocks()
    output = writable_folder(args.output)

    total = len(pairs) * args.num_samples
    started = time.perf_counter()
    stream = jobs(args, pairs)
    with tqdm(total=total, unit="picture", disable=None) as progress:
        while batch := list(islice(stream, args.batch_size)):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                complete_batch(model, batch, args, output)
            progress.update(len(batch))
    seconds = time.perf_counter() - started
    print(f"completed {total} pictures in {seconds:.1f} s ({total / seconds:.1f} pictures/s): {output / 'images'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
