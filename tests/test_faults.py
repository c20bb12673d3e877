"""Full disks, read-only folders, kills while saving, damaged and malicious files, NaN, bad pictures."""
import contextlib
import errno
import io
import os
import pickle
import random
import re
import signal
import subprocess
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    STEPS,
    assert_same_run,
    checkpoint,
    differences,
    kill_at,
    make_setting,
    metrics,
    run,
    succeed,
    write_pictures,
)

import training.logger
import training_transformer
import training_vqgan
from pictures.images import read_image
from pictures.shards import count_pictures, open_shards
from training.checkpoints import find_resume, load_checkpoint, save_checkpoint
from training.logger import Logger
from training.loop import MAX_SKIPPED
from utils import UserError

STAGES = ("vqgan", "transformer")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return make_setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module", params=STAGES)
def whole(request, setting, tmp_path_factory):
    """(stage, folder of a run without faults)"""
    folder = tmp_path_factory.mktemp(request.param) / "whole"
    succeed(request.param, setting.argv(request.param, folder))
    return request.param, folder


def refused(child, *sentences: str) -> None:
    assert child.code == 2 and len(child.errors) == 1, child.text[-2000:]
    for sentence in sentences:
        assert re.search(sentence, child.errors[0]), child.errors[0]


# ---- disks ----


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    """A tmpfs of its own size. Skips where the tests may not mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("a small file system can't be mounted here (needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up(whole, setting, tmp_path):
    stage, folder = whole
    size = (folder / "last.pt").stat().st_size // 1024
    with small_disk(tmp_path / "disk", 2 * size + size // 2 + 40):    # room for last.pt and previous.pt, not for a third
        argv = setting.argv(stage, tmp_path / "disk" / "a", "--resume", "auto")
        argv += ["--token-cache", str(tmp_path / "tokens")] if stage == "transformer" else []
        refused(run(stage, argv), "can't write .*No space left")
        kept = checkpoint(tmp_path / "disk" / "a", stage)    # the last good one is whole
        assert kept["step"] < STEPS
        assert not [path for path in (tmp_path / "disk" / "a").iterdir() if path.name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path / "disk")], check=True)
        succeed(stage, argv)
        assert_same_run(folder, tmp_path / "disk" / "a", stage)


def full_from(call: int):
    """For `before`: every write of a checkpoint from the n-th on fails in the middle, as on a full disk."""

    def patch() -> None:
        real, calls = torch.save, []

        def save(state, file):
            calls.append(1)
            if len(calls) < call:
                return real(state, file)
            file.write(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")    # torch's words

        torch.save = save

    return patch


def test_a_write_that_fails_leaves_the_last_good_one(whole, setting, tmp_path):
    stage, folder = whole
    argv = setting.argv(stage, tmp_path / "a", "--resume", "auto")
    for call in (1, 4):
        refused(run(stage, argv, full_from(call)), "can't write")
        assert not [path for path in (tmp_path / "a").rglob("*.tmp")]
    checkpoint(tmp_path / "a", stage)
    succeed(stage, argv)
    assert_same_run(folder, tmp_path / "a", stage)


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples", "maskgit.safetensors"])
def test_other_files_that_cannot_be_written(setting, tmp_path, file):
    def patch() -> None:
        def fail(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if file == "metrics.jsonl":
            real = Logger.log

            def log(*args, **values):
                training.logger.open = fail
                real(*args, **values)

            Logger.log = log
        elif file == "samples":
            training_transformer.save_image = fail
        else:
            training_transformer.MaskGIT.save_file = fail

    refused(run("transformer", setting.argv("transformer", tmp_path / "a"), patch), f"can't write .*{file}.*No space left")
    checkpoint(tmp_path / "a", "transformer")


def test_a_read_only_folder(setting, tmp_path):
    with small_disk(tmp_path / "disk", 1000):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        code, text = run_elsewhere("vqgan", setting.argv("vqgan", tmp_path / "disk" / "a"), tmp_path)
    assert code == 2 and "is not writable (Read-only file system); give another one" in text and "Traceback" not in text


def run_elsewhere(stage: str, argv: list[str], folder: Path) -> tuple[int, str]:
    """Like `run`, for an output folder beside which nothing can be written."""
    pid = os.fork()
    log = folder / "log.txt"
    if pid == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        try:
            {"vqgan": training_vqgan}[stage].main(argv)
        except UserError as error:
            os.write(2, str(error).encode())
            os._exit(2)
        finally:
            os._exit(70)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), log.read_text()


# ---- kills while saving ----


def kill_while_saving(moment: str, call: int):
    """For `before`: SIGKILL in the n-th save: in the middle of the file, before it is renamed, or between two renames."""

    def patch() -> None:
        calls = []

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "half":
            real_save = torch.save

            def save(state, file):
                calls.append(1)
                if len(calls) == call:
                    content = saved(state)
                    file.write(content[: len(content) // 2])
                    file.flush()
                    die()
                real_save(state, file)

            torch.save = save
        else:
            real_replace = os.replace

            def replace(source, target):
                if Path(target).name == ("next.pt" if moment == "rename" else "last.pt"):
                    calls.append(1)
                    if len(calls) == call:
                        die()
                real_replace(source, target)

            os.replace = replace

    return patch


def test_killed_while_saving(whole, setting, tmp_path):
    stage, folder = whole
    argv = setting.argv(stage, tmp_path / "a", "--resume", "auto")
    for moment, call in (("half", 1), ("rename", 1), ("between", 1), ("half", 3), ("between", 2), ("rename", 2)):
        assert run(stage, argv, kill_while_saving(moment, call)).code == -signal.SIGKILL
    succeed(stage, argv)
    assert_same_run(folder, tmp_path / "a", stage)


# ---- damaged and foreign checkpoints ----


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def seal(payload: bytes) -> bytes:
    """Payload and trailer of a training checkpoint: a valid checksum, whatever is in it."""
    import hashlib

    return payload + b"MGCKPT01" + hashlib.sha256(payload).digest()


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("flag", ["--resume", "--vqgan"])
def test_damaged_and_foreign_checkpoints_are_refused(whole, setting, tmp_path, flag):
    stage, folder = whole
    good = (folder / "last.pt").read_bytes() if flag == "--resume" else setting.vqgan.read_bytes()
    state = load_checkpoint(folder / "last.pt", training_vqgan.KIND) if stage == "vqgan" else None
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    files = {
        "empty": b"", "truncated": good[:-100], "flipped": bytes(flipped), "text": b"hello" * 100,
        "malicious": pickle.dumps(Malicious()), "sealed malicious": seal(pickle.dumps(Malicious())),
        "sealed torch malicious": seal(saved({"kind": training_vqgan.KIND, "ema": Malicious()})),
        "another kind": seal(saved({"kind": "finish-training"})), "a list": seal(saved([1, 2])),
        "nothing in it": seal(saved({"kind": training_vqgan.KIND if flag == "--vqgan" else training_module(stage).KIND})),
    }    # fmt: skip
    if flag == "--vqgan" and stage == "vqgan":
        pytest.skip("a flag of stage 2")
    if state is not None:
        files["no optimizer"] = seal(saved({key: value for key, value in state.items() if key != "optimizer"}))
        files["other shapes"] = seal(saved(state | {"model": {name: x.flatten() for name, x in state["model"].items()}}))
        files["words for numbers"] = seal(saved(state | {"step": "many"}))
    before = set(Path.cwd().iterdir())
    for name, content in files.items():
        path = tmp_path / "bad.pt"
        path.write_bytes(content)
        argv = setting.argv(stage, tmp_path / "a")
        if flag == "--resume":
            argv += ["--resume", str(path)]
        else:
            argv[argv.index("--vqgan") + 1] = str(path)
        child = run(stage, argv)
        assert child.code == 2 and len(child.errors) == 1, (name, child.text[-1500:])
    assert set(Path.cwd().iterdir()) == before, "code from a file was run"


def training_module(stage: str):
    return training_vqgan if stage == "vqgan" else training_transformer


def test_resume_auto_falls_back_to_the_newest_good_one(whole, setting, tmp_path):
    stage, folder = whole
    argv = setting.argv(stage, tmp_path / "a", "--resume", "auto")
    run(stage, argv, kill_at(2 * 9))
    last, previous, best = (tmp_path / "a" / name for name in ("last.pt", "previous.pt", "best.pt"))
    assert [checkpoint(tmp_path / "a", stage, name)["step"] for name in ("last.pt", "previous.pt")] == [8, 6]
    state = checkpoint(tmp_path / "a", stage)
    last.write_bytes(last.read_bytes()[:-1])
    child = succeed(stage, argv)
    assert re.search("notice: checkpoint .*last.pt is truncated.*looking for an older one", child.text)
    assert_same_run(folder, tmp_path / "a", stage)
    # Of previous.pt and best.pt the newer one counts, whichever it is.
    for step in (5, 7):
        save_checkpoint(previous, state | {"step": 6})
        save_checkpoint(best, state | {"step": step})
        last.write_bytes(b"")
        assert find_resume(tmp_path / "a", "auto", training_module(stage).KIND)["step"] == max(6, step)


def test_fuzzed_checkpoints_load_or_are_refused(setting, tmp_path):
    """300 mutations, the checksum renewed for half of them, so that what comes after it meets them too."""
    rng, path = random.Random(0), tmp_path / "fuzz.pt"
    payload = setting.vqgan.read_bytes()[:-40]
    loaded = 0
    for i in range(300):
        content = bytearray(payload)
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(seal(bytes(content)) if i % 2 else bytes(content) + setting.vqgan.read_bytes()[-40:])
        with contextlib.suppress(UserError):
            training_transformer.load_vqgan(str(path))
            loaded += 1
    assert loaded < 150    # those whose numbers changed, nothing else


# ---- numbers that are not finite ----


def poison(steps: dict[int, str], stage: str):
    """For `before`: at these steps a term, or only the gradient, is NaN or infinite."""

    def patch() -> None:
        module = training_module(stage)
        real = module.train_step

        def train_step(run, step, *batch):
            where = steps.get(step)
            hooks = []
            parameter = next(p for p in (run.plain.transformer if stage == "transformer" else run.plain).parameters())
            if where == "gradient":
                hooks.append(parameter.register_hook(lambda gradient: gradient * float("inf")))
            if where == "loss":
                before = parameter.detach().clone()
                parameter.data.fill_(float("nan"))
            try:
                return real(run, step, *batch)
            finally:
                for hook in hooks:
                    hook.remove()
                if where == "loss":
                    parameter.data.copy_(before)

        module.train_step = train_step

    return patch


@pytest.mark.parametrize("where, cause", [("loss", "is nan"), ("gradient", "gradient norm of step 5 is (nan|inf)")])
def test_a_number_that_is_not_finite_stops_the_run(whole, setting, tmp_path, where, cause):
    stage, folder = whole
    argv = setting.argv(stage, tmp_path / "a", "--resume", "auto")
    refused(run(stage, argv, poison({5: where}, stage)), "step 5", cause, "stopped before the weights were changed")
    assert checkpoint(tmp_path / "a", stage)["step"] == 4
    assert [line["step"] for line in metrics(tmp_path / "a") if "loss" in line] == [1, 2, 3, 4, 5]
    succeed(stage, argv)    # without the cause it goes on as if nothing had been
    assert_same_run(folder, tmp_path / "a", stage)


def test_steps_that_are_not_finite_can_be_left_out(whole, setting, tmp_path):
    stage, _ = whole
    argv = setting.argv(stage, tmp_path / "a", "--on-nan", "skip", "--resume", "auto")
    child = succeed(stage, argv, poison({3: "loss", 7: "gradient"}, stage))
    assert child.text.count("notice: step left out") == 2
    state = checkpoint(tmp_path / "a", stage)
    assert state["skipped"] == 2 and state["step"] == STEPS
    assert all(torch.isfinite(x).all() for x in state["model"].values())
    assert [line["step"] for line in metrics(tmp_path / "a") if "skipped" in line] == [4, 8]
    # Killed between the two, it skips the same and ends the same.
    argv[argv.index("--output-dir") + 1] = str(tmp_path / "b")

    def poisoned_and_killed():
        poison({3: "loss", 7: "gradient"}, stage)()
        kill_at(2 * 6)()

    run(stage, argv, poisoned_and_killed)
    succeed(stage, argv, poison({3: "loss", 7: "gradient"}, stage))
    assert_same_run(tmp_path / "a", tmp_path / "b", stage)


def test_a_skipped_step_changes_nothing(whole, setting, tmp_path):
    stage, _ = whole
    argv = setting.argv(stage, tmp_path / "a", "--on-nan", "skip", "--set", f"train_{stage}.save_every=1")

    def patch():
        poison({4: "gradient"}, stage)()
        kill_at(2 * 5)()

    run(stage, argv, patch)
    before, after = (checkpoint(tmp_path / "a", stage, name) for name in ("previous.pt", "last.pt"))
    assert (before["step"], after["step"]) == (4, 5)
    for key in {"model", "ema", "discriminator", "usage"} & before.keys():
        assert differences(before[key], after[key]) == []
    assert differences(before["optimizer"]["state"], after["optimizer"]["state"]) == []


def test_skips_are_bounded(setting, tmp_path):
    always = dict.fromkeys(range(100), "gradient")
    argv = setting.argv("transformer", tmp_path / "a", "--on-nan", "skip")
    child = run("transformer", argv, poison(always, "transformer"))
    refused(child, f"gradient norm of step {MAX_SKIPPED}", f"{MAX_SKIPPED} steps were left out before")


# ---- pictures ----


def bad_folder(folder: Path) -> Path:
    """24 good pictures and one of each bad kind."""
    write_pictures(folder, 24)
    good = (folder / "000.png").read_bytes()
    (folder / "bad-text.png").write_bytes(b"not a picture")
    (folder / "bad-empty.jpg").write_bytes(b"")
    (folder / "bad-truncated.png").write_bytes(good[: len(good) // 2])
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    (folder / "bad-flipped.png").write_bytes(bytes(flipped))
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "bad-float.tiff")
    bomb = Image.new("1", (20_000, 10_000))    # 200 million pixels in a few kB
    bomb.save(folder / "bad-bomb.png")
    return folder


def test_bad_pictures_stop_or_are_skipped_and_summed_up(whole, setting, tmp_path):
    stage, folder = whole
    bad = bad_folder(tmp_path / "pictures")
    argv = setting.argv(stage, tmp_path / "a", train=bad)
    refused(run(stage, argv), r"bad-\w+\.")
    child = succeed(stage, [*argv, "--bad-images", "skip", "--resume", "auto"])
    assert re.search("skipped 6 (of 30 )?pictures", child.text)
    for kind in ("text", "empty", "truncated", "flipped", "float", "bomb"):
        assert f"bad-{kind}" in child.text
    if stage == "vqgan":    # as if they had not been there
        assert_same_run(folder, tmp_path / "a", stage)


def test_unusual_pictures_are_handled(setting, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 8)
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("L").save(folder / "gray.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16)).save(folder / "sixteen.png")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.resize((1, 1)).save(folder / "tiny.png")
    rgb.resize((3000, 7)).save(folder / "long.png")
    child = succeed("vqgan", setting.argv("vqgan", tmp_path / "a", "--epochs", "1", train=folder))
    assert "skipped" not in child.text
    assert checkpoint(tmp_path / "a", "vqgan")["pictures"] == 17


def test_two_pictures_of_one_name_are_refused(setting, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 9)
    Image.open(folder / "003.png").save(folder / "003.jpg")
    for stage in STAGES:
        refused(run(stage, setting.argv(stage, tmp_path / "a", train=folder)), "003.jpg and 003.png .* share a name")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_fuzzed_pictures_are_read_or_refused(kind, tmp_path):
    """60 mutations of each: a picture of 3 channels, or a DataError that names the file; nothing else, no endless work."""
    rng, good = random.Random(kind), encoded(kind)
    path = tmp_path / f"fuzz.{kind.lower()}"
    warnings.simplefilter("ignore")
    for _ in range(60):
        content = bytearray(good)
        for _ in range(rng.choice((1, 2, 8, 40))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            image = read_image(path)
            assert image.ndim == 3 and image.shape[0] == 3
        except UserError as error:
            assert path.name in str(error)


def test_fuzzed_shards_are_read_or_refused(tmp_path):
    rng = random.Random(0)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(4):
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = len(encoded("PNG"))
            tar.addfile(info, io.BytesIO(encoded("PNG")))
    path = tmp_path / "s.tar"
    for _ in range(60):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.choice((1, 4, 30))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.3:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        with contextlib.suppress(UserError, UserError):
            count_pictures(str(path))
        with contextlib.suppress(UserError):
            for image in open_shards(str(path), 8, seed=None, bad_images="skip"):
                assert image.shape == (3, 8, 8)
