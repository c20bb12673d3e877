"""Trainings of a second, for the tests: pictures, a config, and the scripts in child processes that may be killed anywhere.

A child is forked, not started anew: it has everything imported already, and what it breaks, it breaks for itself.
"""
import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # noqa: F401  here, so that not every child imports it
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import tools.dataset
import training.finish
import training.transformer
import training.vqgan
import training_finish
import training_transformer
import training_vqgan
from models.vqgan import VQGAN, VQGANConfig
from training.checkpoints import load_checkpoint, save_checkpoint
from training.run import Run
from utils import build_config, load_config, run_cli

if not hasattr(os, "fork"):
    pytest.skip("these tests fork their trainings", allow_module_level=True)

# Autograd decides at its first backward pass whether it keeps threads, which no fork copies. On a CPU it keeps none, unless
# something was compiled before, in another test: then it takes what the compiler registers for a second device.
torch.ones(1, requires_grad=True).sum().backward()

# 24 pictures, 3 steps an epoch, 12 steps in all. Stage 1: discriminator from step 5, frozen tokens from step 9.
CONFIG = """
vqgan: {image_size: 16, stride: 4, codebook_size: 32, codebook_dim: 4, encoder_width: 16, encoder_depth: 1,
        decoder_channels: [16, 8, 8], decoder_blocks: [1, 1, 1]}
train_vqgan: {epochs: 4, batch_size: 8, accum_grad: 2, learning_rate: 1e-3, warmup_steps: 2, ema_decay: 0.9,
              restart_every: 2, adversarial_from: 0.4, freeze_tokens_from: 0.7, discriminator_channels: 8,
              log_every: 1, save_every: 2, validate_every: 1, val_pictures: 5}
transformer: {codebook_size: 32, seq_len: 16, embed_dim: 16, depth: 1, num_heads: 2, mlp_dim: 32, dropout: 0.1,
              attention_dropout: 0.1, pre_norm: true, qk_norm: true, pixel_dim: 64}
train_transformer: {epochs: 4, batch_size: 8, accum_grad: 2, optimizer: muon, seed: 1, learning_rate: 0.2,
                    rate_schedule: plateau, plateau_patience: 0, ema_decay: 0.5, log_every: 1, save_every: 2,
                    sample_every: 2, val_pictures: 5}
"""
STEPS = 12
SCRIPTS = {"vqgan": training_vqgan, "transformer": training_transformer, "finish": training_finish}
STAGES = {"vqgan": training.vqgan, "transformer": training.transformer, "finish": training.finish}
KINDS = {"vqgan": training.vqgan.VQGANRun.KIND, "transformer": training.transformer.TransformerRun.KIND,
         "finish": training.finish.FinishRun.KIND}    # fmt: skip


# ---- input ----


def write_pictures(folder: Path, count: int, size: int = 16, seed: int = 0) -> Path:
    """Smooth random pictures 000.png, 001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        corners.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def write_shards(pictures: Path, folder: Path, shard_size: int = 6) -> str:
    argv = ["shards", str(pictures), "--output", f"{folder}/s-%02d.tar", "--size", "16", "--shard-size", str(shard_size)]
    assert tools.dataset.main(argv) == 0
    return f"{folder}/s-{{00..03}}.tar"


@dataclass
class Setting:
    """Input that trainings of both stages share."""

    root: Path
    train: Path
    config: Path
    vqgan: Path

    def argv(self, stage: str, output: Path, *more: str, train: str | Path | None = None) -> list[str]:
        flags = {"--config": self.config, "--train-dir": train or self.train, "--val-dir": self.root / "val",
                 "--output-dir": output, "--device": "cpu"}    # fmt: skip
        if stage == "transformer":
            flags["--vqgan"] = self.vqgan
        return [str(part) for pair in flags.items() for part in pair] + list(more)


def make_setting(root: Path) -> Setting:
    """Pictures, config, and a stage-1 checkpoint of random weights for stage 2."""
    setting = Setting(root, root / "train", root / "config.yml", root / "vqgan.pt")
    write_pictures(setting.train, 24)
    write_pictures(root / "val", 6, seed=1)
    setting.config.write_text(CONFIG)
    c = build_config(VQGANConfig, load_config(setting.config)["vqgan"], "vqgan")
    torch.manual_seed(0)
    state = {"kind": KINDS["vqgan"], "step": 0, "config": {"vqgan": asdict(c)}, "ema": VQGAN(c).state_dict()}
    save_checkpoint(setting.vqgan, state)
    return setting


def train_all(folder: Path) -> Path:
    """Both stages and the finish with configs/tiny.yml, two epochs each, in this process.

    In `folder`: pictures/, features.safetensors and second.safetensors (random perceptual networks), and the runs vqgan/,
    maskgit/ and finish/.
    """
    import timm
    from torchvision.models import squeezenet1_1

    write_pictures(folder / "pictures", 16, size=32)
    torch.manual_seed(0)
    save_file(squeezenet1_1(weights=None).features.state_dict(), folder / "features.safetensors")
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), folder / "second.safetensors")
    common = ["--config", "configs/tiny.yml", "--train-dir", folder / "pictures", "--val-dir", folder / "pictures"]
    common += ["--epochs", "2", "--device", "cpu"]
    weights = ["--perceptual-weights", folder / "features.safetensors"]
    vqgan, model = ["--vqgan", folder / "vqgan/last.pt"], ["--model", folder / "maskgit/maskgit.safetensors"]
    for script, output, *more in (
        (training_vqgan, "vqgan", *weights), (training_transformer, "maskgit", *vqgan),
        (training_finish, "finish", *vqgan, *model, *weights),
    ):    # fmt: skip
        assert script.main([str(x) for x in (*common, "--output-dir", folder / output, *more)]) == 0
    return folder


# ---- children ----


class Child:
    """`main(argv)` as a script, in a forked process."""

    def __init__(self, stage: str, argv: list[str], before: Callable[[], Any] | None = None, **env: str) -> None:
        """`before` runs in the child first, to break things there."""
        self.log = Path(argv[argv.index("--output-dir") + 1]).with_suffix(f".{time.monotonic_ns()}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        # The child must never destroy what the parent holds in reference cycles: an object with threads of its own (an
        # ONNX session, say) would wait there for threads that a fork does not copy, for ever.
        gc.freeze()
        self.pid = os.fork()
        if self.pid:
            gc.unfreeze()
        else:
            code = 70
            try:
                output = os.open(self.log, os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)    # not pytest's
                os.environ.update(env)
                for state in (AcceleratorState, GradientState, PartialState):    # what the parent has begun
                    state._shared_state.clear()
                torch.set_num_threads(1)
                training.vqgan.perceptual_network = lambda *_: None    # no weights, no network
                if before:
                    before()
                run_cli(lambda: SCRIPTS[stage].main(argv))
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self, seconds: float = 240) -> "Child":
        """To the end; then `code` is the exit code, or minus the signal that killed it, and `text` its output."""
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                pytest.fail(f"a training of a second has not ended after {seconds:.0f} s: {self.log.read_text()[-2000:]}")
            time.sleep(0.005)
        _, status = ended
        self.code = os.waitstatus_to_exitcode(status)
        self.text = self.log.read_text().replace("\r", "\n")
        self.log.unlink()
        return self

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ") or "Traceback" in line]


def run(stage: str, argv: list[str], before: Callable[[], Any] | None = None) -> Child:
    return Child(stage, argv, before).wait()


def succeed(stage: str, argv: list[str], before: Callable[[], Any] | None = None) -> Child:
    child = run(stage, argv, before)
    assert child.code == 0, child.text[-3000:]
    return child


def refused(child: Child, *words: str) -> None:
    """It ended in one sentence that has these words, and exit code 2."""
    assert child.code == 2 and len(child.errors) == 1, child.text[-2000:]
    assert all(word in child.errors[0] for word in words), child.errors[0]


def start_group(
    stage: str, argv: list[str], before: dict[int, Callable[[], Any]] | None = None, outputs: Path | None = None
) -> list[Child]:
    """Two processes as one run, as torchrun starts them.

    Args:
        before: of either, by rank.
        outputs: a folder for an --output-dir of its own for the one that is not the main one.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    env = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        if rank and outputs:
            argv = list(argv)
            argv[argv.index("--output-dir") + 1] = str(outputs / f"rank{rank}")
        children.append(Child(stage, argv, (before or {}).get(rank), RANK=str(rank), LOCAL_RANK=str(rank), **env))
    return children


def run_group(*args: Any, **options: Any) -> list[Child]:
    """`start_group`, to the end of both."""
    return [child.wait() for child in start_group(*args, **options)]


def kill_at(micro_batch: int) -> Callable[[], None]:
    """For `before`: SIGKILL when the process begins its n-th micro-batch, counted from 0."""

    def patch() -> None:
        real, seen = Run.micro_batch, iter(range(1 << 30))

        def counted(*args: Any) -> Any:
            if next(seen) == micro_batch:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        Run.micro_batch = counted

    return patch


def wait_for_step(folder: Path, step: int, seconds: float = 120) -> None:
    """Until a run has logged this step."""
    deadline = time.monotonic() + seconds
    while not any(line["step"] >= step for line in metrics(folder)):
        assert time.monotonic() < deadline, f"no step {step} in {folder} after {seconds} s"
        time.sleep(0.005)


# ---- results ----


def metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def checkpoint(folder: Path, stage: str, name: str = "last.pt") -> dict:
    return load_checkpoint(folder / name, KINDS[stage])


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ in a single bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [line for key in a for line in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{path}/{i}")]
    return [] if type(a) is type(b) and a == b else [path]


def assert_same_run(one: Path, two: Path, stage: str) -> None:
    """Weights, optimizers, plateau, EMA, usage, best loss, step, and every logged number are equal bit for bit."""
    for name in ("last.pt", "best.pt"):
        assert differences(checkpoint(one, stage, name), checkpoint(two, stage, name)) == []
    assert metrics(one) == metrics(two)
