"""Independent pieces of numerical work, one per core."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from qdeploy.machine import cores

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results in the order of the items.

    Each item is worked on by one thread, and BLAS adds none of its own: for products as small as
    those of a convolution its threads spend their time waiting for each other, many times as long
    as the work itself where another process has one of the cores.
    """
    pool = ThreadPoolExecutor(cores())
    try:
        with threadpool_limits(1, user_api="blas"):
            yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
