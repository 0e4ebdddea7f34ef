"""Work shared out over threads: in order, each alone, and nothing of it left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from vaeq import threads
from vaeq.threads import in_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_that_work_alone() -> None:
    both = threading.Barrier(2, timeout=60)
    weight = torch.ones(1, requires_grad=True)

    def alone(i: int) -> tuple[int, int, bool]:
        if i < 2:
            both.wait()  # passed only where two are at work
        return i, torch.get_num_threads(), (weight * i).requires_grad

    assert in_threads(alone, iter(range(5))) == [(i, 1, False) for i in range(5)]


def test_one_thing_keeps_the_threads_inside() -> None:
    assert in_threads(lambda i: (i, torch.get_num_threads()), [7]) == [(7, 2)]
    assert in_threads(lambda i: i, []) == []


def test_where_threads_cannot_be_told_apart_one_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_threads_are_openmp", lambda: False)
    assert set(in_threads(lambda i: threading.get_ident(), range(4))) == {threading.get_ident()}


def test_the_error_of_one_is_raised() -> None:
    def fail(i: int) -> int:
        return 1 // i

    with pytest.raises(ZeroDivisionError):
        in_threads(fail, [1, 0, 2])
