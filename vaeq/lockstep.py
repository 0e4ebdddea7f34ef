"""A function of many things in lockstep: what all of them come to is made once, for all of them.

Measuring a run is a hundred thousand small operations, each of which costs a GPU its launch and
little else. The runs of a sweep differ in their numbers and not in what is done with them. So each
has a thread, that waits where it comes to something which can be made for several (:func:`made`)
until every other one has come to such a place, or to its end; then what is alike is made as one.

Who meets whom hangs on what is computed and not on how fast the threads are. One that has more to
do than others would be out of step with them from there on: :func:`rejoin` brings them together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import torch
from torch.nn.functional import pad

from vaeq.threads import in_threads, single_threads, without_gradients

S = TypeVar("S")
T = TypeVar("T")

_here = threading.local()


def side_by_side(function: Callable[[S], T], items: Iterable[S], device: torch.device) -> list[T]:
    """``function`` of each: in lockstep where stacks pay, and else in threads, each by itself."""
    return in_lockstep(function, items) if stacks_pay(device) else in_threads(function, items)


def stacks_pay(device: torch.device) -> bool:
    """Whether a stack is faster there than one after the other: it saves a GPU its launches, and
    costs a CPU its caches.
    """
    return device.type != "cpu"


def in_lockstep(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """``function`` of each, with what :func:`made` is called for made as stacks over all of them.

    The first exception of a function is raised, and ends the others.
    """
    items = list(items)
    if not items:
        return []
    meeting = _Meeting(len(items))

    def take_part(numbered: tuple[int, S]) -> T:
        place, item = numbered
        _here.place = meeting, place
        try:
            return without_gradients(function, item)
        finally:
            del _here.place
            meeting.leave()

    with single_threads(len(items)) as pool:
        try:
            return list(pool.map(take_part, enumerate(items)))
        except BaseException:
            meeting.end()
            raise


def made(
    together: Callable[..., Sequence[T]],
    items: Sequence[S],
    settings: tuple[Hashable, ...] = (),
    shape: Hashable = None,
) -> list[T]:
    """``together(items, *settings)``, for the items of all in lockstep who ask for it at once.

    Outside of :func:`in_lockstep` it is one item after the other.

    Args:
        together: gives what came of each item, in their order.
        settings, shape: what has to be equal for items to be made together; the first it is given.
    """
    place = getattr(_here, "place", None)
    if place is None:
        return [one for item in items for one in together([item], *settings)]
    meeting, member = place
    found: list[T] = meeting.ask(member, _Question(together, items, settings, shape))
    return found


def stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors (..., D_e), each followed by zeros up to the widest, (E, ..., D)."""
    widest = max(part.shape[-1] for part in parts)
    return torch.stack([pad(part, (0, widest - part.shape[-1])) for part in parts])


def rejoin() -> None:
    """Wait until everybody in lockstep is waiting here, or has come to the end."""
    place = getattr(_here, "place", None)
    if place is not None:
        meeting, member = place
        meeting.ask(member, _Question(_nothing, (), (), None))


def _nothing(items: Sequence[Any]) -> Sequence[Any]:
    return items


class _Question:
    """What a member asks for, and what came of it."""

    def __init__(
        self,
        together: Callable[..., Sequence[Any]],
        items: Sequence[Any],
        settings: tuple[Hashable, ...],
        shape: Hashable,
    ) -> None:
        self.together = together
        self.kind = together, settings, shape
        self.items = items
        self.answer: Sequence[Any] | None = None
        self.error: Exception | None = None
        self._settings = settings

    @property
    def open(self) -> bool:
        """Whether nothing has come of it yet."""
        return self.answer is None and self.error is None

    def answer_alone(self) -> None:
        try:
            self.answer = self.together(self.items, *self._settings)
        except Exception as error:
            self.error = error

    def answer_with(self, others: Sequence[_Question]) -> None:
        """One stack for all; where that fails, each by itself, so that one alone fails."""
        if not others:
            self.answer_alone()
            return
        alike = [self, *others]
        items = [item for one in alike for item in one.items]
        try:
            found = iter(self.together(items, *self._settings))
            answers = [[next(found) for _ in one.items] for one in alike]
        except Exception:
            for one in alike:
                one.answer_alone()
        else:
            for one, answer in zip(alike, answers, strict=True):
                one.answer = answer


class _Meeting:
    """Where the members in lockstep wait for each other; the last to come answers for all."""

    def __init__(self, members: int) -> None:
        self._members = members
        self._asked: dict[int, _Question] = {}
        self._changed = threading.Condition()
        self._ended = False

    def ask(self, member: int, question: _Question) -> list[Any]:
        with self._changed:
            self._asked[member] = question
            self._answer_if_all_have_come()
            self._changed.wait_for(lambda: self._ended or not question.open)
        if question.error is not None:
            raise question.error
        if question.answer is None:
            raise CancelledError
        return list(question.answer)

    def leave(self) -> None:
        """One member less to wait for."""
        with self._changed:
            self._members -= 1
            self._answer_if_all_have_come()

    def end(self) -> None:
        """Nobody is answered any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _answer_if_all_have_come(self) -> None:
        if self._ended or not self._asked or len(self._asked) < self._members:
            return
        waiting = {member for member, one in self._asked.items() if one.together is _nothing}
        if len(waiting) == len(self._asked):
            waiting.clear()
        kinds: dict[Hashable, list[_Question]] = {}
        for member in sorted(self._asked.keys() - waiting):
            question = self._asked.pop(member)
            kinds.setdefault(question.kind, []).append(question)
        for first, *others in kinds.values():
            first.answer_with(others)
        self._changed.notify_all()
