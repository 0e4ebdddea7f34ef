"""Functions in lockstep: what is alike is made once, and nobody waits for one who has gone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from random import Random
from time import sleep

import pytest
import torch

from vaeq.lockstep import in_lockstep, made, rejoin, side_by_side


@pytest.fixture(autouse=True)
def threads_are_left_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


class Squares:
    """Squares numbers as stacks, and remembers which it was given together."""

    def __init__(self) -> None:
        self.stacks: list[list[int]] = []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.stacks.append(list(numbers))
        return [number**2 for number in numbers]


def test_what_is_alike_is_made_once_and_comes_back_to_who_asked() -> None:
    squares = Squares()

    def member(i: int) -> list[int]:
        first = made(squares, [i, 10 * i])
        return first + made(squares, [i + 1])

    found = in_lockstep(member, range(3))
    assert found == [[i**2, 100 * i**2, (i + 1) ** 2] for i in range(3)]
    assert squares.stacks == [[0, 0, 1, 10, 2, 20], [1, 2, 3]]


def test_other_kinds_and_other_functions_are_made_apart() -> None:
    squares, others = Squares(), Squares()

    def member(i: int) -> int:
        (found,) = made(others if i == 4 else squares, [i], shape=i % 2)
        return found

    assert in_lockstep(member, range(5)) == [0, 1, 4, 9, 16]
    assert squares.stacks == [[0, 2], [1, 3]]
    assert others.stacks == [[4]]


def test_who_meets_whom_does_not_hang_on_who_is_fast() -> None:
    seen = []
    for seed in range(5):
        squares, pauses = Squares(), Random(seed)
        pause = [[pauses.random() / 200 for _ in range(4)] for _ in range(6)]

        def member(i: int, squares: Squares = squares, pause: list[list[float]] = pause) -> None:
            for turn in range(1 + i % 3):  # some have less to ask for
                sleep(pause[i][turn])
                made(squares, [10 * turn + i])

        in_lockstep(member, range(6))
        seen.append(squares.stacks)
    assert seen == [seen[0]] * 5
    assert seen[0] == [[0, 1, 2, 3, 4, 5], [11, 12, 14, 15], [22, 25]]


def test_the_one_that_fails_in_a_stack_fails_alone() -> None:
    def inverses(numbers: Sequence[int]) -> list[float]:
        return [1 / number for number in numbers]

    def member(i: int) -> float | str:
        try:
            return made(inverses, [i])[0]
        except ZeroDivisionError:
            return "none"

    assert in_lockstep(member, [2, 0, 4]) == [0.5, "none", 0.25]


def test_a_stack_that_loses_one_is_made_one_by_one() -> None:
    def first(numbers: Sequence[int]) -> list[int]:
        return [numbers[0]]

    assert in_lockstep(lambda i: made(first, [i]), [1, 2, 3]) == [[1], [2], [3]]


def test_one_that_ends_early_is_not_waited_for() -> None:
    squares = Squares()

    def member(i: int) -> int:
        return i if i == 1 else made(squares, [i])[0]

    assert in_lockstep(member, [1, 2, 3]) == [1, 4, 9]
    assert squares.stacks == [[2, 3]]


def test_an_error_is_raised_and_ends_those_that_wait() -> None:
    ended = []
    begun = threading.Barrier(3, timeout=60)

    def member(i: int) -> None:
        begun.wait()  # one that has not begun is not begun any more
        if i == 0:
            raise KeyError("the first")
        try:
            while True:
                made(lambda items: list(items), [i])
        except CancelledError:
            ended.append(i)
            raise

    with pytest.raises(KeyError, match="the first"):
        in_lockstep(member, range(3))
    assert sorted(ended) == [1, 2]


def test_members_have_one_thread_and_no_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)

    def member(i: int) -> tuple[int, bool]:
        return torch.get_num_threads(), (weight * i).requires_grad

    assert in_lockstep(member, range(3)) == [(1, False)] * 3


def test_outside_it_is_one_after_the_other() -> None:
    squares = Squares()
    assert made(squares, [1, 2]) == [1, 4]
    assert squares.stacks == [[1], [2]]


def test_one_member_has_its_own_things_stacked() -> None:
    squares = Squares()
    assert in_lockstep(lambda i: made(squares, [i, i]), [3]) == [[9, 9]]
    assert squares.stacks == [[3, 3]]
    assert in_lockstep(lambda i: i, []) == []


def test_settings_are_given_on_and_have_to_be_equal() -> None:
    seen = []

    def powers(numbers: Sequence[int], exponent: int) -> list[int]:
        seen.append((list(numbers), exponent))
        return [number**exponent for number in numbers]

    assert in_lockstep(lambda i: made(powers, [i], (2 + i // 3,)), [1, 2, 3]) == [[1], [4], [27]]
    assert seen == [([1, 2], 2), ([3], 3)]


def test_those_who_rejoin_are_in_step_again() -> None:
    squares = Squares()

    def member(i: int) -> None:
        for turn in range(1 + i):  # one more than the one before
            made(squares, [10 * turn + i])
        rejoin()
        made(squares, [100 + i])
        if i:
            rejoin()
            made(squares, [200 + i])

    in_lockstep(member, range(3))
    assert squares.stacks == [[0, 1, 2], [11, 12], [22], [100, 101, 102], [201, 202]]
    rejoin()  # alone there is nobody to wait for


def test_a_cpu_has_each_by_itself_in_a_thread() -> None:
    squares = Squares()
    device = torch.device("cpu")
    assert side_by_side(lambda i: made(squares, [i]), [2, 3], device) == [[4], [9]]
    assert sorted(squares.stacks) == [[2], [3]]
