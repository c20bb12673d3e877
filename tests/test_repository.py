"""The repository as a whole: every command's --help and mistaken flags, who may import whom, `pip install`."""
import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
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


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_answers_at_once_and_a_mistaken_flag_is_one_sentence(command):
    done = run(["-X", "importtime", *command], "--help")
    assert done.returncode == 0 and "usage:" in done.stdout and done.stdout.count("--") > 2, done.stderr[-500:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "utils" in imported and not imported & HEAVY
    done = run(command, "--no-such-flag", "1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--help" in done.stderr


# ---- layout ----


# What each part may import of this project, besides itself. Parts that are not named here are commands.
MAY_IMPORT = {
    "utils": set(),
    "models": set(),
    "pictures": {"utils"},
    "training": {"utils", "pictures", "models"},
    "evaluation": {"utils", "pictures", "models"},
}
PARTS = {*MAY_IMPORT, *(path.stem for path in ROOT.glob("*.py")), "tools", "demo"}
SOURCES = sorted(path for part in PARTS for path in [ROOT / f"{part}.py", *ROOT.glob(f"{part}/**/*.py")] if path.exists())
MOST_LINES = {ast.Module: 350, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60, ast.ClassDef: 200}


def imported_parts(tree: ast.Module) -> set[str]:
    """The parts of this project that a file imports by name, at its top or inside a function."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} & PARTS


def complaints(path: Path) -> list[str]:
    text, part = path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[0].removesuffix(".py")
    tree = ast.parse(text)
    # models/ is installed under another name, so it may not even import itself by name.
    allowed = set() if part == "models" else MAY_IMPORT.get(part, set(MAY_IMPORT)) | {part}
    found = [f"{part} must not import {name}" for name in sorted(imported_parts(tree) - allowed)]
    if text.count("\n") > MOST_LINES[ast.Module]:
        found.append(f"the file has more than {MOST_LINES[ast.Module]} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and node.end_lineno - node.lineno >= MOST_LINES.get(type(node), 10_000):
            found.append(f"{node.name} has more than {MOST_LINES[type(node)]} lines")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_keeps_the_rules(path):
    assert not complaints(path), "\n".join(complaints(path))


# ---- the installed package ----


USE = """
import numpy, sys
import maskgit_inpainting
from maskgit_inpainting import MaskGIT
model = MaskGIT.from_pretrained()
image, hole = numpy.full((64, 64, 3), 99, numpy.uint8), numpy.zeros((64, 64), bool)
hole[20:30, 20:30] = True
completed = model.inpaint(image, hole, total_iter=1)
assert (completed[~hole] == 99).all() and not (completed[hole] == 99).all()
model.save_pretrained(sys.argv[1])
again = MaskGIT.from_pretrained(sys.argv[1])
assert (again.inpaint(image, hole, total_iter=1) == completed).all()
print(maskgit_inpainting.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, Path]:
    """Python and site-packages of an environment that has the package, and all others from here."""
    pytest.importorskip("setuptools", minversion="77")
    source, environment = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("environment")
    for name in ("pyproject.toml", "README.md", "LICENSE"):    # a copy, as building writes into the folder
        shutil.copy(ROOT / name, source)
    for name in ("models", "checkpoints"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "torch-and-others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet"]
    flags = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*map(str, pip), "install", *flags, str(source)], check=True, timeout=120)
    return python, packages


def test_another_project_completes_a_picture_saves_and_loads_with_nothing_else_installed(installed, tmp_path):
    done = subprocess.run(
        [str(installed[0]), "-c", USE, str(tmp_path / "cat")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.strip()).is_relative_to(installed[1])
    card = (tmp_path / "cat/README.md").read_text()
    assert "research" in card and "license: mit" not in card
    assert sum(path.stat().st_size for path in (tmp_path / "cat").iterdir()) < 30e6
    names = {path.name for path in installed[1].iterdir()} - {"torch-and-others.pth"}
    assert {re.sub(r"-.*", "", name) for name in names} == {"maskgit_inpainting"}


def test_every_dependency_is_in_the_requirements_and_there_are_commands():
    assert {"inpainting.py", "evaluate.py", "tools.dataset", "demo"} <= {command[-1] for command in COMMANDS}
    tomllib = pytest.importorskip("tomllib")    # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) <= set((ROOT / "requirements.txt").read_text().splitlines())
