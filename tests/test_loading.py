"""Loading: no collection meanwhile, none of what was loaded later, and all as before at the end."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_collector_rests_meanwhile_and_leaves_what_was_loaded_alone(
    enabled: bool, fails: bool
) -> None:
    # In a process of its own: what is frozen stays so.
    code = f"""
import gc
from vaeq.loading import loading
{"gc.enable()" if enabled else "gc.disable()"}
try:
    with loading():
        assert not gc.isenabled()
        loaded = [[] for _ in range(100_000)]
        {"raise ImportError" if fails else "pass"}
except ImportError:
    assert {fails}
assert gc.isenabled() is {enabled}
assert gc.get_freeze_count() > 100_000
assert not any(item is loaded for item in gc.get_objects())
later = []
later.append(later)
assert any(item is later for item in gc.get_objects())
del later
assert gc.collect() >= 1
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_library_leaves_the_collector_of_its_user_alone() -> None:
    code = """
import gc
frozen = gc.get_freeze_count()  # some, by Python 3.12 itself
import vaeq, vaeq.experiment, vaeq.measurement
assert gc.isenabled()
assert gc.get_freeze_count() == frozen
"""
    subprocess.run([sys.executable, "-c", code], check=True)
