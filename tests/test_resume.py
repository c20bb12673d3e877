"""A run that was stopped or killed, and resumed, is the uninterrupted run, bit for bit. Anything else is refused."""

import os
import signal

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import (
    KINDS,
    STEPS,
    Child,
    assert_same_run,
    checkpoint,
    kill_at,
    metrics,
    refused,
    run,
    succeed,
    wait_for_step,
    write_pictures,
)

import training.vqgan
from models.precision import pick_precision
from training.checkpoints import load_checkpoint, save_checkpoint


def test_the_uninterrupted_run_does_all_that_a_resume_must_restore(whole):
    stage, folder = whole
    steps = [line for line in metrics(folder) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    state = checkpoint(folder, stage)
    assert state["step"] == STEPS
    losses = {line["step"]: line["val_loss"] for line in metrics(folder) if "val_loss" in line}
    assert state["best"] == min(losses.values()) == losses[checkpoint(folder, stage, "best.pt")["step"]]
    if stage == "vqgan":
        assert [("adversarial" in line) for line in steps] == [step >= 5 for step in range(STEPS)]
        assert any(line.get("codes_used", 1) < 1 for line in steps), "no code was ever restarted"
    else:
        assert len({line["learning_rate"] for line in steps}) > 1, "the plateau was never reached"


def test_killed_again_and_again(whole, setting, tmp_path):
    stage, folder = whole
    # 2 micro-batches a step, 3 steps an epoch, last.pt each 2 steps. Killed in step 1 (first checkpoint only), 4, 8, 10, 11:
    # between two micro-batches, at the first step of an epoch, and after the tokens were frozen.
    done, micro_batches = 0, (1, 7, 11, 6, 5)
    for micro in micro_batches:
        child = run(stage, setting.argv(stage, tmp_path / "a", "--resume", "auto"), kill_at(micro))
        assert child.code == -signal.SIGKILL
        step = done + micro // 2
        assert max((line["step"] for line in metrics(tmp_path / "a")), default=0) == step
        done = checkpoint(tmp_path / "a", stage)["step"]
        assert done == step - step % 2
    assert done == 10
    succeed(stage, setting.argv(stage, tmp_path / "a", "--resume", "auto"))
    assert_same_run(folder, tmp_path / "a", stage)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_request_ends_the_step_saves_and_says_so(whole, setting, tmp_path, number, code):
    stage, folder = whole
    child = Child(stage, setting.argv(stage, tmp_path / "a"))
    wait_for_step(tmp_path / "a", 4)
    os.kill(child.pid, number)
    child.wait()
    assert child.code == code and child.errors == []
    step = metrics(tmp_path / "a")[-1]["step"]
    assert f"after step {step}" in child.text and "--resume auto" in child.text
    assert checkpoint(tmp_path / "a", stage)["step"] == step < STEPS
    succeed(stage, setting.argv(stage, tmp_path / "a", "--resume", "auto"))
    assert_same_run(folder, tmp_path / "a", stage)


def test_resume_from_a_file_in_a_new_folder(whole, setting, tmp_path):
    stage, folder = whole
    run(stage, setting.argv(stage, tmp_path / "a"), kill_at(2 * 7))
    last = tmp_path / "a" / "last.pt"
    succeed(stage, setting.argv(stage, tmp_path / "b", "--resume", str(last)))
    one, two = (checkpoint(f, stage) for f in (folder, tmp_path / "b"))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    assert metrics(tmp_path / "b") == [line for line in metrics(folder) if line["step"] > 6]
    assert (tmp_path / "b" / "best.pt").exists()    # the best from there on


def test_accumulation_may_change_on_the_way(whole, setting, tmp_path):
    """Other micro-batches, same batch: equal up to rounding. Dropout would draw other numbers, so it is off."""
    stage, _ = whole
    off = ["--set", "transformer.dropout=0.0", "transformer.attention_dropout=0.0"]
    flags = ["--set", f"train_{stage}.precision=fp32", *(off if stage == "transformer" else [])]
    ends = []
    for accum in (1, 2, 4):
        succeed(stage, setting.argv(stage, tmp_path / f"{accum}", "--epochs", "1", "--accum-grad", str(accum), *flags))
        ends.append([line["loss"] for line in metrics(tmp_path / f"{accum}") if "loss" in line])
    for losses in ends[1:]:
        assert losses == pytest.approx(ends[0], abs=1e-4)
    # A checkpoint of one may be continued with the other.
    succeed(stage, setting.argv(stage, tmp_path / "1", "--epochs", "1", "--accum-grad", "2", "--resume", "auto", *flags))


def test_precision_is_that_of_the_machine_unless_it_is_given(whole, setting, tmp_path):
    stage, folder = whole
    here = pick_precision("auto", torch.device("cpu"))
    other = {"fp32": "bf16", "bf16": "fp32"}[here]
    assert load_checkpoint(folder / "last.pt", KINDS[stage])["config"][f"train_{stage}"]["precision"] == here
    flags = ["--set", f"train_{stage}.precision={other}"]
    refused(run(stage, setting.argv(stage, folder, "--resume", "auto", *flags)), "precision")
    succeed(stage, setting.argv(stage, tmp_path / "other", *flags))
    first, second = ([line["loss"] for line in metrics(path) if "loss" in line] for path in (folder, tmp_path / "other"))
    assert second[:3] == pytest.approx(first[:3], rel=0.05) and second[:3] != first[:3]


def test_what_is_no_continuation_is_refused_and_a_finished_run_has_nothing_left_to_do(whole, setting):
    stage, folder = whole
    width = "encoder_width" if stage == "vqgan" else "mlp_dim"
    before = (folder / "last.pt").read_bytes()
    for flags, word in (
        ([], "holds"),
        (["--resume", "auto", "--learning-rate", "0.5"], "learning_rate"),
        (["--resume", "auto", "--set", f"{stage}.{width}=8"], width),
        (["--resume", "auto", "--epochs", "9"], "--init"),    # how to train on
        (["--resume", "nowhere.pt"], "nowhere.pt"),
    ):
        refused(run(stage, setting.argv(stage, folder, *flags)), word)
    refused(run(stage, setting.argv(stage, setting.train)), "pictures")
    assert (folder / "last.pt").read_bytes() == before
    stage, folder = whole
    before = (folder / "last.pt").read_bytes(), metrics(folder)
    child = succeed(stage, setting.argv(stage, folder, "--resume", "auto"))
    assert ((folder / "last.pt").read_bytes(), metrics(folder)) == before
    assert "finished" in child.text and "--init" in child.text    # how to train on


def test_another_set_of_as_many_pictures_or_another_vqgan_is_no_continuation_unless_allowed(setting, tmp_path):
    run("vqgan", setting.argv("vqgan", tmp_path / "a"), kill_at(3))
    argv = setting.argv("vqgan", tmp_path / "a", "--resume", "auto")
    other = write_pictures(tmp_path / "other", 24, seed=5)
    changed = [str(other) if x == str(setting.train) else x for x in argv]
    refused(run("vqgan", changed), "training pictures", "--allow-changes")
    other_val = [str(setting.train) if x == str(setting.root / "val") else x for x in argv]
    refused(run("vqgan", other_val), "validation pictures")
    child = succeed("vqgan", [*changed, "--allow-changes"])
    assert "other training pictures" in child.text
    argv = setting.argv("transformer", tmp_path / "b", "--token-cache", str(tmp_path / "t"))
    run("transformer", argv, kill_at(3))
    state = load_checkpoint(setting.vqgan, "vqgan-training")
    state["ema"]["decoder.from_code.bias"] += 1    # same tokens, another decoder
    save_checkpoint(tmp_path / "other.pt", state)
    refused(run("transformer", [*argv, "--resume", "auto", "--vqgan", str(tmp_path / "other.pt")]), "--vqgan")


def test_perceptual_weights_may_not_go(setting, tmp_path):
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    save_file(squeezenet1_1(weights=None).features.state_dict(), tmp_path / "features.safetensors")
    real = training.vqgan.perceptual_network

    def with_network():
        training.vqgan.perceptual_network = real

    argv = setting.argv("vqgan", tmp_path / "a", "--epochs", "1", "--set", "vqgan.image_size=32")
    succeed("vqgan", [*argv, "--perceptual-weights", str(tmp_path / "features.safetensors")], with_network)
    before = (tmp_path / "a" / "last.pt").read_bytes()
    refused(run("vqgan", [*argv, "--resume", "auto"]), "perceptual weights")
    assert (tmp_path / "a" / "last.pt").read_bytes() == before


def test_tokens_stay_frozen_after_a_resume(setting, tmp_path):
    """From the freezing on, encoder and codebook are the averaged ones and never change again, killed or not."""
    argv = setting.argv("vqgan", tmp_path / "a", "--resume", "auto", "--set", "train_vqgan.save_every=1")
    run("vqgan", argv, kill_at(2 * 10))
    frozen = checkpoint(tmp_path / "a", "vqgan")
    assert frozen["step"] == 10
    succeed("vqgan", argv)
    end = checkpoint(tmp_path / "a", "vqgan")
    names = [name for name in end["model"] if name.startswith(("encoder.", "codebook."))]
    assert names
    for name in names:
        assert torch.equal(end["model"][name], frozen["model"][name]) and torch.equal(end["ema"][name], end["model"][name])
    assert any(not torch.equal(end["model"][name], frozen["model"][name]) for name in end["model"])    # the decoder goes on


def test_the_older_checkpoint_format_is_read(setting, tmp_path):
    """Checkpoints from before skipped steps and the input were noted, and before a key of the config."""
    succeed("vqgan", setting.argv("vqgan", tmp_path / "a", "--epochs", "1"))
    state = checkpoint(tmp_path / "a", "vqgan")
    del state["skipped"], state["input"], state["config"]["train_vqgan"]["windows"]
    save_checkpoint(tmp_path / "a" / "last.pt", state | {"pictures": 24})
    succeed("vqgan", setting.argv("vqgan", tmp_path / "a", "--epochs", "1", "--resume", "auto"))
