"""The token cache: holds what the encoder says, goes on after a kill, refuses what is stale."""
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_runs import (
    Child,
    assert_same_run,
    kill_at,
    metrics,
    refused,
    run,
    succeed,
    wait_for_step,
    write_pictures,
    write_shards,
)

import training_vqgan
from pictures.folders import load_folder, read_square
from pictures.shards import ShardStream
from training import token_cache
from training.checkpoints import load_checkpoint, save_checkpoint
from utils import UserError

SIZE, N = 16, 4


def encode(images):
    """A stand-in for the VQGAN: a token is the mean of a quarter of the picture, times a number that needs 16 bits."""
    quarters = torch.nn.functional.avg_pool2d(images.float().mean(1, keepdim=True), SIZE // 2)    # (n, 1, 2, 2)
    return quarters.flatten(1).round().long() * 256


def both(images):
    """(n, 2, N): tokens of the pictures and of their mirror images, whose quarters change places."""
    tokens = encode(images)
    return torch.stack([tokens, tokens.view(-1, 2, 2).flip(2).flatten(1)], 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "p", 23)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(token_cache, "PIECE", 5)    # 5, 5, 5, 5, 3


def build(folder, paths, pixels=True, bad_images="error", encode=encode, mirror=True):
    pieces = token_cache.list_pieces([str(path) for path in paths])
    token_cache.build(folder, pieces, encode, SIZE, mirror, pixels, bad_images)
    return token_cache.TokenCache(folder, pieces, N, SIZE, mirror, pixels)


@pytest.mark.parametrize("pixels", [True, False])
def test_rows_are_what_the_encoder_says(pictures, tmp_path, pixels):
    cache = build(tmp_path, [pictures], pixels)
    images = load_folder(pictures, SIZE)
    assert len(cache) == len(images) == 23
    chosen = torch.tensor([22, 0, 4, 5, 5, 21, 9])
    mirrored = torch.tensor([True, False, True, False, True, False, True])
    tokens, shown = cache.rows(chosen, mirrored)
    assert torch.equal(tokens, both(images)[chosen, mirrored.long()]) and tokens.dtype == torch.int64
    assert torch.equal(shown, images[chosen]) if pixels else shown is None
    assert all(part.dtype == np.uint16 and isinstance(part, np.memmap) for piece in cache.tokens for part in piece)
    for kind in ("plain", "mirror"):
        assert sum(path.stat().st_size for path in tmp_path.glob(f"{kind}-*.u16")) == 23 * N * 2


def test_without_mirror_images(pictures, tmp_path):
    cache = build(tmp_path, [pictures], mirror=False)
    images, chosen = load_folder(pictures, SIZE), torch.tensor([22, 0, 4, 5])
    tokens, _ = cache.rows(chosen, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(tokens, encode(images)[chosen])
    assert not list(tmp_path.glob("mirror-*"))
    more = build(tmp_path, [pictures])    # and what is missing when mirror images are asked for after all
    tokens, _ = more.rows(chosen, torch.ones(4, dtype=torch.bool))
    assert torch.equal(tokens, both(images)[chosen, 1])
    build(tmp_path, [pictures], encode=None, mirror=False)    # a cache that has more serves as well


def test_bad_pictures_and_several_folders_and_shards(tmp_path, capsys, pictures):
    folder = write_pictures(tmp_path / "p", 12)
    (folder / "003.png").write_bytes(b"no picture")
    for i in range(5, 10):
        (folder / f"{i:03d}.png").write_bytes(b"")    # a whole piece
    with pytest.raises(UserError, match=r"003\.png"):
        build(tmp_path / "a", [folder])
    cache = build(tmp_path / "b", [folder], bad_images="skip")
    assert len(cache) == 6 and "skipped 6 pictures" in capsys.readouterr().err
    tokens, shown = cache.rows(torch.arange(6), torch.zeros(6, dtype=torch.bool))
    good = torch.stack([read_square(folder / f"{i:03d}.png", SIZE) for i in (0, 1, 2, 4, 10, 11)])
    assert torch.equal(shown, good) and torch.equal(tokens, encode(good))
    other = write_pictures(tmp_path / "other", 4, seed=7)
    shards = write_shards(pictures, tmp_path)
    cache = build(tmp_path / "cache", [other, shards])
    _, shown = cache.rows(torch.arange(len(cache)), torch.zeros(len(cache), dtype=torch.bool))
    streamed = list(ShardStream(shards, SIZE, seed=None))
    assert torch.equal(shown, torch.cat([load_folder(other, SIZE), torch.stack(streamed)]))


@pytest.mark.parametrize("kind", ["plain", "mirror"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "rows"])
def test_damaged_files_are_refused_in_a_sentence(pictures, tmp_path, damage, kind):
    build(tmp_path, [pictures])
    path = tmp_path / f"{kind}-000002.u16"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -N * 2 if damage == "rows" else -1])
    pieces = token_cache.list_pieces([str(pictures)])
    with pytest.raises(UserError, match=f"{kind}-000002.*delete"):
        token_cache.TokenCache(tmp_path, pieces, N, SIZE, True, True)
    for leftover in tmp_path.glob("*-000002.*"):
        leftover.unlink()
    assert len(build(tmp_path, [pictures])) == 23    # as the sentence promises


# ---- in the script ----


def test_the_script_refuses_a_stale_cache(setting, tmp_path):
    cache = tmp_path / "tokens"
    flags = ["--token-cache", str(cache), "--epochs", "1"]
    succeed("transformer", setting.argv("transformer", tmp_path / "a", *flags))
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert sum(len(value) for name, value in before.items() if name.endswith(".u16")) == 24 * 2 * 16 * 2
    assert not (tmp_path / "a" / "tokens").exists()
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    succeed("transformer", [*setting.argv("transformer", tmp_path / "a", *flags), "--resume", "auto"])
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    other = write_pictures(tmp_path / "other", 24, seed=5)
    state = load_checkpoint(setting.vqgan, "vqgan-training")
    state["ema"]["codebook.embedding.weight"] = state["ema"]["codebook.embedding.weight"].flip(0)
    save_checkpoint(tmp_path / "other.pt", state)
    vqgan = ["--vqgan", str(tmp_path / "other.pt")]
    for argv, reason in (
        (setting.argv("transformer", tmp_path / "b", *flags, *vqgan), "another VQGAN"),
        (setting.argv("transformer", tmp_path / "b", *flags, train=other), "other pictures"),
        (setting.argv("transformer", tmp_path / "b", *flags, "--set", "transformer.pixel_dim=0"), "pixels = True"),
    ):
        refused(run("transformer", argv), reason)
    stamp = (setting.train / "003.png").stat().st_mtime_ns
    os.utime(setting.train / "003.png", ns=(1, 1))    # written anew
    refused(run("transformer", setting.argv("transformer", tmp_path / "b", *flags)), "other pictures")
    os.utime(setting.train / "003.png", ns=(stamp, stamp))
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    state["ema"]["codebook.embedding.weight"] = state["ema"]["codebook.embedding.weight"].flip(0)
    state["ema"]["decoder.from_code.bias"] += 1    # the decoder makes no tokens
    save_checkpoint(tmp_path / "other.pt", state)
    succeed("transformer", setting.argv("transformer", tmp_path / "c", *flags, *vqgan))
    for text in (b"[1]", b"\x00\xff"):
        (cache / "about.json").write_bytes(text)
        refused(run("transformer", setting.argv("transformer", tmp_path / "b", *flags)), "about.json")


def test_killed_while_encoding(setting, tmp_path):
    def patch():
        token_cache.PIECE = 5
        real, calls = token_cache.encode, []

        def encode(vqgan, images, device):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(vqgan, images, device)

        token_cache.encode = encode

    def small():
        token_cache.PIECE = 5

    assert run("transformer", setting.argv("transformer", tmp_path / "a", "--resume", "auto"), patch).code == -signal.SIGKILL
    succeed("transformer", setting.argv("transformer", tmp_path / "a", "--resume", "auto"), small)
    succeed("transformer", setting.argv("transformer", tmp_path / "b"), small)
    assert_same_run(tmp_path / "a", tmp_path / "b", "transformer")


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_shards_serve_both_stages_and_a_kill_in_mid_epoch(setting, tmp_path, stage):
    shards = write_shards(setting.train, tmp_path, 7)
    succeed(stage, setting.argv(stage, tmp_path / "whole", train=shards))
    argv = setting.argv(stage, tmp_path / "a", "--resume", "auto", train=shards)
    for micro in (9, 7):    # step 5, then step 8: both in mid-epoch
        assert run(stage, argv, kill_at(micro)).code == -signal.SIGKILL
    succeed(stage, argv)
    assert_same_run(tmp_path / "whole", tmp_path / "a", stage)


def test_decoding_workers_change_nothing_and_outlive_a_stop_request(setting, tmp_path):
    shards = write_shards(setting.train, tmp_path, 7)
    succeed("vqgan", setting.argv("vqgan", tmp_path / "whole", train=shards))
    argv = setting.argv("vqgan", tmp_path / "a", "--workers", "2", "--resume", "auto", train=shards)
    child = Child("vqgan", argv, os.setpgrp)
    wait_for_step(tmp_path / "a", 4)
    os.killpg(child.pid, signal.SIGTERM)    # workers and all, as a terminal or SLURM does
    assert child.wait().code == 143, child.text
    succeed("vqgan", argv)
    assert_same_run(tmp_path / "whole", tmp_path / "a", "vqgan")


def test_a_run_with_decoding_workers_ends(setting, tmp_path):
    """In a process of its own, as Python waits for workers when it exits, which forked children leave out."""
    shards = write_shards(setting.train, tmp_path, 7)
    argv = setting.argv("vqgan", tmp_path / "a", "--workers", "1", "--epochs", "1", train=shards)
    subprocess.run([sys.executable, training_vqgan.__file__, *argv], check=True, timeout=100)


def test_tokens_only(setting, tmp_path):
    """A transformer that looks at no pixels trains from tokens alone, though pictures are gone."""
    flags = ["--set", "transformer.pixel_dim=0", "--token-cache", str(tmp_path / "t"), "--epochs", "1"]
    succeed("transformer", setting.argv("transformer", tmp_path / "a", *flags))
    assert not list((tmp_path / "t").glob("pixels-*")) and list((tmp_path / "t").glob("plain-*"))
    assert len([line for line in metrics(tmp_path / "a") if "loss" in line]) == 3
