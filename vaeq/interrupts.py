"""SIGINT and SIGTERM, held back where they would cut in two what does not bear it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Seconds until it is looked again whether that is over.
_SOON = 0.02


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Keep the two signals waiting until the block ends, or calls what it is given.

    Their own handlers are run then, and mostly raise. A second signal waits, too: whoever holds
    them back must come to an end, or call, in a short time. Other threads than the main one see no
    signals, and change nothing here.
    """
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    def let_in() -> None:
        if waiting:
            number = waiting[0]
            waiting.clear()
            handlers[number](number, None)

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # Those that are ignored stay so, and what C code or the default does is not ours to call.
        handlers.update({number: handler for number, handler in found.items() if callable(handler)})
    try:
        for number in handlers:
            signal.signal(number, hold)
        yield let_in
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        let_in()


def handle_between(number: int, handler: Callable[[int, FrameType | None], Any]) -> None:
    """Handle a signal as soon as no import and no composing of a config is under way.

    An import of NumPy or torch that an exception cuts in two swallows it and goes on, or leaves
    modules that fail with errors of their own; so does a config of OmegaConf's.
    """

    def handle(signalled: int, frame: FrameType | None) -> None:
        if _fragile(frame):
            signal.signal(signal.SIGALRM, lambda _, later: handle(number, later))
            signal.setitimer(signal.ITIMER_REAL, _SOON)
        else:
            handler(number, None)

    signal.signal(number, handle)


def _fragile(frame: FrameType | None) -> bool:
    """Whether an import is under way here, or Hydra with nothing of vaeq's inside it."""
    inside = True
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        inside = inside and package not in ("vaeq", "hydra_plugins")
        if module.startswith("importlib._bootstrap"):
            return True
        if inside and package in ("hydra", "omegaconf"):
            return True
        frame = frame.f_back
    return False
