"""Whatever is wrong with a config or a flag: one sentence, exit code 2, and never a traceback.

Hypothesis makes the inputs. What it makes is not always wrong (a number may be a fine one): then the script may do its work,
which for a training ends before the first step. Each property counts how many distinct inputs were refused.
"""
import contextlib
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import evaluate
import inpainting
import training.loop
import training.transformer
import training.vqgan
import training_transformer
import training_vqgan
from utils import load_config, run_cli

MAINS = {
    "vqgan": training_vqgan.main, "transformer": training_transformer.main, "inpainting": inpainting.main,
    "evaluate": evaluate.main,
}    # fmt: skip


@pytest.fixture(autouse=True)
def nothing_but_the_beginning(monkeypatch, tmp_path):
    """Trainings end where the first step would begin; no network; no colours in what argparse prints."""
    monkeypatch.chdir(tmp_path)    # whatever is written goes there
    monkeypatch.setattr(training.loop, "training_loop", lambda *args, **options: 0)
    monkeypatch.setattr(training.vqgan, "load_features", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


def outcome(script: str, argv: list[str]) -> tuple[int, str]:
    """Exit code and what was printed on stderr."""
    for state in (AcceleratorState, GradientState, PartialState):    # of the example before, which had its own precision
        state._shared_state.clear()
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run_cli(lambda: MAINS[script](argv))
        except SystemExit as end:
            return end.code or 0, err.getvalue()


def refused(script: str, argv: list[str]) -> bool:
    """Whether the input was refused; if so, it was in one sentence."""
    code, err = outcome(script, argv)
    if code == 0 or any(flag in argv for flag in ("-h", "--help")):
        return False
    sentences = re.findall(r"^(?:\S+(?: \w+)?: )?error: .*$", err, re.MULTILINE)
    assert code == 2 and len(sentences) == 1, (script, argv, code, err)
    assert err.rstrip("\n").endswith(sentences[0]), f"it goes on after the sentence: {err!r}"
    assert len(sentences[0].split()) > 3 and len(sentences[0]) < 1500 and "object at 0x" not in sentences[0], err
    return True


def count_refused(strategy: st.SearchStrategy, examples: int, judge: Callable[[Any], bool]) -> int:
    """How many distinct inputs of `examples` were refused."""
    seen = set()

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))    # fmt: skip
    @given(strategy)
    def judge_one(case):
        if judge(case):
            seen.add(repr(case))

    judge_one()
    return len(seen)


# No control characters: a message repeats what was given, and a line break in it would make two lines.
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), max_size=12)
NUMBERS = st.one_of(
    st.integers(-3, 0), st.integers(2**40, 2**70), st.floats(allow_nan=True), st.sampled_from([-1, 0, 1.5, float("inf")])
)
VALUES = st.one_of(
    NUMBERS, TEXT, st.none(), st.booleans(), st.lists(st.integers(-2, 9), max_size=4),
    st.dictionaries(TEXT, st.just(1), max_size=2),
)


# ---- configs ----


@pytest.mark.parametrize("script", ["vqgan", "transformer"])
def test_values_in_configs(setting, tmp_path, script):
    base = load_config(setting.config)
    classes = {"vqgan": training.vqgan.VQGANConfig, "train_vqgan": training.vqgan.TrainVQGANConfig,
               "transformer": training.transformer.TransformerConfig,
               "train_transformer": training.transformer.TrainTransformerConfig}    # fmt: skip
    keys = [(section, key) for section in (script, f"train_{script}") for key in classes[section].__dataclass_fields__]
    case = st.tuples(st.sampled_from(keys), VALUES)

    def judge(case) -> bool:
        (section, key), value = case
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(base | {section: base[section] | {key: value}}, allow_unicode=True), encoding="utf-8")
        argv = setting.argv(script, tmp_path / "out", "--config", str(path), "--token-cache", str(tmp_path / "tokens"))
        return refused(script, argv if script == "transformer" else argv[:-2])

    assert count_refused(case, 60, judge) >= 25


# ---- flags ----

JUNK = st.one_of(
    NUMBERS.map(str), TEXT, TEXT.map(lambda text: f"nowhere/{text}"), st.just("x" * 300), st.just("/dev/null/x")
)


def flags_of(script: str) -> list[str]:
    """The flags that take a value, from the help text."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        MAINS[script](["--help"])
    return sorted(set(re.findall(r"(--[a-z-]+) [A-Z{]", text.getvalue())))


@pytest.fixture
def working(setting, small_set, tmp_path) -> dict[str, list[str]]:
    """Flags that work, by script."""
    pictures, masks = str(small_set / "originals"), ["--masks", str(small_set / "masks"), "--device", "cpu"]
    model = ["--checkpoint", str(small_set / "model.safetensors"), "--total-iter", "1", "--output", "out"]
    return {
        "vqgan": setting.argv("vqgan", tmp_path / "out"),
        "transformer": setting.argv("transformer", tmp_path / "out", "--token-cache", "tokens"),
        "inpainting": ["--images", pictures, *masks, *model],
        "evaluate": ["--predicted", pictures, "--ground-truth", pictures, *masks, "--features", "none"],
    }


@pytest.mark.parametrize(
    "script, examples, least",
    [("vqgan", 60, 25), ("transformer", 40, 15), ("inpainting", 50, 20), ("evaluate", 20, 8)],
)
def test_flags(working, script, examples, least):
    argv = working[script]
    assert not refused(script, argv)
    known = st.tuples(st.sampled_from(flags_of(script)), JUNK)
    unknown = TEXT.map(lambda text: (f"--{text}x", "1"))
    case = st.one_of(known, known, known, unknown)
    assert count_refused(case, examples, lambda pair: refused(script, argv + list(pair))) >= least
