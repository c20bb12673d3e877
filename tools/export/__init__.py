"""Write a model as one file to share, or as ONNX files for programs without PyTorch.

One file:  python -m tools.export --transformer runs/maskgit/best.pt --output out/cat.safetensors
ONNX:      python -m tools.export --onnx out/onnx

--transformer is a stage-2 checkpoint, whose averaged weights are taken. --vqgan takes the decoder from a stage-1 checkpoint
or a model file, such as that of training_finish.py; its tokens must be the same. --average names another model: the mean of
both transformers is often better than either (model soups, Wortsman et al. 2022, https://arxiv.org/abs/2203.05482).
--average-decoder does the same for the decoders. --eight-bit rounds most weights to 8 bits: the file is half as large, its
tokens are the same, completions differ a little. --temperature sets what a sampling temperature of 1 stands for in this
model.

--onnx writes encoder, transformer, decoder, codebook and configs of a model file (--checkpoint) into a folder;
docs/onnx_example.py completes a picture with them.
"""

import argparse
from pathlib import Path

from utils import Parser, UserError, writable_folder

RESERVED = {"format", "library", "config", "self", "path", "dtype", "eight_bit"}    # what `MaskGIT.save_file` means by these


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("--transformer", metavar="FILE", help="stage-2 checkpoint (last.pt or best.pt)")
    parser.add_argument("--vqgan", metavar="FILE", help="stage-1 checkpoint or model file with another decoder")
    parser.add_argument("--average", metavar="FILE", help="model whose transformer is averaged with the checkpoint's")
    parser.add_argument("--average-decoder", metavar="FILE", help="model whose decoder is averaged with the one here")
    parser.add_argument("--output", metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--eight-bit", action="store_true", help="round most weights to 8 bits, for a smaller file")
    parser.add_argument("--temperature", type=float, metavar="X", help="of the model: below 1 safer (default: 1)")
    parser.add_argument("--note", action="append", default=[], metavar="KEY=VALUE", help="goes into the file's metadata")
    parser.add_argument("--onnx", metavar="DIR", help="folder for ONNX files")
    parser.add_argument("--checkpoint", metavar="FILE", help="model file for --onnx (default: the bundled weights)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> dict[str, str]:
    """Refuse what makes no sense; returns the notes."""
    notes = dict(note.partition("=")[::2] for note in args.note)
    if "" in notes or set(notes) & RESERVED:
        raise UserError(f"--note must be KEY=VALUE with a key other than {', '.join(sorted(RESERVED))}")
    if not args.onnx and not args.output:
        raise UserError("nothing to write: give --output FILE with --transformer FILE, or --onnx DIR")
    if bool(args.output) != bool(args.transformer):
        raise UserError("--output and --transformer go together: give both, or --onnx DIR alone")
    if args.transformer and args.checkpoint:
        raise UserError("--checkpoint is for --onnx alone; with --transformer the new model is written")
    if args.temperature is not None and not (args.transformer and 0 < args.temperature <= 2):
        raise UserError(f"--temperature must lie in (0, 2] and be given with --transformer, got {args.temperature}")
    if args.output and not args.output.endswith(".safetensors"):
        raise UserError(f"--output must end in .safetensors, got {args.output}")
    return notes


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    notes = check_args(args)
    from models import MaskGIT  # PyTorch is slow to import

    if args.transformer:
        from tools.export.assemble import assemble

        model = assemble(args.transformer, args.vqgan, args.average, args.average_decoder)
        model.transformer.config.temperature = args.temperature or model.transformer.config.temperature
        writable_folder(Path(args.output).parent)
        model.save_file(args.output, eight_bit=args.eight_bit, **notes)
        written = [Path(args.output)]
    else:
        model, written = MaskGIT.from_pretrained(args.checkpoint), []
    if args.onnx:
        from tools.export.onnx_files import write_onnx

        written += write_onnx(model, Path(args.onnx))
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
