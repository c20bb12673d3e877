"""Put the parts of a model into one file to share: half precision, config and notes in its metadata.

    python export.py --transformer runs/maskgit/best.pt --vqgan runs/vqgan/last.pt --output out/cat.safetensors

`--transformer` is a stage-2 checkpoint (its averaged weights are taken). `--vqgan` replaces the VQGAN inside it by a better
one for the same tokens: a stage-1 checkpoint or a model file, e.g. of training_finish.py. `--average` names a model that the
stage-2 training began from (--init): the mean of both transformers is often better than either (model soups, Wortsman et al.
2022, https://arxiv.org/abs/2203.05482). `--average-decoder` does the same for the decoder and a model that the finish went
on from. `--eight-bit` rounds most weights to 8 bits: the file is little more than half as large, its tokens are the same,
and it completes a little otherwise (docs/training.md says by how much).
"""
import argparse
from pathlib import Path

import torch

import tasks
from models.maskgit import MaskGIT
from models.transformer import TransformerConfig
from models.vqgan import VQGANConfig
from training.checkpoints import load_checkpoint
from training.weights import tokenizer_difference, trained_decoder, trained_transformer
from utils import Parser, UserError, run_cli, writable_folder

RESERVED = {"format", "library", "config", "self", "path", "dtype", "eight_bit"}    # what `MaskGIT.save_file` means by these


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformer", required=True, help="stage-2 checkpoint (last.pt or best.pt)")
    parser.add_argument("--vqgan", help="stage-1 checkpoint or .safetensors model with a better decoder for the same tokens")
    parser.add_argument("--average", metavar="FILE", help="model whose transformer is averaged with the checkpoint's")
    parser.add_argument("--average-decoder", metavar="FILE", help="model whose decoder is averaged with the one here")
    parser.add_argument("--output", required=True, help="the .safetensors file to write")
    parser.add_argument("--eight-bit", action="store_true", help="round most weights to 8 bits, for a smaller file")
    parser.add_argument("--note", action="append", default=[], metavar="KEY=VALUE", help="goes into the file's metadata")
    return parser.parse_args(argv)


def vqgan_of(path: str) -> tuple[dict[str, torch.Tensor], int]:
    """The (averaged) VQGAN weights of a stage-1 checkpoint or of a model file, and the context its decoder takes."""
    if path.endswith(".safetensors"):
        vqgan = tasks.load_model(path, torch.device("cpu")).vqgan
        return vqgan.state_dict(), vqgan.config.context_dim
    return load_checkpoint(path, "vqgan-training")["ema"], 0


def assemble(transformer: str, vqgan: str | None) -> MaskGIT:
    """The whole model of a stage-2 checkpoint, with another VQGAN's decoder if asked for."""
    state = load_checkpoint(transformer, "transformer-training")
    config, weights = VQGANConfig(**state["config"]["vqgan"]), dict(state["vqgan"])
    if vqgan:
        better, config.context_dim = vqgan_of(vqgan)
        for name, value in weights.items():
            if name not in better or better[name].shape != value.shape:
                raise UserError(f"--vqgan {vqgan} has another architecture than {transformer} ({name})")
        if name := tokenizer_difference(better, weights):
            raise UserError(f"--vqgan {vqgan} makes other tokens than {transformer} was trained on ({name})")
        weights |= {name: value for name, value in better.items() if name.startswith("decoder.")}
    model = MaskGIT(config, TransformerConfig(**state["config"]["transformer"]))
    model.transformer.load_state_dict(state["ema"])
    model.vqgan.load_state_dict(weights)
    return model.eval()


def average(part: torch.nn.Module, theirs: dict[str, torch.Tensor]) -> None:
    """Give `part` the mean of its own weights and another's."""
    part.load_state_dict({name: (value + theirs[name]) / 2 for name, value in part.state_dict().items()})


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    notes = dict(note.partition("=")[::2] for note in args.note)
    if not args.output.endswith(".safetensors"):
        raise UserError(f"--output must end in .safetensors, got {args.output}")
    if "" in notes or set(notes) & RESERVED:
        raise UserError(f"--note must be KEY=VALUE with a key other than {', '.join(sorted(RESERVED))}")
    model = assemble(args.transformer, args.vqgan)
    if args.average:
        average(model.transformer, trained_transformer("--average", args.average, model))
    if args.average_decoder:
        theirs = trained_decoder("--average-decoder", args.average_decoder, model)
        average(model.vqgan.decoder, theirs)
    writable_folder(Path(args.output).parent)
    model.save_file(args.output, eight_bit=args.eight_bit, **notes)
    print(f"wrote {args.output} ({Path(args.output).stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_cli(main)
