"""Reads and writes pictures in other threads, while the model computes. Decoders and encoders release Python's lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from utils import UserError

T, U = TypeVar("T"), TypeVar("U")


def read_ahead(
    read: Callable[[T], U], items: Iterable[T], weight: Callable[[T], int], budget: int,
    skip: Callable[[UserError], None] | None = None,
) -> Iterator[tuple[T, U]]:    # fmt: skip
    """Yields (item, read(item)) in order, reading ahead as many items as weigh `budget` together, and at least one.

    Items that weigh no more in all are read before the first is yielded, so that a bad file among them is found in time.
    Where `skip` is given, an item with a user error is left out, and the error goes to `skip`.
    """
    waiting: deque[tuple[T, Future, int]] = deque()
    load, first = 0, True
    pool = ThreadPoolExecutor(max_workers=4)

    def take() -> Iterator[tuple[T, U]]:
        item, future, _ = waiting.popleft()
        try:
            yield item, future.result()
        except UserError as error:
            if skip is None:
                raise
            skip(error)

    try:
        for item in items:
            heavy = weight(item)
            while waiting and load + heavy > budget:
                load, first = load - waiting[0][2], False
                yield from take()
            load += heavy
            waiting.append((item, pool.submit(read, item), heavy))
        if first and skip is None:
            for _, future, _ in waiting:
                future.result()
        while waiting:
            yield from take()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def write_behind(budget: int) -> Iterator[Callable[..., None]]:
    """Yields write(weight, function, *arguments), which runs the function in another thread, one call after the other.

    It returns at once unless more than `budget` is waiting. An error of a function is raised by a later call, or at the end.
    """
    waiting: deque[tuple[Future, int]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:

        def write(weight: int, function: Callable[..., None], *arguments: object) -> None:
            waiting.append((pool.submit(function, *arguments), weight))
            while waiting and (waiting[0][0].done() or (len(waiting) > 1 and sum(w for _, w in waiting) > budget)):
                waiting.popleft()[0].result()

        yield write
        for future, _ in waiting:
            future.result()
