"""Make pictures from nothing: every token masked, filled in T rounds.

    python generate.py --count 16 --total-iter 16 --output out/generated

Writes OUTPUT/images/NAME.png and, with --holes, OUTPUT/masks/NAME.png with random holes (black), which is how the bundled
samples were made.
"""
import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from models import MaskGIT
from models.decoding import DECODERS
from models.schedule import SCHEDULES
from pictures.holes import random_holes
from pictures.images import to_uint8, write_image
from utils import Parser, UserError, pick_device, run_cli, seeded, writable_folder

HERE = Path(__file__).resolve().parent.parent


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--checkpoint", default=str(HERE / "checkpoints/cat64.safetensors"), help="model (default: the bundled one)")
    flag("--output", default="out/generated", help="folder for the results (default: %(default)s)")
    flag("--count", type=int, default=16, help="number of pictures (default: %(default)s)")
    flag("--seeds", type=int, nargs="+", help="one picture for each of these seeds, instead of --count and --seed")
    flag("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    flag("--mask-func", default="arccos", choices=SCHEDULES, help="schedule (default: %(default)s)")
    flag("--total-iter", type=int, default=16, help="T, rounds (default: %(default)s)")
    flag("--decoder", default="maskgit", choices=DECODERS)
    flag("--temperature", type=float, default=0.9, help="below 1: safer, more alike (default: %(default)s)")
    flag("--choice-temperature", type=float, default=6.0, help="noise in the order of filling (default: %(default)s)")
    flag("--batch-size", type=int, default=16)
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--holes", action="store_true", help="also write a random hole mask for each picture")
    return parser.parse_args(argv)


@torch.no_grad()
def generate(model: MaskGIT, seeds: list[int], **options) -> torch.Tensor:
    """One picture for each seed: (B, 3, H, W) uint8. `options`: see `models.decoding.iterative_decode`."""
    size = model.image_size
    image = torch.zeros(len(seeds), 3, size, size, device=model.device)
    mask = torch.ones(len(seeds), 1, size, size, device=model.device)
    return to_uint8(model.complete(image, mask, seeds, **options).images).cpu()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.count < 1 or args.batch_size < 1:
        raise UserError(f"--count and --batch-size must be at least 1, got {args.count} and {args.batch_size}")
    device = pick_device(args.device)
    output = writable_folder(args.output)
    seeds = args.seeds or list(range(args.seed, args.seed + args.count))
    options = {
        "schedule": args.mask_func, "total_iter": args.total_iter, "decoder": args.decoder,
        "temperature": args.temperature, "choice_temperature": args.choice_temperature,
    }    # fmt: skip
    try:
        model = MaskGIT.from_pretrained(args.checkpoint).to(device)
        with tqdm(total=len(seeds), unit="picture", disable=None) as progress:
            for start in range(0, len(seeds), args.batch_size):
                part = seeds[start : start + args.batch_size]
                for seed, picture in zip(part, generate(model, part, **options), strict=True):
                    write_image(output / "images" / f"cat_{seed:05d}.png", picture)
                    if args.holes:
                        hole = random_holes(1, model.image_size, seeded("generated hole", seed))[0]
                        mask = torch.where(hole, 0, 255).byte().expand(3, -1, -1)
                        write_image(output / "masks" / f"cat_{seed:05d}.png", mask)
                progress.update(len(part))
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"made {len(seeds)} pictures: {output / 'images'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
