"""README.md, docs/ and the scripts' docstrings keep their promises: paths, commands, make targets and imports exist.

In a document, capitals stand for something of the reader's (PICTURES, runs/NAME), and what is written at run time lies
under a folder that .gitignore names; everything else that looks like a path of the repository must be one.
"""

import argparse
import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".", "docs", "checkpoints", "samples")
DOCUMENTS = sorted({ROOT / "README.md", *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))})
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))

WRITTEN_AT_RUN_TIME = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.endswith("/")}
LAUNCHERS = {"python", "python3", "accelerate", "torchrun"}
SOURCE_SUFFIXES = {".py", ".yml", ".yaml", ".toml", ".md", ".cff", ".txt"}
FENCE = re.compile(r"^ *```([^\n]*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


# ---- reading a document ----


def python_blocks(text: str) -> list[str]:
    return [block for language, block in FENCE.findall(text) if language.strip() == "python"]


def code_lines(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of fenced blocks (True), continued lines joined, Python left out, and the code in the prose (False)."""
    for language, block in FENCE.findall(text):
        if language.strip() != "python":
            yield from ((line, True) for line in block.replace("\\\n", " ").splitlines())
    yield from ((code, False) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)))


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [link.partition("#")[0] for link in found if not re.match(r"#|\w+:", link)]


def words_of(line: str) -> list[list[str]]:
    """The words of each command of a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
    lexer.whitespace_split = True
    commands = [[]]
    try:
        for word in lexer:
            if set(word) <= set(";|&>"):
                commands.append([])
            else:
                commands[-1].append(word)
    except ValueError:    # an apostrophe in what is no command
        return [line.split()]
    return [words for words in commands if words]


class Command(NamedTuple):
    script: str
    arguments: list[str]
    whole: bool    # nothing was left out, so that the parser must take it as it stands


def commands(text: str) -> Iterator[Command]:
    for line, fenced in code_lines(text):
        for words in words_of(line):
            at = next((i for i, word in enumerate(words) if re.fullmatch(r"(\./)?\w+\.py", word)), None)
            if at is None:
                continue
            arguments = words[at + 1 :]
            launched = not LAUNCHERS.isdisjoint(Path(word).name for word in words[:at])
            if launched or any(word.startswith("--") for word in arguments):
                whole = fenced and not any("..." in word or "…" in word or "[" in word for word in arguments)
                yield Command(Path(words[at]).name, arguments, whole)


def make_targets(text: str) -> set[str]:
    lines = [words for line, _ in code_lines(text) for words in words_of(line)]
    return {
        word
        for words in lines if "make" in words and all("=" in word for word in words[: words.index("make")])
        for word in words[words.index("make") + 1 :] if "=" not in word and not word.startswith("-")
    }    # fmt: skip


def paths(text: str) -> set[str]:
    """What looks like a path of the repository, and the targets of relative links."""
    words = {word.rpartition("=")[2].strip("\"'(),;:") for line, _ in code_lines(text) for word in line.split()}
    return {word for word in words if looks_like_ours(word)} | set(links(text))


def looks_like_ours(word: str) -> bool:
    if not re.fullmatch(r"(\./)?[\w*][\w.*-]*(/[\w.*-]+)*/?", word):
        return False
    parts = word.removeprefix("./").strip("/").split("/")
    if any(part.isupper() and not (ROOT / part).exists() for part in parts) or parts[0] in WRITTEN_AT_RUN_TIME:
        return False
    return word.endswith("/") or ("/" in word and (ROOT / parts[0]).is_dir()) or Path(word).suffix in SOURCE_SUFFIXES


# ---- what is there ----


class Captured(BaseException):
    """Carries a script's parser out of its `main`."""


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script's `main` builds; `main` is left at the moment when it would read the flags."""

    def capture(self, *_, **__):
        raise Captured(self)

    try:
        main = importlib.import_module(script.removesuffix(".py")).main
    except ImportError as error:
        pytest.skip(f"{script} needs a package that is not installed: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        try:
            main([])
        except Captured as captured:
            return captured.args[0]
    raise AssertionError(f"{script}: main() returns without reading its flags")


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    inner = [p for a in parser._actions if isinstance(a, argparse._SubParsersAction) for p in a.choices.values()]
    return set(parser._option_string_actions).union(*map(flags_of, inner))


@cache
def existing_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def existing_names() -> set[str]:
    folders = [ROOT, *(path for path in ROOT.iterdir() if path.is_dir() and path.name not in WRITTEN_AT_RUN_TIME)]
    return {path.name for folder in folders for path in folder.iterdir()}


# ---- complaints ----


def command_complaints(command: Command) -> Iterator[str]:
    if command.script not in SCRIPTS:
        yield f"there is no script {command.script}"
        return
    parser = parser_of(command.script)
    given = {word.partition("=")[0].rstrip(",.") for word in command.arguments if re.match(r"--\w", word)}
    unknown = sorted(given - flags_of(parser))
    if unknown:
        yield f"{command.script} has no {', '.join(unknown)}"
    elif command.whole:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):    # --help
            try:
                parser.parse_args(command.arguments)
            except ValueError as error:
                yield f"{command.script} {shlex.join(command.arguments)}: {error}"


def path_complaints(text: str, folder: Path) -> Iterator[str]:
    for path in sorted(paths(text)):
        bare = "/" not in path
        if not (bare and path in existing_names() or any(list(base.glob(path.strip("/"))) for base in (ROOT, folder))):
            yield f"there is no {path} (capitals stand for something of the reader's, e.g. PICTURES/)"


def import_complaints(text: str) -> Iterator[str]:
    """Python blocks are valid, and what they import from the project is there."""
    ours = {path.stem for path in ROOT.glob("*.py")} | {"models"}
    for block in python_blocks(text):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ours:
                module = importlib.import_module(node.module)
                yield from (f"{node.module} has no {a.name}" for a in node.names if not hasattr(module, a.name))


def complaints_about(text: str, folder: Path = ROOT) -> list[str]:
    found = [complaint for command in commands(text) for complaint in command_complaints(command)]
    found += path_complaints(text, folder)
    found += [f"the Makefile has no target {target}" for target in sorted(make_targets(text) - existing_targets())]
    return found + list(import_complaints(text))


# ---- the tests ----


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_promise_what_is_there(path):
    if not path.exists():
        pytest.skip(f"{path.name} is not written yet")
    complaints = complaints_about(path.read_text(encoding="utf-8"), path.parent)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstrings_promise_what_is_there(script):
    """Their commands end where two spaces or the line do."""
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8"))) or ""
    found = re.findall(r"(?:python|accelerate launch|torchrun)[^\n]* ?\w+\.py.*", docstring.replace("\\\n", " "))
    lines = [re.split(r"\s{2,}", line)[0] for line in found]
    complaints = complaints_about("```\n" + "\n".join(lines) + "\n```")
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```\npython evaluate.py --predicted A --ground-truth B --bogus 3\n```", "evaluate.py has no --bogus"),
        ("```\npython evaluate.py --predicted A --ground B\n```", "evaluate.py has no --ground"),    # no short forms
        ("```\npython evaluate.py --predicted A\n```", "required: --ground-truth"),
        ("```\npython evaluate.py --predicted A \\\n  --ground-truth B --seed one\n```", "invalid int value: 'one'"),
        ("```\nOMP_NUM_THREADS=1 python baselines.py --method telia ...; ls\n```", None),
        ("```\npython baselines.py --images A --masks B --output C --method telia\n```", "invalid choice: 'telia'"),
        ("```\ntorchrun --nproc-per-node 2 training_vqgan.py --confg x ...\n```", "training_vqgan.py has no --confg"),
        ("```\ncd A && accelerate launch ./training_vqgan.py --sets x ...\n```", "training_vqgan.py has no --sets"),
        ("run `python data.py chekc A --whole`", "data.py has no --whole"),
        ("```\npython data.py chekc A\n```", "invalid choice: 'chekc'"),
        ("run `python trainig.py`", "there is no script trainig.py"),
        ("run `make tests`", "the Makefile has no target tests"),
        ("```sh\nPYTHON=python3 make -j test inpant\n```", "the Makefile has no target inpant"),
        ("see `configs/cat46.yml`", "there is no configs/cat46.yml"),
        ("```\npython training_vqgan.py --config=confs/cat64.yml ...\n```", "there is no confs/cat64.yml"),
        ("```\nmodel/\n  atention.py   attention\n```", "there is no atention.py"),
        ("```\nmodel/\n  attention.py   attention\n```", "there is no model/"),
        ("all of `configs/*.yaml`", "there is no configs/*.yaml"),
        ("[licence](LICENCE)", "there is no LICENCE"),
        ("![cats](samples/no-such-picture.png)", "there is no samples/no-such-picture.png"),
        ('<img src="nowhere/cat.png" width="64">', "there is no nowhere/cat.png"),
        ("```python\nfrom models.schedule import gama\n```", "models.schedule has no gama"),
    ],
)    # fmt: skip
def test_a_broken_promise_is_found(text, complaint):
    found = complaints_about(text)
    assert found == [] if complaint is None else any(complaint in sentence for sentence in found), found


GOOD = r"""
Make sure that the pictures are there, then `make test`; [licence](LICENSE), [top](#top), [paper](https://arxiv.org/x.md).
```
make inpaint PYTHON=python3    # into out/; it doesn't ask anything
python evaluate.py --predicted out/telea --ground-truth PICTURES/test \
    --features none --json runs/NAME/scores.json > out/log.txt
python data.py check TRAIN VAL && python data.py split PICTURES --output data/cats --val-share 0.1
models/
  attention.py    the schedule's neighbour, w/o masks
```
`./configs/*.yml`, `owner/name`, `1/2`, `[-1, 1]`, `--seed`, `runs/NAME/notes.md`, `training_vqgan.py --resume auto`.
```python
from models.schedule import gamma
from pathlib import Path
```
"""


def test_a_document_without_mistakes_passes():
    assert complaints_about(GOOD) == []
    assert make_targets(GOOD) == {"test", "inpaint"}
    assert [(c.script, c.whole) for c in commands(GOOD)] == [
        ("evaluate.py", True), ("data.py", True), ("data.py", True), ("training_vqgan.py", False),
    ]    # fmt: skip
