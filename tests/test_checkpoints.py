"""Training checkpoints: whole or not at all; which one a run continues from; its log; stop requests."""

import json
import os
import resource
import signal

import pytest
import torch

from training.checkpoints import find_resume, save_checkpoint, save_last
from training.logger import Logger
from training.stopping import StopRequest
from utils import UserError

KIND = "example"


def state(step: int = 3, kind: str = KIND) -> dict:
    weights = {"w": torch.arange(5.0), "half": torch.ones(2, dtype=torch.bfloat16)}
    return {"kind": kind, "step": step, "best": 1.5, "config": {"part": {"widths": [1, 2], "rate": 1e-4}}, "model": weights}


@pytest.fixture
def run(tmp_path):
    """A folder with the checkpoints of steps 0 (best), 1 and 2."""
    for step in (1, 2):
        save_last(tmp_path, state(step))
    save_checkpoint(tmp_path / "best.pt", state(0))
    return tmp_path


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- files ----


def test_larger_than_the_disk_leaves_the_old_ones(run):
    """A real failing write: files of this process may not grow beyond 64 KiB."""
    before = {name: (run / name).read_bytes() for name in names(run)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(UserError, match="can't write"):
            save_last(run, state() | {"large": torch.rand(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {name: (run / name).read_bytes() for name in names(run)} == before


# ---- resuming ----


def step_of(folder, wish: str | None = "auto") -> int:
    return find_resume(folder, wish, KIND)["step"]


def test_the_newest_good_checkpoint_is_continued_and_no_run_written_over(run, capsys, tmp_path_factory):
    assert step_of(run) == 2 and step_of(run, str(run / "previous.pt")) == 1 and capsys.readouterr().err == ""
    for broken, expected in (("last.pt", 1), ("previous.pt", 0)):
        (run / broken).write_bytes((run / broken).read_bytes()[:-7])
        assert step_of(run) == expected and broken in capsys.readouterr().err
    save_checkpoint(run / "previous.pt", state(4))
    save_checkpoint(run / "best.pt", state(7))
    assert step_of(run) == 7    # of these two the newer one
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save_last(elsewhere, state(9))
    with pytest.raises(UserError, match="already"):
        find_resume(run, str(elsewhere / "last.pt"), KIND)


@pytest.mark.parametrize("wish", [None, "auto"])
@pytest.mark.parametrize("name, content", [
    ("last.pt", "foreign"), ("best.pt", "foreign"), ("last.pt", "damaged"), ("maskgit.safetensors", "damaged"),
    ("vqgan.pt", "damaged"), ("last.ckpt", "damaged"),
])    # fmt: skip
def test_a_folder_with_other_checkpoints_is_never_begun_in(tmp_path, wish, name, content):
    save_checkpoint(tmp_path / name, state(kind="vqgan-training"))
    if content == "damaged":
        (tmp_path / name).write_bytes(b"damaged")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=name) as caught:
        find_resume(tmp_path, wish, KIND)
    assert "another --output-dir" in str(caught.value) and "--resume auto" not in str(caught.value)
    assert names(tmp_path) == [name] and (tmp_path / name).read_bytes() == before


# ---- log and stop ----


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_logger_writes_at_once_and_drops_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = Logger(tmp_path, 0)
    for step in range(5):
        logger.log(step, loss=float(step))
        assert lines(tmp_path)[-1] == {"step": step, "loss": float(step)}    # at once, not at the end
    logger.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(step, float(step)) for step in range(5)]
    with open(tmp_path / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write('{"loss": 1}\n[1]\n\xff\n{"step": 1, "lo')    # not ours, and cut by the kill
    logger = Logger(tmp_path, 2)
    logger.log(3, loss=30.0)
    logger.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_request_notes_the_signal_and_steps_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal == number
        with pytest.raises(KeyboardInterrupt):    # asked again: does not wait for the step
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before
