"""utils.py: exit codes, notices, files that are written whole or not at all, config, seeds."""
import math
import sys
from dataclasses import field

import pytest
import torch
import yaml
from pydantic.dataclasses import dataclass
from torch import nn

from models.config import STRICT
from utils import (
    Parser,
    UserError,
    atomic_write,
    build_config,
    fingerprint,
    load_config,
    notice,
    run_cli,
    seeded,
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
    (UserError("half done", exit_code=1), 1, "error: half done\n"),
    (OSError(2, "No such file", "a.yml"), 2, "error: can't use a.yml: No such file\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_run_cli_says_what_is_wrong_in_a_sentence(error, code, said, capsys):
    assert exit_code(raiser(error)) == code
    captured = capsys.readouterr()
    assert captured.err == said and captured.out == ""


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


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_refuses_impossible_places_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for name in ("file/child", "folder", "n" * 256):
        with pytest.raises(UserError, match="can't write"):
            with atomic_write(tmp_path / name) as temporary:
                temporary.write_text("new")
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_text() == "old"


def test_a_notice_of_a_kind_is_printed_once_and_the_others_counted(capsys):
    def main():
        Parser().parse_args([])
        for i in range(6):
            notice(f"{i}.png is odd", "odd pictures", f"{i}.png")
        notice("by itself")
        assert capsys.readouterr().err == "notice: 0.png is odd\nnotice: by itself\n"
        return 0

    for _ in range(2):    # each command begins anew
        assert exit_code(main) == 0
        assert capsys.readouterr().err == "notice: odd pictures: 1.png, 2.png, 3.png and 2 more too\n"


# ---- config ----


def config_file(tmp_path, text: str):
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    return tmp_path / "config.yml"


@pytest.mark.parametrize("text, value", [
    ("1e-4", 1e-4), ("-1E3", -1000.0), ("+.5e1", 5.0), (".5", 0.5), ("12", 12), ("1.0", 1.0), (".inf", math.inf),
    ("1e", "1e"), ("1e-4x", "1e-4x"), ("'1e-4'", "1e-4"), ("off", False), ("[1, 2e0]", [1, 2.0]),
])
def test_yaml_values(tmp_path, text, value):
    got = load_config(config_file(tmp_path, f"a:\n  key: {text}\n"))["a"]["key"]
    assert got == value and type(got) is type(value)
    assert load_config(config_file(tmp_path, "a: {}"), [f"a.key={text}"]) == {"a": {"key": value}}


def test_overrides_win_in_order_and_configs_are_filled_in(tmp_path):
    path = config_file(tmp_path, "a: {x: 1, y: 2}\nb: {z: 3}\n")
    assert load_config(path) == {"a": {"x": 1, "y": 2}, "b": {"z": 3}}
    given = ["a.x=5", "b.w=p=q", "a.x=[6, 7]"]
    assert load_config(path, given) == {"a": {"x": [6, 7], "y": 2}, "b": {"z": 3, "w": "p=q"}}
    assert build_config(Example, {}, "part") == Example()
    built = build_config(Example, {"rate": 1, "widths": [3], "flag": True, "name": "x"}, "part")
    assert built == Example(rate=1.0, widths=[3], flag=True, name="x") and type(built.rate) is float


@pytest.mark.parametrize("override", ["a.x", "x=1", "a.=1", "c.x=1", "a.x=[1", "a.x=2024-99-99"])
def test_bad_overrides_are_refused(tmp_path, override):
    with pytest.raises(UserError) as caught:
        load_config(config_file(tmp_path, "a: {x: 1}\nb: {}\n"), [override])
    assert repr(override) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "a: {x: 2024-99-99}", "", "- a", "a: 1", "a: !!python/object/apply:os.getcwd []"])
def test_bad_config_files_are_refused(tmp_path, text):
    (tmp_path / "latin.yml").write_bytes(b"a: {x: \xe9}")
    for path in (config_file(tmp_path, text), tmp_path / "nowhere.yml", tmp_path, tmp_path / "latin.yml"):
        with pytest.raises(UserError, match=path.name) as caught:
            load_config(path)
        assert "\n" not in str(caught.value)


@dataclass(config=STRICT)
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


@pytest.mark.parametrize("values, key", [
    ({"sise": 8}, "part.sise"), ({yaml.safe_load("2024-01-01"): 8}, "part.2024-01-01"),
    ({"size": "8"}, "part.size"), ({"size": True}, "part.size"), ({"size": None}, "part.size"), ({"size": 0}, "part.size"),
    ({"rate": math.nan}, "part.rate"), ({"flag": 0}, "part.flag"), ({"widths": [1, "2"]}, "part.widths.1"),
    ({"name": "both"}, "part: one thing"),
])
def test_build_config_refuses_by_full_key(values, key):
    with pytest.raises(UserError, match=f"config {key}"):
        build_config(Example, values, "part")


# ---- randomness ----


def draw(*key) -> torch.Tensor:
    return torch.rand(64, generator=seeded(*key), dtype=torch.float64)


def test_equal_keys_give_equal_numbers_on_every_machine_and_others_unrelated_ones():
    torch.manual_seed(1)
    first = draw(0, "mask", 7)
    torch.manual_seed(2)
    assert torch.equal(draw(0, "mask", 7), first)
    keys = [(0, "mask", 7), (0, "mask", 8), (1, "mask", 7), (0, "token", 7), (0, "mask", 77), (0, "mask"), (7, "mask", 0),
            (0, "mask", "7"), (-1, "mask", 7)]
    numbers = torch.stack([draw(*key) for key in keys])
    assert len(numbers.unique()) == numbers.numel()
    assert (numbers.corrcoef() - torch.eye(len(keys))).abs().max() < 0.5
    assert seeded(0, "mask", 7).initial_seed() == 1099713319608923039    # sha256, as by hand


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
