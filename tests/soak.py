"""How often a test of faults repeats: a few times in ``make test``, many in ``make soak``."""

from __future__ import annotations

import os

SOAK = os.environ.get("VAEQ_SOAK") == "1"


def times(short: int, long: int) -> int:
    """``short`` in the everyday run of the tests, ``long`` in the one that is left running."""
    return long if SOAK else short
