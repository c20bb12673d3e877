"""Who may import whom, and how long a file, a function and a class may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each part may import of this project, besides itself. Parts that are not named here are commands.
MAY_IMPORT = {
    "utils": set(),
    "models": set(),
    "pictures": {"utils"},
    "training": {"utils", "pictures", "models"},
    "evaluation": {"utils", "pictures", "models"},
}
COMMANDS = {path.stem for path in ROOT.glob("*.py")} - {"utils"} | {"tools", "demo"}
PARTS = {*MAY_IMPORT, *COMMANDS}
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
