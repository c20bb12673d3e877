"""Every command: --help answers at once, and a mistaken flag is one sentence and exit code 2."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted({path.stem if path.is_file() else path.name for path in (ROOT / "tools").iterdir()
                if path.suffix == ".py" or (path / "__main__.py").exists()} - {"__init__"})
COMMANDS = [[path.name] for path in sorted(ROOT.glob("*.py")) if path.stem != "utils"]
COMMANDS += [["-m", f"tools.{name}"] for name in TOOLS] + [["-m", "demo"]]
# What is slow to import must not be loaded for a help text.
HEAVY = {"torch", "torchvision", "gradio", "matplotlib", "scipy", "timm", "models.maskgit"}


def run(command: list[str], *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_there_are_commands():
    assert {"inpainting.py", "evaluate.py", "tools.dataset", "demo"} <= {command[-1] for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_answers_at_once(command):
    done = run(["-X", "importtime", *command], "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and done.stdout.count("--") > 2, done.stderr[-500:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "utils" in imported and not imported & HEAVY


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_a_mistaken_flag_is_one_sentence(command):
    done = run(command, "--no-such-flag", "1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--help" in done.stderr


@pytest.mark.parametrize("command", ["check", "split", "holes", "shards"])
def test_the_parts_of_the_dataset_tool_have_a_help(command):
    done = run(["-m", "tools.dataset"], command, "--help")
    assert done.returncode == 0 and command in done.stdout
