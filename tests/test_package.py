"""`pip install .` in a fresh virtual environment outside the clone, and what another project can do then."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
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


def test_nothing_but_the_package_is_installed(installed):
    names = {path.name for path in installed[1].iterdir()} - {"torch-and-others.pth"}
    assert {re.sub(r"-.*", "", name) for name in names} == {"maskgit_inpainting"}


def test_another_project_completes_a_picture_saves_and_loads(installed, tmp_path):
    done = subprocess.run(
        [str(installed[0]), "-c", USE, str(tmp_path / "cat")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(done.stdout.strip()).is_relative_to(installed[1])
    card = (tmp_path / "cat/README.md").read_text()
    assert "research" in card and "license: mit" not in card
    assert sum(path.stat().st_size for path in (tmp_path / "cat").iterdir()) < 30e6


def test_every_dependency_is_in_the_requirements():
    tomllib = pytest.importorskip("tomllib")    # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) <= set((ROOT / "requirements.txt").read_text().splitlines())
