"""Keeps the device busy: work ahead of time, side streams, CUDA graphs."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from models.decoding import places
from training.processes import T
from utils import UserError


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


def in_side_stream(device: torch.device, function: Callable[[int], Iterable[Tensor | None]]) -> Callable[[int], Any]:
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
        raise UserError(f"--capture is for one process on a CUDA device, here there are {here}; leave it out")


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


def padded_positions(masked: Tensor) -> Tensor:
    """`places`, and after them as many others as make M a multiple of B * N / 16.

    So batches come with few different M, for each of which a CUDA graph can be captured.
    """
    step = max(1, masked.shape[1] // 16) * len(masked)
    first = places(masked)
    return torch.cat([first, places(~masked)[: -len(first) % step]])       # (M,)
