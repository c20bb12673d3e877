"""The token cache: holds what the encoder says, goes on after a kill, refuses what is stale."""
import io
import os
import re
import signal
import tarfile

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
)

from pictures.folders import load_folder, read_square
from pictures.shards import open_shards
from tools import dataset as dataset_tools
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


def write_shards(pictures, folder, shard_size=6) -> str:
    argv = ["shards", str(pictures), "--output", f"{folder}/s-%02d.tar", "--size", "16", "--shard-size", str(shard_size)]
    assert dataset_tools.main(argv) == 0
    return f"{folder}/s-{{00..03}}.tar"


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


def test_several_folders_and_shards_line_up(pictures, tmp_path):
    other = write_pictures(tmp_path / "other", 4, seed=7)
    shards = write_shards(pictures, tmp_path)
    cache = build(tmp_path / "cache", [other, shards])
    _, shown = cache.rows(torch.arange(len(cache)), torch.zeros(len(cache), dtype=torch.bool))
    streamed = list(open_shards(shards, SIZE, seed=None))
    assert torch.equal(shown, torch.cat([load_folder(other, SIZE), torch.stack(streamed)]))


def test_bad_pictures(tmp_path, capsys):
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


def test_fingerprint_sees_names_sizes_times_and_order(tmp_path):
    folder = write_pictures(tmp_path / "p", 6)
    seen = []

    def look():
        seen.append(token_cache.fingerprint_pictures(token_cache.list_pieces([str(folder)])))

    look()
    assert token_cache.fingerprint_pictures(token_cache.list_pieces([str(folder)])) == seen[0]
    os.utime(folder / "003.png", ns=(1, 1))
    look()
    (folder / "003.png").rename(folder / "0035.png")
    look()
    write_pictures(tmp_path / "q", 1, size=8)
    os.replace(tmp_path / "q" / "000.png", folder / "000.png")
    look()
    (folder / "005.png").unlink()
    look()
    assert len(set(seen)) == len(seen)


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


def test_bad_pictures_in_shards(setting, tmp_path):
    files = sorted(setting.train.iterdir())
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for path in files:
            content = b"no picture" if path.stem == "004" else path.read_bytes()
            info = tarfile.TarInfo(path.name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for stage in ("vqgan", "transformer"):
        flags = ["--epochs", "1", "--seed", "3"]
        refused(run(stage, setting.argv(stage, tmp_path / f"{stage}-a", *flags, train=tmp_path / "s.tar")), "004")
        flags += ["--bad-images", "skip"]
        child = succeed(stage, setting.argv(stage, tmp_path / f"{stage}-b", *flags, train=tmp_path / "s.tar"))
        assert re.search(r"skipped: .*004", child.text), child.text


def test_tokens_only(setting, tmp_path):
    """A transformer that looks at no pixels trains from tokens alone, though pictures are gone."""
    flags = ["--set", "transformer.pixel_dim=0", "--token-cache", str(tmp_path / "t"), "--epochs", "1"]
    succeed("transformer", setting.argv("transformer", tmp_path / "a", *flags))
    assert not list((tmp_path / "t").glob("pixels-*")) and list((tmp_path / "t").glob("plain-*"))
    assert len([line for line in metrics(tmp_path / "a") if "loss" in line]) == 3
