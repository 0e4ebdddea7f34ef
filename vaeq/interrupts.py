"""SIGINT and SIGTERM, held back where they would cut something in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


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
