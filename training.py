"""What both training scripts do alike: processes, pictures, where a run stands, the loop over steps.

Everything random is a function of (seed, step), and every process draws for the whole batch and takes every P-th picture of
it. So one process or several, an uninterrupted run or one that was killed and resumed, all compute the same.
"""

import contextlib
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from data import DataError, load_folder, open_shards
from models.decoding import places
from models.maskgit import MaskGIT

T = TypeVar("T")
LIMITS = {"image_size": 4096, "depth": 1000, "encoder_depth": 1000, "decoder_blocks": 1000, "discriminator_strided": 8}
MOST_PARAMETERS = 1e11
SECTIONS = ("vqgan", "train_vqgan", "transformer", "train_transformer", "train_finish")    # of a config file
MAX_SKIPPED = 10    # steps that --on-nan skip leaves out before it gives up


def add_flags(parser: utils.Parser) -> None:
    """The flags of both stages."""
    utils.add_training_flags(
        parser, "configs/cat64.yml", "folder(s) of training pictures, or WebDataset shards: 'cats-{0000..0099}.tar'"
    )
    parser.add_argument(
        "--on-nan", choices=("stop", "skip"), default="stop", help="what to do with a step whose loss is not finite"
    )


def load_sections(args: Any) -> dict[str, dict]:
    """The config file with --set. Every script reads its own sections of it; a section that none reads is a mistake."""
    sections = utils.load_config(args.config, args.set)
    for name in sections:
        if name not in SECTIONS:
            raise utils.UserError(f"config {args.config}: unknown section {name!r}; expected some of {', '.join(SECTIONS)}")
    return sections


def check_size(section: str, config: Any, build: Callable[[], nn.Module]) -> None:
    """Refuse a model that no machine holds, before any memory is asked for it. `build` makes it from `config`."""
    for name, limit in LIMITS.items():
        value = getattr(config, name, 0)
        if max(value, default=0) > limit if isinstance(value, list) else value > limit:
            raise utils.UserError(f"config {section}.{name} must be at most {limit}, got {value}")
    try:
        with torch.device("meta"):    # shapes alone
            count = sum(parameter.numel() for parameter in build().parameters())
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise utils.UserError(f"config {section} describes no model that can be made: {reason}") from error
    if count > MOST_PARAMETERS:
        raise utils.UserError(f"config {section} describes {count:.1e} parameters, more than {MOST_PARAMETERS:.0e}")


# ---- processes ----


def start(device: str, precision: str, **ddp_options: bool):
    """The Accelerator: one process under `python`, several under `accelerate launch` or `torchrun`."""
    from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # On a CPU, oneDNN compiles kernels for every shape that it meets, and stage 2 hides another number of tokens at each
    # step. The 1,024 that it keeps by default fill gigabytes within a few hundred steps, and are hardly ever used again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    torch.backends.cudnn.benchmark = True    # on a GPU: convolutions meet the same shapes again and again
    # An hour: the others wait while one of them encodes its share of the pictures or writes a checkpoint.
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=1)), DistributedDataParallelKwargs(**ddp_options)]
    return utils.make_accelerator(device, precision, handlers)


def on_main(accelerator: Any, function: Callable[[], T]) -> T:
    """Run a function on the main process and hand its result to all. If it fails, all end; the main one says why."""
    if accelerator.num_processes == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [None, False]    # result, whether it failed
    try:
        if accelerator.is_main_process:
            box[0] = function()
    except BaseException:
        box[1] = True
        raise
    finally:
        broadcast_object_list(box)
    if box[1]:
        raise SystemExit(2)
    return box[0]


def agreed_signal(stop: utils.StopRequest, accelerator: Any) -> int:
    """The number of the signal that any process got, 0 if none did: the same in all, so that all stop after the same step.

    (`stop.signal` itself may change at any moment, between one look at it and the next.)
    """
    number = stop.signal or 0
    if accelerator.num_processes > 1:
        table = torch.tensor(number, device=accelerator.device)
        dist.all_reduce(table, dist.ReduceOp.MAX)
        number = int(table)
    return number


@contextlib.contextmanager
def local_gradients(accelerator: Any, enabled: bool, *models: nn.Module) -> Iterator[None]:
    """While `enabled`, gradients add up in each process alone; they are exchanged with the last micro-batch only."""
    with contextlib.ExitStack() as stack:
        for model in models if enabled else ():
            stack.enter_context(accelerator.no_sync(model))
        yield


@contextlib.contextmanager
def judging(accelerator: Any, *discriminators: nn.Module) -> Iterator[list[nn.Module]]:
    """The discriminators as they judge for the generator's loss: no gradients of their own, and none to be exchanged."""
    judges = [accelerator.unwrap_model(x).requires_grad_(False) for x in discriminators]
    yield judges
    for judge in judges:
        judge.requires_grad_(True)


@contextlib.contextmanager
def errors_told_once(accelerator: Any, folder: str) -> Iterator[None]:
    """With several processes: what all of them find wrong the main one tells; and when one has died, the others, which fail
    in their next exchange with it, say so in a sentence instead of a traceback each."""
    try:
        yield
    except utils.NotFinite:
        if accelerator.is_main_process:
            raise
        raise SystemExit(2) from None
    except RuntimeError as error:
        exchange = isinstance(error, dist.DistError) or re.search("gloo|nccl|connection|peer", str(error), re.IGNORECASE)
        if accelerator.num_processes == 1 or not exchange:
            raise
        reason = " ".join(str(error).split())[:200]
        print(
            f"error: process {accelerator.process_index} lost contact with another one, which has ended or can't be reached "
            f"({reason}); the last checkpoint in {folder} is whole, continue with --resume auto",
            file=sys.stderr, flush=True,
        )    # fmt: skip
        raise SystemExit(1) from error


def share(accelerator: Any, *tensors: Tensor, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    """This process's rows of tensors of equal length, in batches, on its device."""
    mine = [tensor[accelerator.process_index :: accelerator.num_processes] for tensor in tensors]
    for start in range(0, len(mine[0]), batch_size):
        yield tuple(tensor[start : start + batch_size].to(accelerator.device) for tensor in mine)


def check_all_finite(values: dict[str, float], step: int) -> None:
    """Raise NotFinite that names the step and the first of its numbers that is not finite: terms come before their sums."""
    for name, value in values.items():
        utils.check_finite(value, f"{name.replace('_', ' ')} of step {step}")


# ---- pictures ----


def is_shards(path: str) -> bool:
    """Whether --train-dir names WebDataset shards rather than a folder."""
    return path.endswith(".tar") or path.startswith("pipe:") or "://" in path


@dataclass
class FolderPictures:
    """A training set in memory."""

    images: Tensor    # (M, 3, size, size) uint8
    batch_size: int
    seed: int
    rank: int
    processes: int

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, step: int) -> Tensor:
        """This process's pictures of a step's batch: positions rank, rank + P, ... of (B, 3, size, size)."""
        epoch, k = divmod(step, len(self) // self.batch_size)
        order = utils.epoch_order(len(self), self.seed, epoch)
        return self.images[order[k * self.batch_size : (k + 1) * self.batch_size][self.rank :: self.processes]]


@dataclass
class ShardPictures:
    """A training set larger than memory, streamed. Steps are asked for in order; after a gap the stream is opened anew."""

    pattern: str
    count: int        # pictures in all shards
    size: int
    batch_size: int
    seed: int
    rank: int
    processes: int
    workers: int      # processes that decode ahead; 0: none, decode when asked
    bad_images: str   # error or skip
    next_step: int = -1
    stream: Iterator[Tensor] = iter(())

    def __len__(self) -> int:
        return self.count

    def batch(self, step: int) -> Tensor:
        """This process's pictures of a step's batch, (B / P, 3, size, size)."""
        epoch, k = divmod(step, self.count // self.batch_size)
        if step != self.next_step or k == 0:
            mine = self.batch_size // self.processes
            shards = open_shards(self.pattern, self.size, batch_size=mine, seed=self.seed, epoch=epoch,
                                 rank=self.rank, world_size=self.processes, start=k * mine,
                                 bad_images=self.bad_images)    # fmt: skip
            # A generator of its own: the loader would draw from the global one, which dropout draws from as well.
            self.stream = iter(DataLoader(shards, mine, num_workers=self.workers, drop_last=True,
                                          worker_init_fn=_ignore_signals, generator=torch.Generator()))    # fmt: skip
        self.next_step = step + 1
        try:
            return next(self.stream)
        except StopIteration:
            raise DataError(f"{self.pattern} holds fewer pictures than the {self.count} of --train-pictures") from None


def _ignore_signals(worker: int) -> None:
    """A stop request reaches the whole process group; the training process decides when its workers end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def open_pictures(args: Any, size: int, c: Any, accelerator: Any) -> FolderPictures | ShardPictures:
    """The training pictures that --train-dir names. Raises if they don't make up one batch."""
    paths = args.train_dir
    place = {"seed": c.seed, "rank": accelerator.process_index, "processes": accelerator.num_processes}
    if args.workers < 0 or (args.train_pictures is not None and args.train_pictures < 1):
        raise utils.UserError("--workers must be 0 or more and --train-pictures at least 1")
    if not any(is_shards(path) for path in paths):
        images = torch.cat([load_folder(path, size, args.bad_images) for path in paths])
        pictures = FolderPictures(images, c.batch_size, **place)
    elif len(paths) == 1:
        shards = open_shards(paths[0], size).urls
        count = args.train_pictures or on_main(accelerator, lambda: sum(map(count_pictures, shards)))
        pictures = ShardPictures(paths[0], count, size, c.batch_size, **place, workers=args.workers,
                                 bad_images=args.bad_images)    # fmt: skip
    else:
        raise utils.UserError("--train-dir takes folders, or one quoted pattern of shards such as 'cats-{0000..0099}.tar'")
    check_one_batch(len(pictures), c)
    return pictures


def check_one_batch(pictures: int, c: Any) -> None:
    if pictures < c.batch_size:
        raise utils.UserError(f"{pictures} training pictures are fewer than one batch ({c.batch_size}); lower --batch-size")


def count_pictures(shard: str) -> int:
    """Samples in a tar file, from its headers alone: consecutive files that share a name up to the first dot."""
    if shard.startswith("pipe:") or "://" in shard:
        raise utils.UserError(f"the pictures in {shard} can't be counted here; give their number with --train-pictures")
    count, last = 0, None
    try:
        with tarfile.open(shard) as file:
            for member in file:
                name = re.match(r"((?:.*/|)[^.]+)[.][^/]*$", member.name)
                if member.isfile() and name and name[1] != last:
                    count, last = count + 1, name[1]
    except (OSError, tarfile.TarError) as error:
        raise utils.UserError(f"shard {shard} can't be read: {error}") from error
    return count


class Ahead:
    """A pure function of the step, computed ahead of time in threads, so that a GPU need not wait for its input.

    Args:
        function: step -> anything. Asked for in order; where it reads a stream of shards, one thread is the most.
        threads: that many steps are computed at once, ahead of the one asked for; 0: none, compute when asked.
    """

    def __init__(self, function: Callable[[int], T], threads: int) -> None:
        self.function = function
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads) if threads else None
        self.waiting: dict[int, Any] = {}

    def __call__(self, step: int) -> T:
        if self.pool is None:
            return self.function(step)
        steps = range(step, step + self.threads + 1)
        self.waiting = {s: self.waiting.get(s) or self.pool.submit(self.function, s) for s in steps}
        return self.waiting.pop(step).result()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """`x.to(device)`; to a GPU from memory that it reads by itself, so that nothing waits for the copy."""
    return (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=True)


def beside(device: torch.device, function: Callable[[int], Iterable[Tensor | None]]) -> Callable[[int], Any]:
    """The same function for a thread of its own: its work on a GPU runs in a stream of its own, beside the training's."""
    if device.type != "cuda":
        return function
    stream, training = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(training)    # which may still be filling the weights

    def call(step: int) -> Iterable[Tensor | None]:
        with torch.cuda.stream(stream):
            result = function(step)
        stream.synchronize()
        for x in result:
            if x is not None:
                x.record_stream(training)    # its memory is not given to others before the training has read it
        return result

    return call


class Captured:
    """A function as one CUDA graph: a replay costs one launch instead of thousands.

    Args:
        function: tensors, or None, -> tensors. Shapes are fixed, and it reads nothing back from the device; a backward pass
            may be part of it, if it begins with gradients set to None and these are left where they are. Where it casts
            automatically, the context begins and ends in it, so that the casts are the graph's own.
        inputs: the first ones; it is called with them three times before it is captured.
        beside: another graph whose memory this one may use for what it needs in between; they never run at once.
    """

    def __init__(
        self, function: Callable[..., Any], inputs: Iterable[Tensor | None], beside: "Captured | None" = None
    ) -> None:
        self.inputs = [None if x is None else x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        pool = None if beside is None else beside.graph.pool()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor | None) -> Any:
        """The outputs, which the next call writes over."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        self.graph.replay()
        return self.outputs


def check_capture(asked: bool, accelerator: Any) -> None:
    """Refuse --capture where there are no CUDA graphs, or gradients of several processes to be averaged."""
    if asked and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        here = f"{accelerator.num_processes} on {accelerator.device.type}"
        raise utils.UserError(f"--capture is for one process on a CUDA device, here there are {here}; leave it out")


class CapturedGradients:
    """A function that leaves gradients in parameters, as CUDA graphs: one for each combination of its inputs' shapes.

    A graph is made when its shapes are seen first; the state of the random numbers stays as if it had been there before.

    Args:
        function: as for `Captured`; begins with gradients set to None.
        parameters: all that get gradients.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self.function, self.parameters = function, list(parameters)
        self.graphs: dict[tuple, Captured] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """What the function returns, until the next call; the gradients lie in the parameters."""
        shapes = tuple(None if x is None else x.shape for x in inputs)
        if shapes not in self.graphs:
            with torch.random.fork_rng([torch.cuda.current_device()]):
                self.graphs[shapes] = Captured(self.with_gradients, inputs, next(iter(self.graphs.values()), None))
        returned, gradients = self.graphs[shapes](*inputs)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient    # each graph writes into its own
        return returned

    def with_gradients(self, *inputs: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        returned = self.function(*inputs)
        return returned, [parameter.grad for parameter in self.parameters]


def rounded_places(masked: Tensor) -> Tensor:
    """`places`, and after them as many others as make M a multiple of B * N / 16.

    So batches come with few different M, for each of which a CUDA graph can be captured.
    """
    step = max(1, masked.shape[1] // 16) * len(masked)
    first = places(masked)
    return torch.cat([first, places(~masked)[: -len(first) % step]])       # (M,)


# ---- where a run stands ----


class Counted:
    """Steps of a run, from its `config` and its `pictures`."""

    @property
    def per_epoch(self) -> int:
        return len(self.pictures) // self.config.batch_size

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.per_epoch


@dataclass
class Progress:
    """Saved in every checkpoint."""

    step: int = 0             # optimizer steps done
    best: float = math.inf    # lowest validation loss so far
    skipped: int = 0          # steps left out because their numbers were not finite
    pictures: int = 0         # in the training set


def resume(
    folder: Path, kind: str, wish: str | None, accelerator: Any, configs: dict, pictures: int,
    restore: Callable[[dict], None],
) -> Progress:    # fmt: skip
    """Continue as `wish` (--resume) says, in all processes from the same checkpoint: `restore` takes its state."""
    state = on_main(accelerator, lambda: _find(folder, kind, wish))
    if state is None:
        return Progress(pictures=pictures)
    try:
        utils.check_same_config(state["config"], configs)
        progress = Progress(int(state["step"]), float(state["best"]))
        progress.skipped, progress.pictures = state.get("skipped", 0), state.get("pictures", pictures)
        if progress.pictures != pictures:
            raise utils.UserError(f"can't resume: the run began with {progress.pictures} pictures, now there are {pictures}")
        restore(state)
    except utils.UserError:
        raise
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise utils.UserError(f"can't resume: the checkpoint does not fit this run ({reason})") from error
    return progress


def _find(folder: Path, kind: str, wish: str | None) -> dict | None:
    begun = [name for name in ("last.pt", "previous.pt", "best.pt") if (folder / name).exists()]
    if begun and wish is None:
        raise utils.UserError(
            f"{folder} holds a run already ({', '.join(begun)}); go on with --resume auto, or give another --output-dir"
        )
    state = utils.find_resume(folder, wish, kind)
    if state is not None and not (folder / "best.pt").exists():
        state["best"] = math.inf    # continued elsewhere: the best one from here on
    return state


# ---- the loop ----


def loop(
    c: Any,
    accelerator: Any,
    folder: Path,
    progress: Progress,
    *,
    per_epoch: int,
    on_nan: str,
    train_step: Callable[[int], dict[str, float]],
    validate: Callable[[int], dict[str, float] | None],
    state: Callable[[], dict],
    export: Callable[[], None] | None = None,
) -> int:
    """Train from where `progress` stands to the end.

    Args:
        c: the stage's config: epochs, batch_size, seed, log_every, save_every.
        train_step: step -> numbers to log. Raises NotFinite before it has changed anything.
        validate: epochs done -> scores with val_loss, the same in all processes; None where none is due.
        state: the checkpoint's content; `progress` is added to it.
        export: called when the validation loss has never been lower.
    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.
    """
    total, main = c.epochs * per_epoch, accelerator.is_main_process
    clock, done, stopped = Clock(), progress.step * c.batch_size, 0
    with (
        utils.StopRequest() as stop,
        contextlib.closing(utils.Logger(folder, progress.step, main)) as logger,
        tqdm(total=total * c.batch_size, initial=done, unit="img", disable=not main) as bar,
    ):
        if main and progress.step == 0:
            utils.save_last(folder, state() | asdict(progress))    # a disk that is too small shows now, not after hours
        while progress.step < total and not stopped:
            # For what models draw by themselves, such as dropout.
            torch.manual_seed(utils.seeded(c.seed, "step", progress.step, accelerator.process_index).initial_seed())
            values = step_or_skip(train_step, progress, on_nan)
            progress.step += 1
            clock.count(c.batch_size)
            shown = {name: f"{values[name]:.3g}" for name in ("loss", "learning_rate") if name in values}
            bar.set_postfix(shown, refresh=False)
            bar.update(c.batch_size)
            if progress.step % c.log_every == 0 or values.keys() & {"codes_used", "skipped"}:
                logger.log(progress.step, **values)
            scores = validate(progress.step // per_epoch) if progress.step % per_epoch == 0 else None
            if scores:
                logger.log(progress.step, **scores)
                if main:
                    speed = {"step": progress.step, "images/s": clock.speed()}
                    tqdm.write(json.dumps(speed | {name: round(value, 4) for name, value in scores.items()}))
                if scores["val_loss"] < progress.best:
                    progress.best = scores["val_loss"]
                    if main:
                        utils.save_checkpoint(folder / "best.pt", state() | asdict(progress))
                        if export:
                            export()
                clock = Clock()
            stopped = agreed_signal(stop, accelerator)
            if main and (due(progress.step, c.save_every, total) or stopped):
                utils.save_last(folder, state() | asdict(progress))
    if stopped and main:
        print(f"stopped by signal {stopped} after step {progress.step}; continue with --resume auto", file=sys.stderr)
    accelerator.end_training()
    return 128 + stopped if stopped else 0


def due(count: int, every: int, total: int) -> bool:
    """Whether something is done after this epoch or step, counted from 1: after every so many, and after the last."""
    return count % every == 0 or count == total


def other_tokens(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """The first weight in which two VQGANs' encoders or codebooks differ, so that they make other tokens; None: in none.

    Compared in half precision, which model files hold.
    """
    names = [name for name in other if not name.startswith("decoder.")]
    return next((n for n in names if n not in one or not torch.equal(one[n].cpu().half(), other[n].cpu().half())), None)


def other_model(flag: str, path: str, model: MaskGIT) -> MaskGIT:
    """The model file of a flag, which must have the tokens of `model`."""
    try:
        other = MaskGIT.from_file(path)
    except ValueError as error:
        raise utils.UserError(f"{flag}: {error}") from error
    if name := other_tokens(other.vqgan.state_dict(), model.vqgan.state_dict()):
        raise utils.UserError(f"{flag} {path} was trained on other tokens than those of the VQGAN here: {name} differs")
    return other


def trained_transformer(flag: str, path: str, model: MaskGIT) -> dict[str, Tensor]:
    """The transformer's weights in the model file of a flag, which must be of the architecture and the tokens of `model`.

    Its dropout may be another: that is how it was trained, not what it is.
    """
    trained, here = other_model(flag, path, model).transformer, model.transformer.config
    if replace(trained.config, dropout=here.dropout, attention_dropout=here.attention_dropout) != here:
        raise utils.UserError(f"{flag} {path} has another transformer, {asdict(trained.config)}; here it is {asdict(here)}")
    return trained.state_dict()


def trained_decoder(flag: str, path: str, model: MaskGIT) -> dict[str, Tensor]:
    """Like `trained_transformer`, of the decoder."""
    trained, here = other_model(flag, path, model).vqgan, model.vqgan.config
    if trained.config != here:
        raise utils.UserError(f"{flag} {path} has another VQGAN, {asdict(trained.config)}; here it is {asdict(here)}")
    return trained.decoder.state_dict()


def export(model: Any, path: Path, **notes: str) -> None:
    """A MaskGIT, both stages in one file."""
    with utils.atomic_write(path) as temporary:
        try:
            model.save_file(temporary, **notes)
        except SafetensorError as error:    # what safetensors makes of a full disk
            raise OSError(None, str(error)) from error


def step_or_skip(train_step: Callable[[int], dict[str, float]], progress: Progress, on_nan: str) -> dict[str, float]:
    """A step's numbers; with --on-nan skip, a step that is not finite is left out, MAX_SKIPPED times in a run."""
    try:
        return train_step(progress.step)
    except utils.NotFinite as error:
        if on_nan == "stop":
            raise
        progress.skipped += 1
        if progress.skipped > MAX_SKIPPED:
            raise utils.NotFinite(f"{error} ({MAX_SKIPPED} steps were left out before, more are not)") from error
        tqdm.write(f"notice: step left out ({progress.skipped} of at most {MAX_SKIPPED}): {error}", file=sys.stderr)
        return {"skipped": progress.skipped}


class Clock:
    """Pictures per second since it was made."""

    def __init__(self) -> None:
        self.started, self.pictures = time.perf_counter(), 0

    def count(self, pictures: int) -> None:
        self.pictures += pictures

    def speed(self) -> float:
        return round(self.pictures / (time.perf_counter() - self.started), 1)
