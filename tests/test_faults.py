"""Full disks, kills while saving, damaged and malicious files, NaN, bad pictures: a sentence, and nothing lost."""

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import save_model
from tiny_runs import (
    KINDS,
    STAGES,
    STEPS,
    assert_same_run,
    checkpoint,
    differences,
    kill_at,
    metrics,
    refused,
    run,
    succeed,
    write_pictures,
)

from models import MaskGIT
from models.files import ModelFileError
from pictures.images import read_image
from pictures.shards import ShardStream
from training.loop import MAX_SKIPPED
from training.weights import load_vqgan
from utils import UserError

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
        refused(run(stage, argv), "can't write", "No space left")
        kept = checkpoint(tmp_path / "disk" / "a", stage)    # the last good one is whole
        assert kept["step"] < STEPS
        assert not [path for path in (tmp_path / "disk" / "a").iterdir() if path.name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path / "disk")], check=True)
        succeed(stage, argv)
        assert_same_run(folder, tmp_path / "disk" / "a", stage)


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples_0000006.png"])
def test_other_files_that_cannot_be_written(setting, tmp_path, file):
    (tmp_path / "a" / file).mkdir(parents=True)
    refused(run("transformer", setting.argv("transformer", tmp_path / "a")), "can't write", file)


# ---- kills while saving ----


def kill_while_saving(moment: str, call: int):
    """For `before`: SIGKILL in the n-th save: in the middle of the file, before it is renamed, or between two renames."""

    def patch() -> None:
        module, name = (torch, "save") if moment == "half" else (os, "replace")
        real, calls, awaited = getattr(module, name), itertools.count(1), {"rename": "next.pt", "between": "last.pt"}

        def watched(what, target):
            if (moment == "half" or Path(target).name == awaited[moment]) and next(calls) == call:
                if moment == "half":
                    content = saved(what)
                    target.write(content[: len(content) // 2])
                    target.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            real(what, target)

        setattr(module, name, watched)

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
    return payload + b"MGCKPT01" + hashlib.sha256(payload).digest()


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_damaged_and_foreign_checkpoints_are_refused(whole, setting, tmp_path):
    """As --resume of both stages, and as --vqgan of stage 2. No code in them is run."""
    stage, folder = whole
    state, kind = checkpoint(folder, stage), KINDS[stage]
    good = (folder / "last.pt").read_bytes()
    files = {
        "empty": b"", "truncated": good[:-100], "text": b"hello" * 100, "malicious": pickle.dumps(Malicious()),
        "sealed malicious": seal(saved({"kind": kind, "ema": Malicious()})), "a list": seal(saved([1, 2])),
        "another kind": seal(saved({"kind": "finish-training"})), "nothing in it": seal(saved({"kind": kind})),
        "no optimizer": seal(saved({key: value for key, value in state.items() if key != "optimizer"})),
        "other shapes": seal(saved(state | {"model": {name: x.flatten() for name, x in state["model"].items()}})),
        "words for numbers": seal(saved(state | {"step": "many"})),
    }    # fmt: skip
    before = set(Path.cwd().iterdir())
    for name, content in files.items():
        (tmp_path / "bad.pt").write_bytes(content)
        child = run(stage, setting.argv(stage, tmp_path / "a", "--resume", str(tmp_path / "bad.pt")))
        assert child.code == 2 and len(child.errors) == 1, (name, child.text[-1500:])
        if stage == "vqgan" and name not in ("no optimizer", "other shapes", "words for numbers"):
            child = run("transformer", setting.argv("transformer", tmp_path / "b", "--vqgan", str(tmp_path / "bad.pt")))
            assert child.code == 2 and len(child.errors) == 1, (name, child.text[-1500:])
    assert set(Path.cwd().iterdir()) == before, "code from a file was run"


def mutations(good: bytes, count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(count):
        content = bytearray(good)
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        yield bytes(content)


def test_fuzzed_checkpoints_and_models_load_or_are_refused(setting, tmp_path):
    """300 mutations, the checksum renewed for half of them, so that what comes after it meets them too."""
    path, good = tmp_path / "fuzz.pt", setting.vqgan.read_bytes()
    for i, content in enumerate(mutations(good[:-40], 300)):
        path.write_bytes(seal(content) if i % 2 else content + good[-40:])
        with contextlib.suppress(UserError):
            load_vqgan(str(path))
            assert i % 2 or content == good[:-40], "it loads although its checksum is another's"
    # Of a model the header alone, which holds names, shapes and the config; a file of weights has no checksum.
    path = tmp_path / "fuzz.safetensors"
    good = save_model(path, 16).read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    refusals = 0
    for content in mutations(good[:header], 100):
        path.write_bytes(content + good[header:])
        try:
            MaskGIT.from_pretrained(path)
        except ModelFileError:
            refusals += 1
    assert refusals > 50


# ---- numbers that are not finite ----


def poison(steps: dict[int, str], stage: str):
    """For `before`: at these steps a term, or only the gradient, is NaN or infinite."""

    def patch() -> None:
        module = STAGES[stage]
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


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(whole, setting, tmp_path, where):
    stage, folder = whole
    argv = setting.argv(stage, tmp_path / "a", "--resume", "auto")
    refused(run(stage, argv, poison({5: where}, stage)), "of step 5 is", "--on-nan skip")
    assert checkpoint(tmp_path / "a", stage)["step"] == 4
    assert [line["step"] for line in metrics(tmp_path / "a") if "loss" in line] == [1, 2, 3, 4, 5]
    succeed(stage, argv)    # without the cause it goes on as if nothing had been
    assert_same_run(folder, tmp_path / "a", stage)


def test_steps_that_are_not_finite_can_be_left_out(whole, setting, tmp_path):
    stage, _ = whole
    argv = setting.argv(stage, tmp_path / "a", "--on-nan", "skip", "--resume", "auto")
    argv += ["--set", f"train_{stage}.save_every=1"]
    poisoned = poison({3: "loss", 7: "gradient"}, stage)

    def poisoned_and_killed():
        poisoned()
        kill_at(2 * 8)()

    run(stage, argv, poisoned_and_killed)    # after the second step that is left out
    before, after = (checkpoint(tmp_path / "a", stage, name) for name in ("previous.pt", "last.pt"))
    assert (before["step"], after["step"], before["skipped"], after["skipped"]) == (7, 8, 1, 2)
    for key in {"model", "ema", "discriminator", "usage"} & before.keys():    # such a step changes nothing
        assert differences(before[key], after[key]) == []
    assert differences(before["optimizer"]["state"], after["optimizer"]["state"]) == []
    succeed(stage, argv, poisoned)
    assert [line["step"] for line in metrics(tmp_path / "a") if "skipped" in line] == [4, 8]
    argv[argv.index("--output-dir") + 1] = str(tmp_path / "b")
    succeed(stage, argv, poisoned)    # and nobody kills it
    assert_same_run(tmp_path / "a", tmp_path / "b", stage)


def test_skips_are_bounded(setting, tmp_path):
    always = dict.fromkeys(range(100), "gradient")
    argv = setting.argv("transformer", tmp_path / "a", "--on-nan", "skip")
    refused(run("transformer", argv, poison(always, "transformer")), f"of step {MAX_SKIPPED}", "left out")


# ---- pictures ----


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TAR"])
def test_fuzzed_pictures_and_shards_are_read_or_refused(kind, tmp_path):
    """60 mutations of each: pictures, or an error that names the file; nothing else, no endless work."""
    buffer, path = io.BytesIO(), tmp_path / f"fuzz.{kind.lower()}"
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8))
    if kind == "TAR":
        picture.save(tmp_path / "0.png")
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for i in range(4):
                tar.add(tmp_path / "0.png", f"{i:03d}.png")
    else:
        picture.save(buffer, kind)
    for content in mutations(buffer.getvalue(), 60):
        path.write_bytes(content)
        with warnings.catch_warnings(), contextlib.suppress(UserError):
            warnings.simplefilter("ignore")
            read = read_image if kind != "TAR" else lambda x: list(ShardStream(str(x), 8, seed=None, bad_images="skip"))
            assert all(image.dtype == torch.uint8 for image in read(path))


def test_bad_pictures_stop_or_are_skipped_and_named(whole, setting, tmp_path):
    stage, folder = whole
    bad = write_pictures(tmp_path / "pictures", 24)
    good = (bad / "000.png").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    files = {"text.png": b"not a picture", "empty.jpg": b"", "truncated.png": good[: len(good) // 2], "flipped.png": flipped}
    for name, content in files.items():
        (bad / f"bad-{name}").write_bytes(content)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(bad / "bad-float.tiff")
    Image.new("1", (11_000, 10_000)).save(bad / "bad-bomb.png")    # 110 million pixels in a few kB
    argv = setting.argv(stage, tmp_path / "a", train=bad)
    refused(run(stage, argv), "bad-")
    child = succeed(stage, [*argv, "--bad-images", "skip", "--resume", "auto"])
    assert "skipped 6" in child.text and all(f"bad-{kind}" in child.text for kind in (*files, "float", "bomb"))
    if stage == "vqgan":    # as if they had not been there
        state = checkpoint(tmp_path / "a", stage)
        assert differences(state["model"], checkpoint(folder, stage)["model"]) == []
        assert state["input"]["training pictures"].startswith("24 ")


def test_pictures_of_every_size_suffix_and_folder_are_trained_on(setting, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 8)
    (folder / "more" / "deeper").mkdir(parents=True)
    Image.new("RGB", (1, 1)).save(folder / "more" / "tiny.jpg")
    Image.new("RGB", (300, 7)).save(folder / "more" / "deeper" / "long.webp")
    write_pictures(folder / "val", 3, seed=1)    # validation pictures and the run's own grids are none of them
    for stage in ("vqgan", "transformer"):
        flags = ["--epochs", "1", "--val-dir", str(folder / "val")]
        succeed(stage, setting.argv(stage, folder / stage, *flags, train=folder))
        shutil.move(folder / stage, tmp_path / stage)
        assert checkpoint(tmp_path / stage, stage)["input"]["training pictures"].startswith("10 ")
        assert checkpoint(tmp_path / stage, stage)["input"]["validation pictures"].startswith("3 ")
