"""Counts the operations of torch: each is a launch or more on a GPU, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from vaeq.divergence import bracket, two_sample
from vaeq.lockstep import in_lockstep
from vaeq.posterior import log_density

S = TypeVar("S")


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(function: Callable[[S], object], items: Sequence[S]) -> int:
    """How many a function of these takes in lockstep."""

    def counted(item: S) -> int:
        with _Operations() as seen:  # of this thread alone
            function(item)
        return seen.count

    return sum(in_lockstep(counted, items))


@contextmanager
def tiles_of_a_gpu() -> Iterator[None]:
    """What is made in parts that fit into caches is made in those that a GPU takes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (bracket, two_sample, log_density):
            patch.setattr(module, "_CPU_TILE", module._GPU_TILE)
        patch.setattr(log_density, "_CPU_ROWS", log_density._GPU_ROWS)
        patch.setattr(log_density, "_CPU_PACKED", log_density._GPU_PACKED)
        yield
