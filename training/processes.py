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
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from torch import Tensor

from training.stopping import NotFinite, StopRequest
from utils import UserError, pick_device

T = TypeVar("T")


def start_accelerator(device: str, precision: str, **ddp_options: bool) -> Accelerator:
    """The Accelerator: one process under `python`, several under `accelerate launch` or `torchrun`."""
    # On a CPU, oneDNN compiles kernels for every shape that it meets, and stage 2 hides another number of tokens at each
    # step. The 1,024 that it keeps by default fill gigabytes within a few hundred steps, and are hardly ever used again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    torch.backends.cudnn.benchmark = True    # on a GPU: convolutions meet the same shapes again and again
    chosen = pick_device(device)
    if chosen.index is not None and chosen.type == "cuda":
        torch.cuda.set_device(chosen)    # Accelerate takes the current device, or its local rank's under a launcher
    # An hour: the others wait while one of them encodes its part of the pictures or writes a checkpoint.
    handlers = [InitProcessGroupKwargs(timeout=timedelta(hours=1)), DistributedDataParallelKwargs(**ddp_options)]
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no", cpu=chosen.type == "cpu", kwargs_handlers=handlers
    )
    accelerator.wait_for_everyone()    # a process that is refused at once would end while another one still connects to it
    return accelerator


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run a function on the main process and give its result to all. If it fails, all end, and the main one says why."""
    if accelerator.num_processes == 1:
        return function()
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


def agreed_signal(stop: StopRequest, accelerator: Accelerator) -> int:
    """The number of the signal that any process got, 0 if none: the same in all, so that all stop after the same step."""
    number = stop.signal or 0    # read once: it may change at any moment
    if accelerator.num_processes > 1:
        table = torch.tensor(number, device=accelerator.device)
        dist.all_reduce(table, dist.ReduceOp.MAX)
        number = int(table)
    return number


@contextlib.contextmanager
def errors_told_once(accelerator: Accelerator, folder: str) -> Iterator[None]:
    """With several processes, errors are printed once and without a traceback from each.

    What all processes find wrong, the main one says. When one process has died, the others fail in their next exchange with
    it and say that.
    """
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


def check_split(batch_size: int, accum_grad: int, accelerator: Accelerator) -> None:
    """Refuse a batch that does not split evenly: the mean of its parts would not be the mean of the whole."""
    processes = accelerator.num_processes
    if batch_size % (processes * accum_grad):
        raise UserError(
            f"batch_size ({batch_size}) must be divisible by processes x accum_grad ({processes} x {accum_grad})"
        )


def average_over_processes(values: dict[str, float | Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Means over all processes of numbers or one-element tensors. They are read from the device together, not one by one."""
    table = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in values.values()])
    if accelerator.num_processes > 1:
        table = accelerator.reduce(table.to(accelerator.device), "mean")
    return dict(zip(values, table.tolist(), strict=True))
