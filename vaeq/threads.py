"""A function of many things, on several threads of which each works alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


def in_threads(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """``function`` of each, on as many threads as torch has, each with one thread inside.

    Threads inside the operations would meet at a barrier at each of them, and idle there.
    """
    items = list(items)
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1 or not _threads_are_openmp():
        return [function(item) for item in items]

    def alone(item: S) -> T:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # both are kept by thread
            return function(item)

    # The number of threads of an operation belongs to the thread that calls it; torch keeps a
    # default for new threads too, which is put back.
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, items))
    finally:
        torch.set_num_threads(before)


@functools.cache
def _threads_are_openmp() -> bool:
    """Whether the number of threads can be set by thread, as under OpenMP."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
