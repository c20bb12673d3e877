"""Every command, Python block, link and file name of the documents is right: short commands run, long ones are parsed.

In a document, capitals stand for what the reader has: TRAIN/, MASKS/, FILE.onnx.
"""

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import models
import utils

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = {"inpainting", "evaluate", "tools.dataset", "tools.figures", "tools.generate"}
UNLESS = {"--num-samples", "FILE.onnx"}    # takes long, or needs a file that is not here
SMALL = ["--checkpoint", "tiny.safetensors"]
QUICK = {"inpainting": [*SMALL, "--total-iter", "1", "--sweet-spot", "1"], "tools.generate": SMALL}
NOT_RUN = re.compile(r"^<!-- not run: [^\n]*\n```.*?^```", re.MULTILINE | re.DOTALL)    # needs what a test lacks


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of each `python ...`, `torchrun ...` and `accelerate launch ...` in a shell line."""
    starts = [i for i, word in enumerate(words) if word.endswith(".py") and "/" not in word or word == "-m"]
    for word in words:
        if " python " in word:    # bash -c '...'
            yield from commands(shlex.split(word))
    if starts and {"python", "torchrun", "accelerate"} & set(words):
        module, arguments = words[starts[0]], words[starts[0] + 1 :]
        if module == "-m":
            module, arguments = arguments[0], arguments[1:]
        yield ("demo.__main__" if module == "demo" else module.removesuffix(".py")), arguments


def shell_commands(path: Path) -> list[tuple[str, list[str]]]:
    blocks = [block.replace("\\\n", " ") for language, block in FENCE.findall(path.read_text()) if language == "bash"]
    lines = [line for block in blocks for line in block.splitlines() if "..." not in line]
    return [command for line in lines for command in commands(shlex.split(line, comments=True))]


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Path:
    """The folder of somebody who reads: the repository's files, some pictures under the documents' names, a small model."""
    monkeypatch.chdir(tmp_path)
    for name in ("samples", "checkpoints", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", "docs")
    samples = sorted((ROOT / "samples/images").iterdir())
    few = {"TRAIN": samples[:4], "VAL": samples[4:6], "VALMASKS": samples[4:6], "TEST": samples[6:8]}
    for name, paths in (few | dict.fromkeys(("PICTURES", "ORIGINALS", "MASKED", "MASKS"), samples[8:])).items():
        (tmp_path / name).mkdir()
        for path in paths:
            source = ROOT / "samples/masks" / path.name if "MASKS" in name else path
            shutil.copy(source, tmp_path / name / path.name)
    for run, value in (("vqgan", "val_plain_psnr"), ("maskgit", "val_loss")):
        (tmp_path / "runs/reference" / run).mkdir(parents=True)
        (tmp_path / "runs/reference" / run / "metrics.jsonl").write_text(f'{{"step": 1, "{value}": 2}}\n')
    torch.manual_seed(0)
    sections = utils.load_config(ROOT / "configs/tiny.yml")
    whole = sections["vqgan"] | {"image_size": 64}, sections["transformer"] | {"seq_len": 256}
    models.MaskGIT(*whole).save_file("tiny.safetensors")
    return tmp_path


def parse(module: str, arguments: list[str]) -> None:
    """Let a command read its arguments, and stop it there."""

    class Parsed(BaseException):
        pass

    def parse_args(self, *given):
        real(self, *given)
        raise Parsed

    real = utils.Parser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(utils.Parser, "parse_args", parse_args)
        importlib.import_module(module).main(arguments)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_run(path, reader):
    for module, arguments in shell_commands(path):
        try:
            parse(module, arguments)
        except ModuleNotFoundError as error:
            assert error.name == "gradio"    # `make test` does not install it
            continue
        without_network = module != "evaluate" or "none" in arguments
        if module in RUN and without_network and not UNLESS & set(arguments):
            code = importlib.import_module(module).main(arguments + QUICK.get(module, []))
            assert not code, shlex.join([module, *arguments])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_run(path, reader, monkeypatch):
    load = models.MaskGIT.from_pretrained
    small = dict.fromkeys((None, "cat64", "photo"), SMALL[1])
    monkeypatch.setattr(models.MaskGIT, "from_pretrained", lambda x=None, **options: load(small.get(x, x), **options))
    monkeypatch.setitem(sys.modules, "maskgit_inpainting", models)    # the name under which it is installed
    scope: dict = {}    # the blocks of a document follow each other
    for language, block in FENCE.findall(NOT_RUN.sub("", path.read_text())):
        if language == "python":
            exec(compile(block, name_of(path), "exec"), scope)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_files_and_make_targets_exist(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s#]+)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [link for link in links if ":" not in link and not (path.parent / link).exists()]
    named = re.findall(r"\b(?:configs|samples|checkpoints)/[\w./*-]*\w", text)
    missing += [name for name in named if not [*ROOT.glob(name)]]
    code = {path.name for pattern in ("*.py", "[!.]*/*.py") for path in ROOT.glob(pattern)}
    missing += [name for name in re.findall(r"`(?:\w+/)?(\w+\.py)`", text) if name not in code]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing += [name for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE) if name not in targets]
    assert not missing
