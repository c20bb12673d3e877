"""Several processes train as one does: same losses, one writer, resumable by any number; and all end when one does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    STEPS,
    checkpoint,
    kill_at,
    metrics,
    run,
    run_group,
    start_group,
    succeed,
    wait_for_step,
)

import training.vqgan

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4


@pytest.fixture
def flags(tmp_path):
    """Float32, and no dropout, which draws other numbers in each process. The rate is low: no chaos to amplify rounding."""
    vqgan = ["train_vqgan.precision=fp32", "train_vqgan.learning_rate=1e-4", "train_vqgan.discriminator_rate=1e-5"]
    transformer = ["train_transformer.precision=fp32", "transformer.dropout=0.0", "transformer.attention_dropout=0.0",
                   "train_transformer.learning_rate=1e-3"]    # fmt: skip
    sets = {stage: [part for value in values for part in ("--set", value)]
            for stage, values in (("vqgan", vqgan), ("transformer", transformer))}    # fmt: skip
    return {"vqgan": sets["vqgan"], "transformer": [*sets["transformer"], "--token-cache", str(tmp_path / "tokens")]}


def assert_same_curve(one: Path, two: Path) -> None:
    assert [line.keys() for line in metrics(one)] == [line.keys() for line in metrics(two)]
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name in a.keys() & {"step", "loss", "val_loss", "codes_used", "learning_rate", "codebook", "discriminator"}:
            assert a[name] == pytest.approx(b[name], abs=TOLERANCE), f"{name} of step {a['step']}"


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_two_processes_give_the_losses_of_one_and_only_the_main_one_writes(setting, flags, tmp_path, stage):
    succeed(stage, setting.argv(stage, tmp_path / "one", *flags[stage]))
    group = run_group(stage, setting.argv(stage, tmp_path / "two", *flags[stage]), outputs=tmp_path / "others")
    assert [child.code for child in group] == [0, 0], group[0].text + group[1].text
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    assert any(line.get("codes_used", 1) < 1 for line in metrics(tmp_path / "two")) or stage == "transformer"
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1]
    assert not (tmp_path / "others").exists() or not any((tmp_path / "others").rglob("*"))
    one, two = (checkpoint(tmp_path / folder, stage) for folder in ("one", "two"))
    if stage == "vqgan":
        assert torch.equal(one["usage"], two["usage"])


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_resume_with_another_number_of_processes(setting, flags, tmp_path, stage):
    succeed(stage, setting.argv(stage, tmp_path / "one", *flags[stage]))
    argv = setting.argv(stage, tmp_path / "a", *flags[stage], "--resume", "auto")
    group = run_group(stage, argv, {0: kill_at(9), 1: kill_at(9)})                          # two, killed in step 5
    assert [child.code for child in group] == [-signal.SIGKILL] * 2 and checkpoint(tmp_path / "a", stage)["step"] == 4
    assert run(stage, argv, kill_at(7)).code == -signal.SIGKILL                             # one, killed in step 8
    assert checkpoint(tmp_path / "a", stage)["step"] == 6
    assert [child.code for child in run_group(stage, argv, outputs=tmp_path / "others")] == [0, 0]
    assert_same_curve(tmp_path / "one", tmp_path / "a")


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_a_stop_request_to_one_stops_all_after_the_same_step(setting, flags, tmp_path, stage):
    group = start_group(stage, setting.argv(stage, tmp_path / "a", *flags[stage]))
    wait_for_step(tmp_path / "a", 2)
    os.kill(group[1].pid, signal.SIGTERM)
    for child in group:
        child.wait()
    assert [child.code for child in group] == [143, 143], group[0].text + group[1].text
    step = checkpoint(tmp_path / "a", stage)["step"]
    assert step == metrics(tmp_path / "a")[-1]["step"] < STEPS
    assert f"stopped by signal 15 after step {step}" in group[0].text and "stopped" not in group[1].text


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_process_ends_the_others_in_a_sentence(setting, flags, tmp_path, stage, dead):
    argv = setting.argv(stage, tmp_path / "a", *flags[stage])
    group = run_group(stage, argv, {dead: kill_at(9)})
    assert group[dead].code == -signal.SIGKILL
    other = group[1 - dead]
    assert other.code == 1 and len(other.errors) == 1, other.text
    assert "lost contact" in other.errors[0] and "--resume auto" in other.errors[0]
    assert checkpoint(tmp_path / "a", stage)["step"] == 4
    succeed(stage, [*argv, "--resume", "auto"])


def test_an_error_of_all_is_told_once(setting, flags, tmp_path):
    argv = setting.argv("vqgan", tmp_path / "a", *flags["vqgan"])

    def poison():
        real = training.vqgan.reconstruction_terms
        training.vqgan.reconstruction_terms = lambda *args: real(*args) | {"l1": torch.tensor(float("nan"))}

    for more, before, sentence in (
        (["--resume", str(tmp_path / "nowhere.pt")], None, "nowhere.pt"),
        (["--batch-size", "6"], None, "batch_size"),
        ([], {1: poison}, "l1 of step 0"),    # found by one, known to all
    ):
        group = run_group("vqgan", [*argv, *more], before)
        assert [child.code for child in group] == [2, 2], group[0].text + group[1].text
        assert len(group[0].errors) == 1 and sentence in group[0].errors[0]
        assert "Traceback" not in group[1].text


def test_torchrun_starts_it(setting, flags, tmp_path):
    """As a user starts it, once: the other tests fork their processes, which is faster."""
    argv = setting.argv("transformer", tmp_path / "a", *flags["transformer"], "--epochs", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
               "--rdzv-endpoint=localhost:0", str(ROOT / "training_transformer.py"), *argv]    # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in metrics(tmp_path / "a") if "loss" in line] == [1, 2, 3]
