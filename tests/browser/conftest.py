"""A running demo with a tiny model, and a real headless Chromium to visit it. Skips with a reason where one is missing."""
import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import MaskGIT
from utils import load_config

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120    # seconds for whatever takes a moment; a busy machine takes longer
MAX_PIXELS, MAX_MEGABYTES = 4_000_000, 5
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]    # fmt: skip
# Without a graphics card the editor's canvas is drawn by the processor: five frames a second leave time for the rest.
FEWER_FRAMES = """{
    const frame = window.requestAnimationFrame.bind(window);
    window.requestAnimationFrame = draw => setTimeout(() => frame(draw), 200);
}"""


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray | Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, kind, **options)
    return buffer.getvalue()


@dataclass
class Server:
    url: str
    port: int
    folder: Path           # of its model and samples
    temporary: Path        # where it keeps what it was given and made
    log: Path              # its standard error
    contacted: list[str]   # what it asked a proxy for: nothing


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tiny model, three samples with masks, and room for temporary files."""
    pytest.importorskip("gradio", reason="needs gradio (requirements-demo.txt)")
    folder = tmp_path_factory.mktemp("demo")
    config = load_config(ROOT / "configs/tiny.yml")
    torch.manual_seed(0)
    MaskGIT(config["vqgan"], config["transformer"]).save_file(folder / "tiny.safetensors")
    for name in ("images", "masks", "temporary"):
        (folder / name).mkdir()
    for i in range(3):
        Image.fromarray(noise(32, 32, i)).save(folder / "images" / f"cat{i}.png")
        mask = np.full((32, 32), 255, dtype=np.uint8)
        mask[8:20, 6 + 4 * i : 18 + 4 * i] = 0
        Image.fromarray(mask).save(folder / "masks" / f"cat{i}.png")
    return folder


@contextlib.contextmanager
def running(folder: Path, *flags: str) -> Iterator[Server]:
    """The demo as a process of its own, at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with proxy() as (address, contacted):
        command = [
            sys.executable, "-m", "demo", "--checkpoint", str(folder / "tiny.safetensors"), "--samples", str(folder),
            "--device", "cpu", "--port", str(port), "--max-pixels", str(MAX_PIXELS), "--max-megabytes", str(MAX_MEGABYTES),
            *flags,
        ]    # fmt: skip
        environment = os.environ | {
            "HTTP_PROXY": address, "HTTPS_PROXY": address, "http_proxy": address, "https_proxy": address,
            "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "TMPDIR": str(folder / "temporary"),
            "GRADIO_ALLOWED_PATHS": "/", "PYTHONUNBUFFERED": "1",
        }    # fmt: skip
        with open(folder / f"{port}.txt", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            line = process.stdout.readline()
            assert "the page is at" in line, Path(log.name).read_text()
            yield Server(f"http://127.0.0.1:{port}/", port, folder, folder / "temporary", Path(log.name), contacted)
            process.terminate()
            process.wait(PATIENCE)


@pytest.fixture(scope="session")
def server(folder) -> Iterator[Server]:
    with running(folder) as server:
        yield server
    assert list(server.temporary.glob("maskgit-demo-*")) == []


@contextlib.contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """Takes connections and notes their first line: whoever speaks to it wanted to reach the outside."""
    heard: list[str] = []

    def listen() -> None:
        with contextlib.suppress(OSError):    # closed
            while True:
                with server.accept()[0] as connection:
                    heard.append(connection.recv(200).decode("latin-1").splitlines()[0])

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", heard


# ---- the browser ----


@pytest.fixture(scope="session")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-browser.txt)")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs a browser: chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page and what a user does on it."""

    page: object
    url: str
    complaints: list[str] = field(default_factory=list)    # errors in the console
    elsewhere: list[str] = field(default_factory=list)     # addresses of other servers that the page asked for

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE * 1000)
        self.page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        own = (self.url, "data:", "blob:")
        self.page.on("request", lambda r: r.url.startswith(own) or self.elsewhere.append(r.url))

    def open(self) -> "Visit":
        self.page.goto(self.url)
        self.page.wait_for_selector("#editor canvas")
        self.page.wait_for_selector("#editor [aria-label='Brush Size']")
        self.status("Sample")    # the editor has the first sample
        return self

    # ---- seeing ----

    def status(self, text: str) -> str:
        """Wait until the status line holds `text`; returns all of it."""
        line = self.page.locator("#status", has_text=re.compile(text))
        line.wait_for()
        return line.inner_text()

    def pictures(self, where: str) -> list[np.ndarray]:
        sources = self.page.locator(f"{where} img").evaluate_all("images => images.map(image => image.src)")
        files = [io.BytesIO(self.page.request.get(source).body()) for source in sources]
        return [np.asarray(Image.open(file).convert("RGB")) for file in files]

    # ---- doing ----

    def upload(self, name: str, data: bytes, button: str = "Upload a picture") -> None:
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_role("button", name=button, exact=True).click()
        chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": data})

    def paint(self, *points: tuple[float, float], canvas: tuple[int, int] = (1024, 1024)) -> None:
        """A stroke through points given as shares of the picture's width and height. `canvas`: its size on the canvas."""
        area = self.page.locator("#editor canvas").first
        area.scroll_into_view_if_needed()
        box, zoom = self.settled(area)
        width, height = canvas[0] * zoom, canvas[1] * zoom
        left, top = box["x"] + (box["width"] - width) / 2, box["y"] + (box["height"] - height) / 2
        self.page.mouse.move(left + points[0][0] * width, top + points[0][1] * height)
        self.page.mouse.down()
        for x, y in points:
            self.page.mouse.move(left + x * width, top + y * height, steps=8)
        self.page.mouse.up()
        self.page.wait_for_selector("#editor [aria-label='Undo']:not([disabled])")

    def settled(self, canvas: object) -> tuple[dict, float]:
        """Box of the canvas and its zoom, once both have stood still for a second."""
        seen = []
        while len(seen) < 5 or any(other != seen[-1] for other in seen[-5:]):
            zoom = float(self.page.locator("#editor .zoom-number").inner_text().strip(" %\n")) / 100
            seen.append((canvas.bounding_box(), zoom))
            self.page.wait_for_timeout(250)
        return seen[-1]

    def complete(self, seed: int) -> str:
        """Press the button with a seed that this page has not used before, wait, and return the status line."""
        self.page.get_by_label("Seed").fill(str(seed))
        self.page.get_by_label("Seed").blur()
        self.page.click("#complete")
        self.page.locator("#download", has_text=f"(seed {seed})").wait_for()    # the first of the completions
        return self.page.locator("#status").inner_text()

    def download(self) -> tuple[str, np.ndarray]:
        with self.page.expect_download() as download:
            self.page.click("#download")
        return download.value.suggested_filename, np.asarray(Image.open(download.value.path()))


@pytest.fixture
def visit(server, chromium) -> Iterator:
    """Open pages with `visit(width, height)`. In the end neither they nor the server may have complained, nor may they have
    loaded anything from elsewhere."""
    visits, contexts, logged = [], [], len(server.log.read_text())

    def start(width: int = 1280, height: int = 900, **options) -> Visit:
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options))
        contexts[-1].add_init_script(FEWER_FRAMES)
        visits.append(Visit(contexts[-1].new_page(), server.url))
        return visits[-1].open()

    yield start
    for context in contexts:
        context.close()
    for made in visits:
        assert made.complaints == [] and made.elsewhere == []
    assert server.log.read_text()[logged:] == ""
