import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models import transformer


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of pictures and weights beside the repository, which is not part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the pictures and weights in {folder}, which is not there")
    return folder


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
