"""Training checkpoints: whole or not at all; which one a run continues from; its log; stop requests."""

import json
import os
import resource
import signal

import pytest
import torch

from training.checkpoints import (
    find_resume,
    load_checkpoint,
    save_checkpoint,
    save_last,
)
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


def refused(path, word: str, kind: str = KIND) -> None:
    with pytest.raises(UserError, match=word) as caught:
        load_checkpoint(path, kind)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---- files ----


def test_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "last.pt", state())
    loaded, given = load_checkpoint(str(tmp_path / "last.pt"), KIND), state()
    assert loaded["config"] == given["config"] and loaded["step"] == 3 and names(tmp_path) == ["last.pt"]
    assert all(torch.equal(loaded["model"][k], x) and loaded["model"][k].dtype == x.dtype for k, x in given["model"].items())


def test_damage_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, state())
    data = path.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path, "truncated")
    for position in (0, len(data) // 2, len(data) - 41, len(data) - 33, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        refused(path, "damaged|truncated")


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


def test_the_newest_good_checkpoint_is_continued(run, capsys):
    assert step_of(run) == 2 and step_of(run, str(run / "previous.pt")) == 1 and capsys.readouterr().err == ""
    for broken, expected in (("last.pt", 1), ("previous.pt", 0)):
        (run / broken).write_bytes((run / broken).read_bytes()[:-7])
        assert step_of(run) == expected and broken in capsys.readouterr().err
    save_checkpoint(run / "previous.pt", state(4))
    save_checkpoint(run / "best.pt", state(7))
    assert step_of(run) == 7    # of these two the newer one


def test_an_empty_folder_is_a_beginning(tmp_path, capsys):
    assert find_resume(tmp_path, None, KIND) is None and capsys.readouterr().err == ""
    assert find_resume(tmp_path, "auto", KIND) is None and "beginning" in capsys.readouterr().err
    with pytest.raises(UserError, match="can't be read"):
        find_resume(tmp_path, "nowhere.pt", KIND)


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


def test_a_run_is_not_written_over_by_another(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save_last(elsewhere, state(9))
    with pytest.raises(UserError, match="already"):
        find_resume(run, str(elsewhere / "last.pt"), KIND)


def test_continued_in_another_folder_the_best_begins_anew(run, tmp_path_factory):
    assert find_resume(run, "auto", KIND)["best"] == 1.5
    assert find_resume(tmp_path_factory.mktemp("new"), str(run / "last.pt"), KIND)["best"] == float("inf")


# ---- log and stop ----


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_logger_writes_lines_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = Logger(tmp_path, 0)
    logger.log(1, loss=0.5, rate=1e-4)
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "rate": 1e-4}]    # at once, not at the end
    logger.log(2, loss=0.25)
    logger.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_logger_drops_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    logger = Logger(tmp_path, 0)
    for step in range(5):
        logger.log(step, loss=float(step))
    logger.close()
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
