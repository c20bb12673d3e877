"""A page in the browser: paint a hole into a picture and see it filled in.

The bundled weights, at http://127.0.0.1:7860:   python -m demo
Your own:                                        python -m demo --checkpoint RUN/maskgit.safetensors --port 8000

Needs Gradio: pip install -r requirements-demo.txt. The page works without a network: it loads everything from this server
and reports nothing to anyone. What you don't paint over comes back bit for bit.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from utils import Parser, UserError, run_cli

HERE = Path(__file__).resolve().parent.parent
CANVAS_MEGABYTES = 5    # the browser sends the canvas, 1024x1024 RGBA, as a file
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m demo", description=__doc__)
    flag = parser.add_argument
    flag("--checkpoint",
         help="model: cat64, photo, a file or a folder (default: cat64 for pictures of 64x64, photo for others)")
    flag("--samples", default=str(HERE / "samples"), help="folder with images/ and masks/, photo/ and photo_masks/")
    flag("--host", default="127.0.0.1", help="address to listen at (default: this computer only)")
    flag("--port", type=int, default=7860, help="default: %(default)s")
    flag("--root-path", default="", metavar="PATH", help="path of the page behind a proxy, e.g. /inpainting")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto",
         help="auto: bf16 where the hardware multiplies in it (default: %(default)s)")
    flag("--max-pixels", type=int, default=24_000_000, help="largest picture to accept (default: %(default)s)")
    flag("--max-megabytes", type=int, default=24, help="largest file to accept (default: %(default)s)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port must lie in 1..65535, got {args.port}")
    if args.max_pixels < 1:
        raise UserError(f"--max-pixels must be at least 1, got {args.max_pixels}")
    if args.max_megabytes < CANVAS_MEGABYTES:
        raise UserError(f"--max-megabytes must be at least {CANVAS_MEGABYTES}, as large as the editor's canvas can become, "
                        f"got {args.max_megabytes}")    # fmt: skip
    if args.root_path and not args.root_path.startswith(("/", "http://", "https://")):
        raise UserError(f"--root-path must begin with /, e.g. /inpainting, got {args.root_path!r}")
    if args.host not in LOOPBACK:
        print(
            f"notice: with --host {args.host} everyone who reaches port {args.port} can use the page:\n"
            f"upload files of up to {args.max_megabytes} MB, keep the processor busy. There is no password or encryption.",
            file=sys.stderr,
        )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_args(args)
    try:
        # After the arguments: --help should not wait for Gradio and PyTorch.
        from demo.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("gradio", "starlette"):
            raise
        sentence = "the page needs the package gradio; install it with: pip install -r requirements-demo.txt"
        raise UserError(sentence) from error
    serve(args)
    return 0


if __name__ == "__main__":
    run_cli(main)
