"""Modules loaded without Python's cyclic garbage collector, which would find nothing in them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Import what stays until the process ends: the collector sees nothing of it, now or later.

    Importing torch leaves 270,000 objects, through which Python goes again and again meanwhile, and
    once more at the end: 0.2 to 0.3 s of two, and 0.4 of the 0.6 s that the process takes to end.
    It is for a program's own process, since all that lives at the end of the block is kept.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()
