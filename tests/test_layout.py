"""Who may import whom, what may lie in the repository, and that configs and package lists fit the code."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import utils

try:
    import tomllib
except ImportError:    # Python 3.10; pytest brings the same parser there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# Every module beside the tests and outside models/. A library: which of the project's modules it may import. A script:
# any but a script. A new file goes into one of the two, and into py-modules of pyproject.toml.
LIBRARIES = {
    "data": {"dataset_tools"},    # in a function only: its command line, which needs the module as a whole
    "dataset_tools": {"data"},
    "features": {"metrics", "utils"},
    "figures": {"data", "models", "utils"},
    "metrics": {"models.perceptual", "utils"},
    "muon": set(),
    "tasks": {"data", "models", "utils"},
    "token_cache": {"data", "training", "utils"},
    "training": {"data", "models", "utils"},
    "utils": set(),
}
SCRIPTS = {
    "baselines", "benchmark", "demo", "evaluate", "export", "generate", "inpainting", "ladder", "reconstruct", "sweep",
    "training_finish", "training_transformer", "training_vqgan",
}    # fmt: skip
LEAVES = {"models.attention", "models.autoencoder", "models.codebook", "models.quantize", "models.schedule"}
ONLY_IN_FUNCTIONS = {("data", "dataset_tools")}

# Packages that are imported under another name.
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"}

CONFIG_CLASSES = {
    "vqgan": ("models.vqgan", "VQGANConfig"),
    "transformer": ("models.transformer", "TransformerConfig"),
    "train_vqgan": ("training_vqgan", "TrainVQGANConfig"),
    "train_transformer": ("training_transformer", "TrainTransformerConfig"),
    "train_finish": ("training_finish", "FinishConfig"),
}

LARGEST = 24_000_000    # bytes
# What only means something on the machine where it was written, and where a package manager gets its packages.
UNWANTED = re.compile(
    rb"/work/|/root/|/home/|/Users/|\.\./shared|pypi\.org|pythonhosted|npmjs\.(?:org|com)|deb\.debian"
    rb"|--(?:extra-)?index-url|--trusted-host|--find-links"
)


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py")])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


# ---- imports ----


def imports(source: str, package: str) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, each with whether it does so in a function. `package`: the file's folder."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module) if part)
            found.extend((f"{base}.{alias.name}" if base == "models" else base, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.extend((arg.value, lazy) for arg in node.args[:1] if isinstance(arg, ast.Constant))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def import_complaints(module: str, source: str) -> list[str]:
    """Sentences about the imports of a file that the rules forbid."""
    complaints = []
    for name, lazy in imports(source, module.rpartition(".")[0] or module):
        top = name.partition(".")[0]
        ours = top == "models" or top in LIBRARIES or top in SCRIPTS
        if top in ("tests", "conftest"):
            complaints.append(f"{module} imports {name}: only tests import from tests")
        elif module in LEAVES and top != "torch" and top not in sys.stdlib_module_names:
            complaints.append(f"{module} imports {name}: it is a leaf, torch and the standard library must do")
        elif module.partition(".")[0] == "models" and ours and top != "models":
            complaints.append(f"{module} imports {name}: models/ must not know the rest of the project")
        elif module in LIBRARIES and ours and not {name, top} & LIBRARIES[module]:
            allowed = ", ".join(sorted(LIBRARIES[module])) or "nothing"
            complaints.append(f"{module} imports {name}: of the project it may import {allowed}")
        elif module in SCRIPTS and top in SCRIPTS:
            complaints.append(f"{module} imports {name}: a script must not import a script, only libraries")
        elif (module, name) in ONLY_IN_FUNCTIONS and not lazy:
            complaints.append(f"{module} imports {name} at its top: they import each other, it must be in a function")
    return complaints


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_imports_follow_the_layout(path):
    complaints = import_complaints(module_name(path), path.read_text(encoding="utf-8"))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("models.maskgit", "import data", "models/ must not know"),
        ("models.maskgit", "def f():\n    from utils import seeded", "models/ must not know"),
        ("models", "import evaluate", "models/ must not know"),
        ("models.schedule", "import numpy as np", "is a leaf"),
        ("models.attention", "from models.codebook import Codebook", "is a leaf"),
        ("models.codebook", "from . import attention", "is a leaf"),
        ("models.autoencoder", "from .attention import MultiHeadAttention", "is a leaf"),
        ("data", "if True:\n    from utils import UserError", "it may import"),
        ("utils", "from models.vqgan import VQGAN", "it may import nothing"),
        ("utils", "import importlib\nimportlib.import_module('data')", "it may import nothing"),
        ("metrics", "from models.vqgan import VQGAN", "it may import"),
        ("metrics", "from models import MaskGIT", "it may import"),
        ("data", "import dataset_tools", "must be in a function"),
        ("inpainting", "def f():\n    import evaluate", "must not import a script"),
        ("sweep", "import os, inpainting as i", "must not import a script"),
        ("evaluate", "from tests.conftest import shared", "only tests"),
    ],
)
def test_a_forbidden_import_is_found(module, source, rule):
    [complaint] = import_complaints(module, source)
    assert rule in complaint and complaint.startswith(f"{module} imports ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.schedule", "import math\nimport torch.nn.functional as F\nfrom torch import Tensor"),
        ("models.transformer", "from models.attention import MultiHeadAttention\nfrom .schedule import gamma"),
        ("metrics", "from models.perceptual import PerceptualFeatures\nfrom models import perceptual\nimport utils"),
        ("data", "def main():\n    import dataset_tools"),
        ("dataset_tools", "from data import read_image"),
        ("sweep", "import data, utils, metrics\nfrom models import MaskGIT"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert import_complaints(module, source) == []


def unclassified(paths: list[Path]) -> list[str]:
    known = {f"{name}.py" for name in [*LIBRARIES, *SCRIPTS]}
    return [
        f"{path} has no place: name it in tests/test_layout.py (LIBRARIES or SCRIPTS), or move it to models/"
        for path in paths
        if path.suffix == ".py" and path.parts[0] not in ("models", "tests") and path.as_posix() not in known
    ]


def test_every_python_file_has_a_place(tracked):
    assert unclassified(tracked) == []
    assert unclassified([path.relative_to(ROOT) for path in source_files()]) == []


def test_a_python_file_without_a_place_is_found():
    names = ("helpers.py", "data.py", "models/new.py", "tests/test_x.py", "tools/data.py", "README.md")
    complaints = unclassified([Path(name) for name in names])
    assert [complaint.partition(" has ")[0] for complaint in complaints] == ["helpers.py", "tools/data.py"]


# ---- packages ----


def requirements(name: str) -> dict[str, str]:
    """package -> the line that asks for it."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("-r ")]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-"): line for line in lines}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pyproject_takes_its_dependencies_from_the_requirements_files(project):
    """Setuptools reads them itself, so that they can't differ; it knows no options such as -r."""
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert set(project["project"]["dynamic"]) == set(dynamic) == {"dependencies", "optional-dependencies"}
    assert not {"dependencies", "optional-dependencies"} & set(project["project"])
    assert dynamic["dependencies"] == {"file": ["requirements.txt"]}
    for section in (dynamic["dependencies"], *dynamic["optional-dependencies"].values()):
        for name in section["file"]:
            for line in (ROOT / name).read_text().splitlines():
                assert not line.startswith("-"), f"{name}: setuptools does not understand {line!r}"


def test_pyproject_names_every_module(project):
    assert project["tool"]["setuptools"]["py-modules"] == sorted([*LIBRARIES, *SCRIPTS])
    assert project["tool"]["setuptools"]["packages"] == ["models"]


def test_pytorch_is_not_pinned():
    """An upper bound would fight the build that fits the user's machine."""
    asked = {name: line for path in ROOT.glob("requirements*.txt") for name, line in requirements(path.name).items()}
    assert asked["torch"] == "torch>=2.6" and asked["torchvision"] == "torchvision"


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_what_is_imported_is_required(path):
    """At a file's top: requirements.txt. In a function, as are optional features, and for the demo: also the others."""
    always = set(requirements("requirements.txt"))
    optional = always | set(requirements("requirements-eval.txt")) | set(requirements("requirements-demo.txt"))
    for name, lazy in imports(path.read_text(encoding="utf-8"), "models"):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "models" or top in LIBRARIES or top in SCRIPTS:
            continue
        package = DISTRIBUTIONS.get(top, top.replace("_", "-")).lower()
        allowed = optional if lazy or path.stem == "demo" else always
        assert package in allowed, f"{path.name} imports {name}, but no requirements file asks for {package}"


# ---- what lies in the repository ----


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files that git tracks and that exist, relative to the repository."""
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git can't list the files of {ROOT}: {error}")
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_tracked_files_name_no_machine_and_no_registry(tracked):
    for path in tracked:
        if path.parts[0] != "tests":
            found = UNWANTED.search((ROOT / path).read_bytes())
            assert found is None, f"{path} has {found[0].decode()!r}, which means nothing on another machine"


@pytest.mark.parametrize("text", [b"cd /work/main", b"open('/home/me/x')", b"pip --index-url X", b"../shared/data"])
def test_a_machines_own_path_is_found(text):
    assert UNWANTED.search(b"before " + text + b" after")
    assert not UNWANTED.search(b"our work/life, at home; a shared index, python -m pip install -r requirements.txt")


def test_no_tracked_file_is_large(tracked):
    large = {str(path): (ROOT / path).stat().st_size for path in tracked if (ROOT / path).stat().st_size > LARGEST}
    assert not large, f"tracked files of more than {LARGEST} bytes: {large}"


# ---- configs ----


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yml")), ids=lambda path: path.name)
def test_configs_build_and_their_stages_fit(path):
    sections = utils.load_config(path)
    built = {}
    for section, values in sections.items():
        assert section in CONFIG_CLASSES, f"{path.name}: section {section!r} is not one of {', '.join(CONFIG_CLASSES)}"
        module, name = CONFIG_CLASSES[section]
        built[section] = utils.build_config(getattr(importlib.import_module(module), name), values, section)
    if {"vqgan", "transformer"} <= set(built):
        vqgan, transformer = built["vqgan"], built["transformer"]
        assert transformer.codebook_size == vqgan.codebook_size
        assert transformer.seq_len == (vqgan.image_size // vqgan.stride) ** 2
        assert transformer.pixel_dim in (0, 4 * vqgan.stride**2)    # RGB and hole of each pixel of a token


def test_there_is_a_config_and_all_end_alike():
    assert list(ROOT.glob("configs/*.yml")) and not list(ROOT.glob("configs/*.yaml"))
