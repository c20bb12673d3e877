"""What the server gives to those who ask it directly: the page, and nothing else of the machine."""

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_page_is_there(server):
    status, body = get(server.url)
    assert status == 200 and b"MaskGIT inpainting" in body


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
    body = head.encode() + bytes(3_000_000) + f"\r\n--{edge}--\r\n".encode()
    status, _ = get(f"{server.url}gradio_api/upload", body, **{"Content-Type": f"multipart/form-data; boundary={edge}"})
    assert status == 413
    assert sum(path.stat().st_size for path in server.temporary.rglob("*") if path.is_file()) < 50_000_000


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


def test_it_reports_to_nobody(server):
    assert server.contacted == []
