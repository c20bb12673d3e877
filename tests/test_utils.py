"""utils.py: config, seeds, rates, checkpoints that survive accidents, logging, exit codes."""
import argparse
import errno
import json
import math
import os
import pickle
import resource
import signal
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from training.checkpoints import _MAGIC, check_same_config, find_resume, load_checkpoint, save_checkpoint, save_last
from training.logger import Logger
from training.optimization import cosine_rate, ema_decay_at, set_rate, update_ema
from training.options import add_training_flags, with_flags
from training.pictures_by_step import epoch_order
from training.processes import average_over_processes, check_split, make_accelerator
from training.stopping import NotFinite, StopRequest, check_finite
from utils import (
    Parser,
    UserError,
    atomic_write,
    build_config,
    fingerprint,
    load_config,
    pick_device,
    run_cli,
    seeded,
    writable_folder,
)

# ---- errors and the command line ----


def exit_code(main) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    return caught.value.code


def raiser(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error, code, said", [
    (UserError("no such file; give another"), 2, "error: no such file; give another\n"),
    (NotFinite("the loss is nan"), 2, "error: the loss is nan\n"),
    (UserError("unreadable"), 2, "error: unreadable\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_run_cli_says_what_is_wrong_in_a_sentence(error, code, said, capsys):
    assert exit_code(raiser(error)) == code
    captured = capsys.readouterr()
    assert captured.err == said and captured.out == ""


@pytest.mark.parametrize("given, code", [(0, 0), (None, None), (143, 143)])
def test_run_cli_passes_the_exit_code_on(given, code):
    assert exit_code(lambda: given) == code


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), OSError("a bug")])
def test_run_cli_does_not_hide_bugs(error):
    with pytest.raises(type(error), match="a bug"):
        run_cli(raiser(error))


def test_run_cli_when_the_reader_has_gone(tmp_path, monkeypatch):
    with open(tmp_path / "stdout", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert exit_code(raiser(BrokenPipeError())) == 141
        stdout.write("lost")    # what the interpreter flushes at exit goes nowhere
    assert (tmp_path / "stdout").read_text() == ""


def full_disk(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_parser_errors_are_user_errors():
    parser = Parser()
    parser.add_argument("--epochs", type=int)
    for argv, message in ((["--epochs", "x"], "invalid int value: 'x'; see --help$"), (["--epoch-s", "1"], "unrecognized")):
        with pytest.raises(UserError, match=message):
            parser.parse_args(argv)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("one", "two"):
        with atomic_write(str(path)) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text and names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_atomic_write_keeps_the_old_file_when_the_writer_fails(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError if error is OSError else error):
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error("failed")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, function, full_disk)
    with pytest.raises(UserError, match="^can't write .*file: No space left on device$"):
        with atomic_write(path) as temporary:
            temporary.write_text("new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_atomic_write_refuses_impossible_places_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for name, reason in (("file/child", "Not a directory|File exists"), ("folder", "Is a directory"),
                         ("n" * 255, "File name too long")):
        with pytest.raises(UserError, match=f"^can't write .*: ({reason})$"):
            with atomic_write(tmp_path / name) as temporary:
                temporary.write_text("new")
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "old"


def test_writable_folder(tmp_path, monkeypatch):
    folder = writable_folder(str(tmp_path / "a" / "b"))
    assert folder.is_dir() and names(folder) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output folder .*file is not writable .File exists.; give another one"):
        writable_folder(tmp_path / "file")
    monkeypatch.setattr("pathlib.Path.touch", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        writable_folder(folder)


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="'cuda' asked for, but PyTorch sees no CUDA device; use --device cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="'cuda:2' asked for, but there are only 2 CUDA devices"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name, message", [
    ("gpu", "unknown device 'gpu'; expected auto, cpu, cuda or cuda:N"), ("", "unknown device ''"),
    ("cuda:x", "unknown device 'cuda:x'"), ("meta", "device 'meta' is not supported"), ("mps", "'mps' is not supported"),
])
def test_pick_device_refuses_others(name, message):
    with pytest.raises(UserError, match=message):
        pick_device(name)


# ---- config ----


def config_file(tmp_path, text: str):
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    return tmp_path / "config.yml"


@pytest.mark.parametrize("text, value", [
    ("1e-4", 1e-4), ("1E-4", 1e-4), ("-1e3", -1000.0), ("+.5e1", 5.0), ("1.5e-3", 1.5e-3), ("1.e2", 100.0), (".5", 0.5),
    ("12", 12), ("1_000", 1000), ("1.0", 1.0), (".inf", math.inf), ("e4", "e4"), ("1e", "1e"), ("1e-4x", "1e-4x"),
    ("'1e-4'", "1e-4"), ("off", False), ("on", True), ("true", True), ("~", None), ("text", "text"), ("[1, 2e0]", [1, 2.0]),
])
def test_yaml_values(tmp_path, text, value):
    got = load_config(config_file(tmp_path, f"a:\n  key: {text}\n"))["a"]["key"]
    assert got == value and type(got) is type(value)
    assert load_config(config_file(tmp_path, "a: {}"), [f"a.key={text}"]) == {"a": {"key": value}}


def test_pyyaml_itself_is_left_as_it_was():
    assert yaml.safe_load("1e-4") == "1e-4"


def test_overrides_win_in_order(tmp_path):
    path = config_file(tmp_path, "a: {x: 1, y: 2}\nb: {z: 3}\n")
    assert load_config(path) == {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    given = ["a.x=5", "b.w=p=q", "a.x=[6, 7]"]
    assert load_config(path, given) == {"a": {"x": [6, 7], "y": 2}, "b": {"z": 3, "w": "p=q"}}


@pytest.mark.parametrize("override, message", [
    ("a.x", "is not of the form section.key=value"), ("x=1", "is not of the form"), (".x=1", "is not of the form"),
    ("a.=1", "is not of the form"), ("c.x=1", "no section 'c' in .*config.yml; it has a, b"),
    ("a.x=[1", "the value is not valid YAML"), ("a.x=2024-99-99", "the value is not valid YAML"),
])
def test_bad_overrides_are_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(config_file(tmp_path, "a: {x: 1}\nb: {}\n"), [override])
    assert repr(override) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("a: [1", "is not valid YAML"), ("a: {x: 2024-99-99}", "is not valid YAML"), ("", "must consist of sections"),
    ("a:\n", "must consist of sections"), ("- a\n", "must consist of sections"), ("a: 1\n", "must consist of sections"),
    ("a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
])
def test_bad_config_files_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=f"config .*config.yml {message}") as caught:
        load_config(config_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_unreadable_config_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yml can't be read \(No such file or directory\); give a YAML file"):
        load_config(tmp_path / "nowhere.yml")
    with pytest.raises(UserError, match="can't be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yml").write_bytes(b"a: {x: \xe9}")
    with pytest.raises(UserError, match="latin.yml is not valid YAML"):
        load_config(tmp_path / "latin.yml")


@dataclass
class Example:
    size: int = 8
    rate: float = 0.1
    name: str = "plain"
    flag: bool = False
    widths: list[int] = field(default_factory=lambda: [1, 2])

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.name == "both":
            raise ValueError("one thing and another don't fit")


def test_build_config_fills_in_what_is_given():
    assert build_config(Example, {}, "part") == Example()
    built = build_config(Example, {"rate": 1, "widths": [3], "flag": True, "name": "x"}, "part")
    assert built == Example(rate=1.0, widths=[3], flag=True, name="x") and type(built.rate) is float


@pytest.mark.parametrize("values, message", [
    ({"sise": 8}, "config part.sise: unknown key; part has size, rate, name, flag, widths"),
    ({3: 8}, "config part.3: unknown key; part has size, rate, name, flag, widths"),
    ({yaml.safe_load("2024-01-01"): 8}, "config part.2024-01-01: unknown key; part has size, rate, name, flag, widths"),
    ({"size": "8"}, "config part.size: Input should be a valid integer"),
    ({"size": 8.0}, "config part.size: Input should be a valid integer"),
    ({"size": True}, "config part.size: Input should be a valid integer"),
    ({"size": None}, "config part.size: Input should be a valid integer"),
    ({"size": yaml.safe_load("2024-01-01")}, "config part.size: Input should be a valid integer"),
    ({"rate": "1e-4"}, "config part.rate: Input should be a valid number"),
    ({"rate": math.nan}, "config part.rate: Input should be a finite number"),
    ({"rate": math.inf}, "config part.rate: Input should be a finite number"),
    ({"name": False}, "config part.name: Input should be a valid string"),
    ({"flag": "no"}, "config part.flag: Input should be a valid boolean"),
    ({"flag": 0}, "config part.flag: Input should be a valid boolean"),
    ({"widths": 3}, "config part.widths: Input should be a valid array"),
    ({"widths": [1, "2"]}, "config part.widths.1: Input should be a valid integer"),
    ({"size": 0}, "config part.size must be at least 1, got 0"),
    ({"name": "both"}, "config part: one thing and another don't fit"),
])
def test_build_config_refuses_by_full_key(values, message):
    with pytest.raises(UserError) as caught:
        build_config(Example, values, "part")
    assert str(caught.value) == message


# ---- randomness ----


def draw(*key) -> torch.Tensor:
    return torch.rand(64, generator=seeded(*key), dtype=torch.float64)


def test_equal_keys_give_equal_numbers_and_others_unrelated_ones():
    torch.manual_seed(1)
    first = draw(0, "mask", 7)
    torch.manual_seed(2)
    assert torch.equal(draw(0, "mask", 7), first)
    keys = [(0, "mask", 7), (0, "mask", 8), (1, "mask", 7), (0, "token", 7), (0, "mask", 77), (0, "mask"), (7, "mask", 0),
            (0, "mask", "7"), (-1, "mask", 7)]
    numbers = torch.stack([draw(*key) for key in keys])
    assert len(numbers.unique()) == numbers.numel()
    assert (numbers.corrcoef() - torch.eye(len(keys))).abs().max() < 0.5


def test_seeds_are_the_same_on_every_machine():
    """A published run can be repeated: these numbers depend on no hash seed, platform or earlier call."""
    assert seeded(0, "mask", 7).initial_seed() == 1099713319608923039    # sha256, as by hand
    assert epoch_order(5, 0, 0).tolist() == [0, 2, 4, 3, 1]


def test_epoch_order_is_a_permutation_of_its_own():
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert order.sort().values.equal(torch.arange(100))
    assert len({tuple(order.tolist()) for order in orders}) == 4


# ---- optimisation ----


def test_cosine_rate_closed_forms():
    def rate(step):
        return cosine_rate(step, total=110, peak=2.0, warmup=10)

    assert [rate(0), rate(4), rate(9), rate(10)] == [0.2, 1.0, 2.0, 2.0]
    assert rate(35) == pytest.approx(1 + math.sqrt(0.5)) and rate(60) == pytest.approx(1.0)
    assert rate(110) == pytest.approx(0, abs=1e-12) and rate(500) == pytest.approx(0, abs=1e-12)
    falling = [rate(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)
    assert cosine_rate(0, 100, 2.0, 0) == 2.0
    assert cosine_rate(3, 2, 2.0, 5) == pytest.approx(1.6) and cosine_rate(6, 5, 2.0, 5) == pytest.approx(0)


def test_set_rate_reaches_every_group():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 2.0}])
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_ema_is_a_weighted_mean():
    ema, model = nn.Linear(3, 2), nn.Linear(3, 2)
    nn.init.constant_(ema.weight, 1.0), nn.init.constant_(model.weight, 2.0)
    bias = ema.bias.detach().clone()
    for _ in range(3):
        update_ema(ema, model, 0.75)
    torch.testing.assert_close(ema.weight, torch.full((2, 3), 2 - 0.75**3))
    torch.testing.assert_close(ema.bias, model.bias + 0.75**3 * (bias - model.bias))
    assert (model.weight == 2).all() and ema.weight.requires_grad
    with pytest.raises(ValueError, match="shorter"):
        update_ema(ema, nn.Linear(3, 2, bias=False), 0.75)


def test_ema_decay_starts_short():
    assert ema_decay_at(0, 0.999) == 0.1 and ema_decay_at(8, 0.999) == 0.5
    assert ema_decay_at(8, 0.4) == 0.4 and ema_decay_at(10**6, 0.999) == 0.999


# ---- checkpoints ----


def state(step: int = 3) -> dict:
    return {"kind": "example", "step": step, "config": {"part": {"widths": [1, 2], "rate": 1e-4}},
            "model": {"w": torch.arange(5.0), "half": torch.ones(2, dtype=torch.bfloat16)}}


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "last.pt", state())
    return tmp_path / "last.pt"


def test_checkpoint_comes_back_as_it_was(checkpoint):
    loaded, given = load_checkpoint(str(checkpoint), "example"), state()
    assert loaded["config"] == given["config"] and loaded["step"] == 3
    assert all(torch.equal(loaded["model"][k], given["model"][k]) for k in given["model"])
    assert loaded["model"]["half"].dtype == torch.bfloat16 and names(checkpoint.parent) == ["last.pt"]


def refused(path, message: str, kind: str = "example") -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path, kind)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def sealed(path, payload: bytes):
    """A file with a correct checksum, as an attacker would make it."""
    import hashlib

    path.write_bytes(payload + _MAGIC + hashlib.sha256(payload).digest())
    return path


def test_damaged_checkpoints_are_refused(checkpoint):
    data = checkpoint.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 1):
        checkpoint.write_bytes(data[:length])
        refused(checkpoint, "is truncated or not one of this project's training checkpoints$")
    for position in (0, 100, len(data) // 2, len(data) - 41, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        checkpoint.write_bytes(flipped)
        refused(checkpoint, r"is damaged \(its checksum doesn't fit\); use an older one$")
    flipped = bytearray(data)
    flipped[-33] ^= 1    # in the mark before the checksum
    checkpoint.write_bytes(flipped)
    refused(checkpoint, "is truncated or not one")
    checkpoint.write_bytes(data)
    load_checkpoint(checkpoint, "example")


def test_foreign_checkpoints_are_refused(checkpoint, tmp_path):
    refused(tmp_path / "nowhere.pt", r"can't be read \(No such file or directory\)$")
    refused(tmp_path, "can't be read")
    torch.save(state(), tmp_path / "plain.pt")
    refused(tmp_path / "plain.pt", "not one of this project's training checkpoints$")
    refused(checkpoint, "holds 'example', expected 'other'$", kind="other")
    save_checkpoint(tmp_path / "list.pt", [1, 2])
    refused(tmp_path / "list.pt", "holds 'list', expected 'example'$")
    save_checkpoint(tmp_path / "kind.pt", {"step": 1})
    refused(tmp_path / "kind.pt", "holds None, expected 'example'$")
    for payload in (b"", b"no archive", b"PK\x03\x04"):
        refused(sealed(tmp_path / "odd.pt", payload), "can't be loaded safely: .+")


class Malicious:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path, archive):
    victim = tmp_path / "victim"
    if archive:
        save_checkpoint(tmp_path / "bad.pt", state() | {"extra": Malicious(victim)})
    else:
        sealed(tmp_path / "bad.pt", pickle.dumps(state() | {"extra": Malicious(victim)}, protocol=2))
    refused(tmp_path / "bad.pt", "can't be loaded safely")
    assert not victim.exists()
    torch.load(tmp_path / "bad.pt", weights_only=False) if archive else pickle.loads((tmp_path / "bad.pt").read_bytes())
    assert victim.exists()    # the trap works: it was the loading that was safe


def test_checkpoint_larger_than_the_disk_leaves_the_old_one(checkpoint):
    """A real failing write: files of this process may not grow beyond 64 KiB."""
    before = checkpoint.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with pytest.raises(UserError, match="^can't write .*last.pt: ") as caught:
            save_checkpoint(checkpoint, state() | {"large": torch.rand(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert checkpoint.read_bytes() == before and names(checkpoint.parent) == ["last.pt"]


def test_what_torch_makes_of_a_full_disk_becomes_one_sentence(tmp_path, monkeypatch):
    fail = raiser(RuntimeError("writing failed\nC++ stack trace ..."))
    monkeypatch.setattr(torch, "save", lambda *args: fail())
    with pytest.raises(UserError, match="^can't write .*last.pt: writing failed$"):
        save_checkpoint(tmp_path / "last.pt", state())


def test_save_last_keeps_the_one_before(tmp_path):
    for step in (1, 2, 3):
        save_last(tmp_path, state(step))
    assert names(tmp_path) == ["last.pt", "previous.pt"]
    steps = [load_checkpoint(tmp_path / name, "example")["step"] for name in names(tmp_path)]
    assert steps == [3, 2]


def test_save_last_loses_nothing_when_the_disk_is_full(tmp_path, monkeypatch):
    for step in (1, 2):
        save_last(tmp_path, state(step))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        save_last(tmp_path, state(3))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize("killed_at, expected", [(1, 2), (2, 3), (3, 3)])
def test_resume_after_a_kill_between_any_two_steps_of_save_last(tmp_path, monkeypatch, killed_at, expected):
    for step in (1, 2):
        save_last(tmp_path, state(step))
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == killed_at:
            raise KeyboardInterrupt    # instead of the renaming
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_last(tmp_path, state(3))
    monkeypatch.undo()
    assert find_resume(tmp_path, "auto", "example")["step"] == expected
    save_last(tmp_path, state(4))
    assert names(tmp_path) == ["last.pt", "previous.pt"]
    assert find_resume(tmp_path, "auto", "example")["step"] == 4


def test_find_resume(tmp_path, capsys):
    assert find_resume(tmp_path, None, "example") is None
    assert capsys.readouterr().err == ""
    assert find_resume(tmp_path, "auto", "example") is None
    assert "no usable checkpoint" in capsys.readouterr().err
    for step in (1, 2):
        save_last(tmp_path, state(step))
    save_checkpoint(tmp_path / "best.pt", state(0))
    assert find_resume(tmp_path, "auto", "example")["step"] == 2
    assert find_resume(tmp_path, str(tmp_path / "previous.pt"), "example")["step"] == 1
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="can't be read"):
        find_resume(tmp_path, str(tmp_path / "nowhere.pt"), "example")


def test_find_resume_falls_back_with_a_notice(tmp_path, capsys):
    for step in (1, 2):
        save_last(tmp_path, state(step))
    save_checkpoint(tmp_path / "best.pt", state(0))
    for broken, expected in (("last.pt", 1), ("previous.pt", 0)):
        (tmp_path / broken).write_bytes((tmp_path / broken).read_bytes()[:-7])
        assert find_resume(tmp_path, "auto", "example")["step"] == expected
        notice = capsys.readouterr().err
        assert notice.startswith("notice: checkpoint ") and f"{broken} is truncated" in notice
        assert "looking for an older one" in notice
    (tmp_path / "best.pt").write_bytes(b"")
    assert find_resume(tmp_path, "auto", "example") is None
    assert capsys.readouterr().err.count("notice: ") == 4


@pytest.mark.parametrize("best, expected", [(3, 3), (7, 7)])
def test_find_resume_takes_the_newer_of_previous_and_best(tmp_path, best, expected):
    save_checkpoint(tmp_path / "previous.pt", state(3))
    save_checkpoint(tmp_path / "best.pt", state(best))
    assert find_resume(tmp_path, "auto", "example")["step"] == expected
    save_checkpoint(tmp_path / "previous.pt", state(9))
    assert find_resume(tmp_path, "auto", "example")["step"] == 9
    save_checkpoint(tmp_path / "last.pt", state(5))    # the run's own last word goes before both
    assert find_resume(tmp_path, "auto", "example")["step"] == 5


def test_a_damaged_last_never_replaces_a_good_previous_before_the_new_one_is_written(tmp_path, monkeypatch):
    for step in (1, 2):
        save_last(tmp_path, state(step))
    (tmp_path / "last.pt").write_bytes(b"damaged")
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(torch, "save", full_disk)
        save_last(tmp_path, state(3))
    assert find_resume(tmp_path, "auto", "example")["step"] == 1


def test_a_run_continues_with_its_own_config():
    saved = {"a": {"x": 1, "accum_grad": 1}, "b": {"y": [1, 2]}}
    check_same_config(saved, {"a": {"x": 1, "accum_grad": 4}, "b": {"y": [1, 2]}})
    with pytest.raises(UserError, match=r"can't resume: b.y is \[1, 3\], the checkpoint was trained with \[1, 2\]"):
        check_same_config(saved, {"a": {"x": 1}, "b": {"y": [1, 3]}})
    check_same_config(saved, {"a": {"x": 1, "younger": 5}})    # a key that the checkpoint's version had not yet
    with pytest.raises(UserError, match="c.z is 1, the checkpoint was trained with None"):
        check_same_config(saved, {"c": {"z": 1}})


# ---- logging ----


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
    for step in (0, 1, 2, 3, 4):
        logger.log(step, loss=float(step))
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write('{"loss": 1}\n[1]\n\xff\n{"step": 1, "lo')    # not ours, and cut by the kill
    logger = Logger(tmp_path, 2)
    logger.log(3, loss=30.0)
    logger.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    Logger(tmp_path, 0).close()
    assert lines(tmp_path) == []


def test_logger_says_when_it_cannot_write(tmp_path):
    logger = Logger(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="can't write .*metrics.jsonl: Is a directory"):
        logger.log(1, loss=1.0)
    logger.close()


def test_only_one_process_logs(tmp_path):
    logger = Logger(tmp_path, 0, enabled=False)
    logger.log(1, loss=1.0)
    logger.close()
    assert names(tmp_path) == []


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_request_notes_the_signal_and_steps_back(number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None and stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.signal == number and stop.exit_code == code
    assert signal.getsignal(number) is before
    assert stop.exit_code == code


def test_asking_twice_does_not_wait_for_the_step():
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)    # a scheduler may repeat itself: nothing new
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.exit_code == 143


# ---- fingerprints ----


def test_fingerprint_tells_parts_apart():
    x = torch.arange(6.0)
    parts = [
        (x,), (x.view(2, 3),), (x.view(3, 2),), (x.double(),), (x.view(torch.int32),), (x.bfloat16(),), (x > 2,), (x + 1,),
        (x, x), (x[0],), (x[:0],), (), (1, 23), (12, 3), (123,), ("1", 23), (True,), ({"a": 1},), (Example(),),
        (Example(size=9),),
    ]
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint(x, Example(), 1) == fingerprint(x.clone(), Example(), 1)
    table = torch.arange(6.0).view(2, 3)
    assert fingerprint(table.T) == fingerprint(table.T.contiguous())
    assert fingerprint(nn.Parameter(x)) == fingerprint(x)
    assert len(fingerprint(x)) == 16


# ---- processes ----


def test_make_accelerator(monkeypatch):
    import accelerate

    asked, selected = [], []
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: asked.append(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    make_accelerator("cpu", "bf16")
    make_accelerator("cuda", "fp32", ["handler"])
    assert selected == []
    make_accelerator("cuda:1", "fp32")
    assert selected == [torch.device("cuda", 1)]    # the one asked for, not the first
    assert asked[0] == dict(mixed_precision="bf16", cpu=True, kwargs_handlers=[])
    assert asked[1] == dict(mixed_precision="no", cpu=False, kwargs_handlers=["handler"])


def test_batch_must_split_evenly():
    check_split(24, 3, SimpleNamespace(num_processes=4))
    for accum, processes in ((5, 4), (3, 16), (16, 3)):
        message = rf"batch_size \(24\) must be divisible by processes x accum_grad \({processes} x {accum}\)"
        with pytest.raises(UserError, match=message):
            check_split(24, accum, SimpleNamespace(num_processes=processes))


def test_average_over_processes():
    values = {"a": 1.0, "b": 3.0, "c": 0.1}    # 0.1 would lose digits in float32
    one = SimpleNamespace(num_processes=1)
    assert average_over_processes(values, one) == values
    assert average_over_processes({"a": torch.tensor(1.0, requires_grad=True), "b": 3, "c": 0.1}, one) == values

    def reduce(table, how):    # the other process has ones
        return {"mean": (table + 1) / 2, "sum": table + 1}[how]

    two = SimpleNamespace(num_processes=2, device="cpu", reduce=reduce)
    assert average_over_processes(values, two) == {"a": 1.0, "b": 2.0, "c": 0.55}


def test_check_finite():
    check_finite(torch.tensor(1e30), "loss")
    check_finite(1e300, "loss")
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NotFinite, match=f"the gradient is {value}: stopped before the weights were changed"):
            check_finite(torch.tensor(value), "gradient")


# ---- flags ----


def test_flags_that_are_given_win_over_the_config_file():
    parser = argparse.ArgumentParser()
    add_training_flags(parser, "configs/cat64.yml")
    needed = ["--train-dir", "a", "b", "--val-dir", "c", "--output-dir", "d"]
    args = parser.parse_args(needed)
    assert args.config == "configs/cat64.yml" and args.train_dir == ["a", "b"] and args.set == [] and args.resume is None
    section = {"epochs": 5, "other": 1}
    assert with_flags(section, args) == section
    args = parser.parse_args([*needed, "--epochs", "0", "--learning-rate", "1e-4", "--seed", "3", "--batch-size", "2",
                              "--accum-grad", "4", "--set", "a.x=1", "--set", "a.y=2"])
    flags = dict(epochs=0, learning_rate=1e-4, seed=3, batch_size=2, accum_grad=4)
    assert with_flags(section, args) == {"other": 1} | flags
    assert section == {"epochs": 5, "other": 1} and args.set == ["a.x=1", "a.y=2"]
    with pytest.raises(SystemExit):
        parser.parse_args([])
