"""Keeps a GPU busy: work ahead of time, side streams, CUDA graphs."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from models.decoding import masked_positions
from utils import UserError

T = TypeVar("T")


class Ahead:
    """A pure function of the step, computed ahead of time in threads, so that a GPU need not wait for its input.

    Args:
        function: step -> anything. Steps must be asked for in order; where it reads a stream of shards, use one thread.
        threads: as many steps are computed at once, ahead of the one asked for; 0: computed when asked for.
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
    """`x.to(device)`. To a GPU the copy goes on by itself, from pinned memory, and nothing waits for it."""
    return (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=True)


def in_side_stream(device: torch.device, function: Callable[[int], Iterable[Tensor | None]]) -> Callable[[int], Any]:
    """The same function, to be called in a thread of its own: on a GPU its work runs in a stream beside the training's."""
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


def check_capture(asked: bool, accelerator: Accelerator) -> None:
    """Refuse --capture where there are no CUDA graphs, or where gradients of several processes have to be averaged."""
    if asked and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        here = f"{accelerator.num_processes} on {accelerator.device.type}"
        raise UserError(f"--capture is for one process on a CUDA device, here there are {here}; leave it out")


class Captured:
    """A function as CUDA graphs, one for each combination of its inputs' shapes: a replay costs one launch, not thousands.

    A graph is made when its shapes are seen first. Making it leaves random numbers and `buffers` as they were.

    Args:
        function: tensors, or None, -> tensors. It reads nothing back from the device. A backward pass may be part of it, if
            it sets the gradients to None first. Where it uses autocast, the context begins and ends inside it.
        parameters: all that get gradients from it.
        buffers: all that it changes besides.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: Iterable[nn.Parameter] = (), buffers: Iterable[Tensor] = ()
    ) -> None:
        self.function, self.parameters, self.buffers = function, list(parameters), list(buffers)
        self.replays: dict[tuple, Callable[..., tuple[Any, list[Tensor | None]]]] = {}
        self.pool: Any = None    # memory for what a graph needs in between; they share it, as they never run at once

    def __call__(self, *inputs: Tensor | None) -> Any:
        """What the function returns, until the next call. The gradients lie in the parameters."""
        shapes = tuple(None if x is None else x.shape for x in inputs)
        if shapes not in self.replays:
            before = [buffer.clone() for buffer in self.buffers]
            with torch.random.fork_rng([torch.cuda.current_device()]):
                self.replays[shapes] = self._capture(inputs)
            for buffer, value in zip(self.buffers, before, strict=True):
                buffer.copy_(value)
        returned, gradients = self.replays[shapes](*inputs)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient    # each graph writes into its own
        return returned

    def _call(self, *inputs: Tensor | None) -> tuple[Any, list[Tensor | None]]:
        returned = self.function(*inputs)
        return returned, [parameter.grad for parameter in self.parameters]

    def _capture(self, inputs: Iterable[Tensor | None]) -> Callable[..., tuple[Any, list[Tensor | None]]]:
        inputs = [None if x is None else x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):    # PyTorch asks for some rounds before a capture
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = self._call(*inputs)
        self.pool = graph.pool()
        return partial(_replay, graph, inputs, outputs)


def _replay(graph: torch.cuda.CUDAGraph, inputs: list[Tensor | None], outputs: Any, *given: Tensor | None) -> Any:
    for mine, x in zip(inputs, given, strict=True):
        if mine is not None:
            mine.copy_(x)
    graph.replay()
    return outputs


def padded_positions(masked: Tensor) -> Tensor:
    """`masked_positions`, followed by as many other positions as make their number M a multiple of B * N / 16.

    So batches have few different M, and a CUDA graph can be captured for each.
    """
    step = max(1, masked.shape[1] // 16) * len(masked)
    first = masked_positions(masked)
    return torch.cat([first, masked_positions(~masked)[: -len(first) % step]])       # (M,)
