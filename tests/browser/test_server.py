"""What the server gives to those who ask it directly: the page, and nothing else of the machine."""

import contextlib
import http.client
import http.server
import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, png, running
from PIL import Image

pytestmark = pytest.mark.browser


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def secret_paths(server) -> list[str]:
    return [
        "/etc/passwd", "//etc/passwd", str(server.folder / "tiny.safetensors"), str(server.folder / "images/cat0.png"),
        str(Path(__file__).resolve()), "demo.py", "./demo.py", "models/maskgit.py", "../../etc/passwd",
        f"{server.temporary}/../log.txt", f"{server.temporary}/../../../etc/passwd", "/proc/self/environ", "file:///etc/passwd",
    ]    # fmt: skip


@pytest.mark.parametrize("route", ["gradio_api/file=", "gradio_api/file/", "static/", "assets/", "svelte/", "file="])
def test_no_file_of_the_machine_is_given_away(server, route):
    """Although the environment of the server under test allows all of them (GRADIO_ALLOWED_PATHS=/)."""
    for path in secret_paths(server):
        for written in {path, urllib.parse.quote(path, safe=""), path.replace("..", "%2e%2e")}:
            status, body = get(f"{server.url}{route}{written}")
            assert status in (400, 403, 404), (written, status, body[:100])


@pytest.mark.parametrize("address", ["http://example.com/", "https://example.com/x.png", "http://127.0.0.1:9/"])
def test_no_address_is_fetched(server, address):
    before = list(server.contacted)
    assert get(f"{server.url}gradio_api/file={address}")[0] in (400, 403, 404)
    assert get(f"{server.url}gradio_api/proxy={address}")[0] in (400, 403, 404)
    assert server.contacted == before


def call(server, component: int, event: str, data: list) -> list[dict]:
    """Do what the page does at an event of a component; what the server answers."""
    config = json.loads(get(f"{server.url}config")[1])
    index = next(d["id"] for d in config["dependencies"] if [component, event] in [list(target) for target in d["targets"]])
    body = json.dumps({"data": data, "fn_index": index, "session_hash": "intruder", "trigger_id": None, "event_data": None})
    status, answer = get(f"{server.url}gradio_api/queue/join", body.encode(), **{"Content-Type": "application/json"})
    assert status == 200, answer
    _, stream = get(f"{server.url}gradio_api/queue/data?session_hash=intruder")
    return [json.loads(line.removeprefix("data: ")) for line in stream.decode().splitlines() if line.startswith("data: ")]


def components(server, kind: str) -> list[int]:
    return [c["id"] for c in json.loads(get(f"{server.url}config")[1])["components"] if c["type"] == kind]


@pytest.mark.parametrize("path", ["/etc/passwd", "demo.py", "http://example.com/cat.png", "https://example.com/cat.png"])
def test_an_upload_cannot_name_a_file_of_the_machine_or_an_address(server, path):
    before = list(server.contacted)
    upload = components(server, "uploadbutton")[0]
    file = {"path": path, "orig_name": "cat.png", "url": path, "meta": {"_type": "gradio.FileData"}}
    events = call(server, upload, "upload", [file])
    done = [event for event in events if event["msg"] == "process_completed"]
    assert done and not done[0]["success"]
    assert "root:" not in json.dumps(events) and server.contacted == before


def test_uploads_of_too_many_bytes_are_refused_by_the_server(server):
    edge = "----edge"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + bytes(6_000_000) + f"\r\n--{edge}--\r\n".encode()

    def kept() -> int:
        return sum(path.stat().st_size for path in server.temporary.rglob("*") if path.is_file())

    before = kept()    # of other tests
    status, _ = get(f"{server.url}gradio_api/upload", body, **{"Content-Type": f"multipart/form-data; boundary={edge}"})
    assert status == 413 and kept() - before < 6_000_000


def test_it_listens_to_this_computer_only(server):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))    # sends nothing; picks the address of the way out
            address = probe.getsockname()[0]
        except OSError:
            pytest.skip("this machine has no address but loopback")
    if address.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    with pytest.raises(OSError):
        socket.create_connection((address, server.port), timeout=5).close()


def test_a_port_in_use_is_one_sentence(server):
    flags = ["--checkpoint", str(server.folder / "tiny.safetensors"), "--port", str(server.port)]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-m", "demo", *flags], cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"error: can't listen at 127.0.0.1:{server.port}: in use")


# ---- programs that call the page's completion ----


@pytest.fixture
def client(server, tmp_path):
    return connect(server.url, tmp_path)


def connect(url: str, folder: Path):
    return pytest.importorskip("gradio_client").Client(url, verbose=False, download_files=folder)


def ask(client, folder: Path, image: np.ndarray, mask: np.ndarray, **options) -> np.ndarray:
    from gradio_client import handle_file

    for name, array in (("image", image), ("mask", mask)):
        (folder / f"{name}.png").write_bytes(png(array))
    files = {name: handle_file(str(folder / f"{name}.png")) for name in ("image", "mask")}
    return np.asarray(Image.open(client.predict(**files, **options, api_name="/complete")))


def white_hole(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[10:20, 5:30] = 255
    return mask


def test_a_program_completes_a_picture(client, tmp_path):
    image, mask = noise(50, 40), white_hole(50, 40)
    first, again = (ask(client, tmp_path, image, mask, seed=3) for _ in range(2))
    other = ask(client, tmp_path, image, 255 - mask, seed=4, hole="black", total_iter=2)
    assert first.shape == image.shape and np.array_equal(first, again)
    for completed in (first, other):
        assert np.array_equal(completed[mask == 0], image[mask == 0])
        assert (completed[mask == 255] != image[mask == 255]).any(1).mean() > 0.9
    assert not np.array_equal(first, other)
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert list(described) == ["/complete"] and "white parts are the hole" in described["/complete"]["description"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"mask": white_hole(50, 50)}, "same size"), ({"mask": white_hole(50, 40) * 0}, "Nothing is painted"),
     ({"image": noise(2100, 2000) * 0}, "4,000,000"), ({"total_iter": 31}, "30 rounds"), ({"seed": -1}, "seed")],
)    # fmt: skip
def test_a_program_is_refused_what_the_page_refuses(client, tmp_path, changes, word):
    arguments = {"image": noise(50, 40), "mask": white_hole(50, 40)} | changes
    with pytest.raises(Exception, match=word):
        ask(client, tmp_path, **arguments)


@contextlib.contextmanager
def behind_a_sub_path(port: int, path: str) -> Iterator[str]:
    """A proxy that passes `path`/... on to the server at a port, without `path`."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(path):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            upstream.request(self.command, self.path.removeprefix(path) or "/", body, dict(self.headers))
            answer = upstream.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.end_headers()
            while part := answer.read1(65536):
                self.wfile.write(part)
                self.wfile.flush()

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}{path}/"
        proxy.shutdown()


def test_behind_a_proxy_with_a_sub_path(folder, tmp_path):
    with running(folder, "--root-path", "/paint") as server, behind_a_sub_path(server.port, "/paint") as url:
        status, page = get(url)
        config = json.loads(get(f"{url}config")[1])
        assert status == 200 and b"MaskGIT inpainting" in page and config["root"].endswith("/paint")
        image, mask = noise(50, 40), white_hole(50, 40)
        completed = ask(connect(url, tmp_path), tmp_path, image, mask)
        assert np.array_equal(completed[mask == 0], image[mask == 0])


def test_it_reports_to_nobody(server):
    assert server.contacted == []
