import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models import transformer


@pytest.fixture(scope="session")
def setting(tmp_path_factory):
    """What trainings of a second need: pictures, a config, a stage-1 checkpoint. No test writes into it."""
    from tiny_runs import make_setting

    return make_setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="session", params=["vqgan", "transformer"])
def whole(request, setting, tmp_path_factory) -> tuple[str, Path]:
    """(stage, folder of a run that nobody interrupted). No test writes into it."""
    from tiny_runs import succeed

    folder = tmp_path_factory.mktemp(request.param) / "whole"
    succeed(request.param, setting.argv(request.param, folder))
    return request.param, folder


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> Path:
    """Five pictures of 32x32 as `write_set` writes them, and model.safetensors. No test writes into it."""
    from small_sets import save_model, write_set

    root = write_set(tmp_path_factory.mktemp("set"), 5, 32)
    save_model(root / "model.safetensors", 32)
    return root


@pytest.fixture
def small_networks(monkeypatch):
    """--features colour and --perceptual-weights anything give networks that need no file."""
    from small_sets import mean_colours, weighted_l1

    from evaluation import judge
    from evaluation.features import Features

    network = Features("Colour", "0" * 64, 12, mean_colours, batch_size=3)
    monkeypatch.setattr(judge, "load_features", lambda *args, **options: network)
    monkeypatch.setattr(judge, "load_perceptual", lambda *args: weighted_l1)


@pytest.fixture(autouse=True)
def new_accelerator() -> Iterator[None]:
    """accelerate keeps its first precision and device for the whole process, unless it is made to forget them."""
    yield
    if "accelerate.state" in sys.modules:
        for state in ("AcceleratorState", "GradientState", "PartialState"):
            getattr(sys.modules["accelerate.state"], state)._reset_state()


@pytest.fixture
def traced(monkeypatch) -> list[torch.nn.Module | Callable]:
    """What is compiled from here on, modules and functions: with a backend that computes the same and needs no compiler."""
    torch.compiler.reset()
    seen, compile_module = [], torch.nn.Module.compile

    def module(block: torch.nn.Module, **options) -> None:
        seen.append(block)
        compile_module(block, backend="eager", **options)

    def function(f: Callable) -> Callable:
        seen.append(f)
        return torch.compile(f, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", module)
    monkeypatch.setattr(transformer, "compile_once", function)
    return seen
