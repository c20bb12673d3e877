"""Make pictures from nothing: every token masked, filled in T rounds.

    python -m tools.generate --count 16 --total-iter 16 --output out/generated

Writes OUTPUT/images/NAME.png and, with --holes, OUTPUT/masks/NAME.png with random holes (black), which is how the bundled
samples were made.
"""
from __future__ import annotations

import argparse
from pathlib import Path

from utils import Parser, UserError, amount, check_names, count, pick_device, progress, run_cli, seeded, writable_folder


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m tools.generate", description=__doc__)
    flag = parser.add_argument
    flag("--checkpoint", metavar="FILE", help="model: a file, a folder, cat64 or photo (default: cat64)")
    flag("--output", default="out/generated", help="folder for the results (default: %(default)s)")
    flag("--count", type=count, default=16, help="number of pictures (default: %(default)s)")
    flag("--seeds", type=int, nargs="+", help="one picture for each of these seeds, instead of --count and --seed")
    flag("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    flag("--mask-func", default="arccos", metavar="NAME",
         help="schedule: cosine, linear, square, sqrt, cubic or arccos (default: %(default)s)")
    flag("--total-iter", type=count, default=16, help="T, rounds (default: %(default)s)")
    flag("--decoder", default="maskgit", metavar="NAME", help="maskgit, halton or reference (default: %(default)s)")
    flag("--temperature", type=amount, default=0.9, help="below 1: safer, more alike (default: %(default)s)")
    flag("--choice-temperature", type=amount, default=6.0, help="noise in the order of filling (default: %(default)s)")
    flag("--batch-size", type=count, default=16)
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--holes", action="store_true", help="also write a random hole mask for each picture")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what the parser can't, before anything is read or written."""
    from models.decoding import DECODERS
    from models.schedule import SCHEDULES

    check_names("--mask-func", [args.mask_func], SCHEDULES)
    check_names("--decoder", [args.decoder], DECODERS)
    if min(args.seeds or [args.seed]) < 0 or max(args.seeds or [args.seed + args.count]) >= 2**63:
        raise UserError("--seed and --seeds must be whole numbers from 0 to 2^63 - 1")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    import torch

    from models import MaskGIT
    from models.completion import Job, complete_pictures
    from models.files import find
    from pictures.files import refuse_overwriting
    from pictures.holes import random_holes
    from pictures.images import write_image

    check_args(args)
    device = pick_device(args.device)
    seeds = args.seeds or list(range(args.seed, args.seed + args.count))
    folder = Path(args.output)
    paths = {seed: folder / "images" / f"cat_{seed:05d}.png" for seed in seeds}
    checkpoint, _ = find(args.checkpoint)
    refuse_overwriting([checkpoint], paths.values())
    model = MaskGIT.from_pretrained(checkpoint, device=device)
    writable_folder(folder)
    size = model.image_size
    nothing, everywhere = torch.zeros(3, size, size, dtype=torch.uint8), torch.ones(1, size, size, dtype=torch.bool)
    results = complete_pictures(
        model, [Job(nothing, everywhere, seed) for seed in seeds], batch_size=args.batch_size, paste=False,
        schedule=args.mask_func, total_iter=args.total_iter, decoder=args.decoder, temperature=args.temperature,
        choice_temperature=args.choice_temperature,
    )    # fmt: skip
    for seed, result in zip(seeds, progress(results, total=len(seeds), desc="making", unit="picture"), strict=True):
        write_image(paths[seed], result.image)
        if args.holes:
            hole = random_holes(1, size, seeded("generated hole", seed))[0]
            write_image(folder / "masks" / paths[seed].name, torch.where(hole, 0, 255).byte().expand(3, -1, -1))
    print(f"made {len(seeds)} pictures: {folder / 'images'}")
    return 0


if __name__ == "__main__":
    run_cli(main)
