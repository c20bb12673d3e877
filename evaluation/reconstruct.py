"""Decode the true tokens of pictures: the best that any completion of tokens could give.

Holes pasted in:       python reconstruct.py --images ORIGINALS --masks MASKS --output out/true
The tokenizer alone:   python reconstruct.py --images ORIGINALS --masks MASKS --output out/tokenizer --no-known --no-paste

The pictures must be clean: their tokens are made with nothing hidden. Only then is the hole cut, and the decoder gets the
tokens with the known pixels, as in inpainting.py, or with --no-known the tokens alone. (The reference decoder never takes
known pixels, so there --no-known changes nothing.) Writes OUTPUT/images/NAME.png.
"""
import argparse

import torch
from torch import Tensor
from tqdm import tqdm

from models import MaskGIT
from models.pictures import finish, shrink
from pictures.images import write_image
from tasks import Pair, add_flags, check_counts, load_model, read_pair, usable_pairs
from utils import Parser, UserError, pick_device, run_cli, writable_folder


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--known", action=argparse.BooleanOptionalAction, default=True,
                        help="show known pixels and hole to the decoder")    # fmt: skip
    return parser.parse_args(argv)


def is_blank(image: Tensor, hole: Tensor) -> bool:
    """Whether a picture has one colour in its hole, as masked pictures do."""
    inside = image[:, hole[0]]    # (3, hole pixels)
    return bool(hole.any()) and bool((inside == inside[:, :1]).all())


def check_clean(args: argparse.Namespace, pairs: list[Pair]) -> None:
    if all(is_blank(*read_pair(image, mask, args.mask_hole)) for _, image, mask in pairs):
        raise UserError(f"all pictures in {args.images} are blank in their holes: give the originals as --images")


@torch.no_grad()
def reconstruct(model: MaskGIT, images: list[Tensor], holes: list[Tensor], known: bool) -> Tensor:
    """Encode whole pictures and decode their tokens.

    Args:
        images, holes: B pictures (3, H, W) uint8 of any size and their holes (1, H, W) bool.
        known: give the decoder the known pixels and the hole.
    Returns:
        (B, 3, size, size) in [-1, 1], of the model's size, nothing pasted.
    """
    whole = torch.cat([shrink(image, torch.zeros_like(hole), model.image_size)[0]
                       for image, hole in zip(images, holes, strict=True)])                    # (B, 3, size, size)
    tokens = model.vqgan.encode(whole.to(model.device))                                        # (B, N)
    if not known:
        return model.vqgan.decode(tokens).float().clamp(-1, 1)
    small = [shrink(image, hole, model.image_size) for image, hole in zip(images, holes, strict=True)]
    image, mask = (torch.cat(parts).to(model.device) for parts in zip(*small, strict=True))
    return model.decode(tokens, image.masked_fill(mask.bool(), 0), mask)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_counts(args, "batch_size")
    device = pick_device(args.device)
    pairs = usable_pairs(args)
    check_clean(args, pairs)
    model = load_model(args.checkpoint, device)
    folder = writable_folder(args.output) / "images"

    with tqdm(total=len(pairs), unit="picture", disable=None) as progress:
        for start in range(0, len(pairs), args.batch_size):
            batch = pairs[start : start + args.batch_size]
            images, holes = zip(*(read_pair(image, mask, args.mask_hole) for _, image, mask in batch), strict=True)
            decoded = reconstruct(model, images, holes, args.known).cpu()
            for (stem, _, _), picture, image, hole in zip(batch, decoded, images, holes, strict=True):
                write_image(folder / f"{stem}.png", finish(picture, image, hole, args.paste))
            progress.update(len(batch))
    print(f"reconstructed {len(pairs)} pictures: {folder}")
    return 0


if __name__ == "__main__":
    run_cli(main)
