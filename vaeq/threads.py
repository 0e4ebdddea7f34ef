"""A function of many things, on several threads of which each works alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    with single_threads(threads) as pool:
        return list(pool.map(functools.partial(without_gradients, function), items))


@contextmanager
def single_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, of which each has one thread inside torch's operations."""
    # The number of threads of an operation belongs to the thread that calls it; torch keeps a
    # default for new threads too, which is put back.
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def without_gradients(function: Callable[[S], T], item: S) -> T:
    """``function(item)``; that it has neither gradients nor autocast, torch keeps by thread."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return function(item)


@functools.cache
def _threads_are_openmp() -> bool:
    """Whether the number of threads can be set by thread, as under OpenMP."""
    return "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
