"""Serves the page. The server fetches nothing from elsewhere, and neither does the visitor's browser. Needs Gradio."""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from demo.page import Page
from demo.photos import find_samples
from models import MaskGIT
from models.files import BUNDLED, bundled
from utils import UserError, pick_device

CSS = Path(__file__).with_name("page.css")
SESSIONS = 32    # visitors whose pictures are kept in memory


class OnlyFromHere:
    """ASGI middleware: the server fetches nothing from elsewhere, and the browser may load nothing from elsewhere."""

    POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", []).append((b"content-security-policy", self.POLICY.encode()))
            await send(message)

        if scope["type"] == "http" and re.search(r"/(file|proxy)=\w+:", scope["path"]):    # Gradio would fetch the address
            await send_with_policy({"type": "http.response.start", "status": 403})
            await send({"type": "http.response.body", "body": b"Addresses are not fetched here."})
            return
        with contextlib.suppress(ClientDisconnect):    # a visitor who leaves is no error
            await self.app(scope, receive, send_with_policy)


async def refuse_address(*_: Any) -> None:
    raise gr.Error("Addresses are not fetched here; upload a file.", print_exception=False)


def launch(page: Page, args: argparse.Namespace) -> gr.Blocks:
    """Start the server in its own threads."""
    blocks = page.blocks
    gr.processing_utils.async_ssrf_protected_get = refuse_address    # Gradio would fetch "uploads" that are addresses
    try:
        blocks.launch(
            server_name=args.host, server_port=args.port, root_path=args.root_path, prevent_thread_lock=True, quiet=True,
            share=False, inbrowser=False, css_paths=[CSS], footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"], primary_hue="pink"),
            max_file_size=f"{args.max_megabytes}mb", state_session_capacity=SESSIONS, mcp_server=False,
            enable_monitoring=False, app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
        )    # fmt: skip
    except OSError as error:
        where = f"{args.host}:{args.port}"
        raise UserError(f"can't listen at {where}: in use, or not of this computer; try another --port") from error
    return blocks


def load_models(args: argparse.Namespace) -> tuple[MaskGIT, MaskGIT]:
    """The model for pictures of 64x64, and the one for all others."""
    device = pick_device(args.device)
    paths = [args.checkpoint] if args.checkpoint else [path for path in map(bundled, BUNDLED) if path.exists()]
    models = [MaskGIT.from_pretrained(path, device=device, precision=args.precision) for path in paths]
    return models[0], models[-1]


def serve(args: argparse.Namespace) -> None:
    """Load the model and serve the page until it is stopped."""
    models = load_models(args)
    Image.MAX_IMAGE_PIXELS = args.max_pixels // 2 + 1    # Pillow refuses twice that, whoever opens the picture
    warnings.simplefilter("ignore")                      # the page says what there is to say
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # so that the temporary folder is removed
    with tempfile.TemporaryDirectory(prefix="maskgit-demo-") as folder:    # everything that the page writes
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ALLOWED_PATHS": ""}
        made = Path(folder) / "made"
        made.mkdir()
        page = Page(*models, find_samples(Path(args.samples)), args.max_pixels, made)
        blocks = launch(page, args)
        model = models[0]
        print(f"the page is at {blocks.local_url}, on {model.device} in {model.precision} (stop it with Ctrl-C)", flush=True)
        try:
            blocks.block_thread()
        finally:
            blocks.close()
