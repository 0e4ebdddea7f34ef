"""What the benchmarks share: timing in turn, one way to print, one file of results each."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vaeq.launch.pool import available_cores

REPEATS = 5
FOLDER = Path("outputs/bench")
Rows = list[dict[str, Any]]


def say(line: str) -> None:
    """A line at once, also through a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def summary(times: Sequence[float]) -> dict[str, float]:
    return {"min": min(times), "median": statistics.median(times), "max": max(times)}


def three(times: Mapping[str, float]) -> str:
    return " / ".join(f"{times[name]:.3g}" for name in ("min", "median", "max"))


def seconds(run: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Wall-clock seconds of each repeat, after one that is not counted."""
    run()
    return [clocked(run) for _ in range(repeats)]


def in_turn(runs: dict[str, tuple[Callable[[], object], float]]) -> dict[str, list[float]]:
    """Scaled seconds of each run, one after another in every repeat, as machines have moods."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, (run, scale) in runs.items():
            taken = scale * clocked(run)
            if repeat:  # the first is not counted
                times[name].append(taken)
    return times


def clocked(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def main(
    name: str,
    benchmarks: Mapping[str, Callable[[], Rows]],
    chosen: Sequence[str] = (),
    *,
    long: Sequence[str] = (),
) -> None:
    """Run the benchmarks chosen, or all but the long ones; results join the others in the file."""
    said = machine()
    say(", ".join(f"{key} {value}" for key, value in said.items() if value is not None) + "\n")
    output = FOLDER / f"{name}.json"
    results: dict[str, Any] = {}
    if output.exists():  # what is not measured anew is kept
        results = json.loads(output.read_text())
    for key in chosen or [key for key in benchmarks if key not in long]:
        results[key] = {"machine": said, "rows": benchmarks[key]()}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
    say(f"written to {output}")
    if long and not chosen:
        named = " ".join(long)
        say(f"left out, as long as all others: python -m tests.benchmarks.bench_{name} {named}")
