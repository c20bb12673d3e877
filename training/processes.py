"""One process or many: what the training commands exchange between processes."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.stopping import NotFinite, StopRequest
from utils import UserError, pick_device

T = TypeVar("T")


def start_accelerator(device: str, precision: str, **ddp_options: bool):
    """The Accelerator: one process under `python`, several under `accelerate launch` or `torchrun`."""
    from accelerate import DistributedDataParallelKwargs, InitProcessGroupKwargs

    # On a CPU, oneDNN compiles kernels for every shape that it meets, and stage 2 hides another number of tokens at each
    # step. The 1,024 that it keeps by default fill gigabytes within a few hundred steps, and are hardly ever used again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    torch.backends.cudnn.benchmark = True    # on a GPU: convolutions meet the same shapes again and again
    # An hour: the others wait while one of them encodes its share of the pictures or writes a checkpoint.
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=1)), DistributedDataParallelKwargs(**ddp_options)]
    return make_accelerator(device, precision, handlers)


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


def agreed_signal(stop: StopRequest, accelerator: Any) -> int:
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
def frozen_discriminators(accelerator: Any, *discriminators: nn.Module) -> Iterator[list[nn.Module]]:
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
    except NotFinite:
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


def local_batches(accelerator: Any, *tensors: Tensor, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    """This process's rows of tensors of equal length, in batches, on its device."""
    mine = [tensor[accelerator.process_index :: accelerator.num_processes] for tensor in tensors]
    for start in range(0, len(mine[0]), batch_size):
        yield tuple(tensor[start : start + batch_size].to(accelerator.device) for tensor in mine)


def make_accelerator(device: str, precision: str, handlers: list[Any] = ()):
    """One process or many: the same script under `python`, `accelerate launch` and `torchrun`."""
    from accelerate import Accelerator

    chosen = pick_device(device)
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)    # Accelerate takes the current device, or its local rank's under a launcher
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=chosen.type == "cpu", kwargs_handlers=list(handlers)
    )


def check_split(batch_size: int, accum_grad: int, accelerator: Any) -> None:
    """The global batch must split evenly, or the mean of the parts would not be the mean of the whole."""
    processes = accelerator.num_processes
    if batch_size % (processes * accum_grad):
        raise UserError(
            f"batch_size ({batch_size}) must be divisible by processes x accum_grad ({processes} x {accum_grad})"
        )


def average_over_processes(values: dict[str, float | Tensor], accelerator: Any) -> dict[str, float]:
    """Means over all processes of numbers, or of tensors that hold one: read from the device once, not one by one."""
    table = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in values.values()])
    if accelerator.num_processes > 1:
        table = accelerator.reduce(table.to(accelerator.device), "mean")
    return dict(zip(values, table.tolist(), strict=True))
