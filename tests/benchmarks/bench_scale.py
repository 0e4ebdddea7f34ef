"""A sweep of thousands of runs: what each costs beside its own work, and memory that stays flat.

Run with `python -m tests.benchmarks.bench_scale [name ...]`; writes outputs/bench/scale.json.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tests.benchmarks.harness import REPEATS, Rows, main, say, summary, three
from vaeq.config import DataConfig, GenerationConfig, MeasureConfig, RunConfig
from vaeq.experiment import run
from vaeq.launch.pool import Pool
from vaeq.launch.progress import Event
from vaeq.launch.sweep import SweepResult, run_sweep

RUNS, IN_TURN = 2_000, 60


def tiny(outputs: str, count: int) -> list[RunConfig]:
    """Runs of 256 images and 8 units, which differ in their seed."""
    config = RunConfig(
        latent_dim=8,
        encoder_width=8,
        decoder_width=8,
        epochs=1,
        outputs=outputs,
        device="cpu",
        data=DataConfig(n_train=256, n_test=256),
        generation=GenerationConfig(n_importance=None, quality=False),
        measure=MeasureConfig(panel="decomposition", n_samples=100),
    )
    return [replace(config, seed=seed) for seed in range(count)]


def bench_overhead() -> Rows:
    """A run in the pool less the same run in this process, in turns; what a skipped one costs."""
    extra, alone, skipped = [], [], []
    for repeat in range(REPEATS + 1):
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            marks: list[float] = []

            class Clocked(SweepResult):
                def note(self, event: Event) -> None:
                    super().note(event)
                    if event.kind == "complete":
                        marks.append(time.perf_counter())  # noqa: B023

            configs = tiny(first, IN_TURN)
            Pool(Console(file=io.StringIO()), 1).run(configs, Clocked())
            # From the end of the first run to that of the last: the start of a worker is no part.
            pooled = (marks[-1] - marks[0]) / (IN_TURN - 1)
            began = time.perf_counter()
            run_sweep(configs, Console(file=io.StringIO()), lambda todo, result: None)
            last = (time.perf_counter() - began) / IN_TURN
            began = time.perf_counter()
            for config in tiny(second, IN_TURN):
                run(config, lambda event: None, threads=1)
            single = (time.perf_counter() - began) / IN_TURN
        if repeat:
            alone.append(1e3 * single)
            extra.append(1e3 * (pooled - single))
            skipped.append(1e3 * last)
    say(f"a run of 256 images and 8 units, by itself: {three(summary(alone))} ms; in the pool of "
        f"one worker so much more: {three(summary(extra))} ms; skipped: "
        f"{three(summary(skipped))} ms (min / median / max of {REPEATS})\n")  # fmt: skip
    return [{"alone": summary(alone), "extra": summary(extra), "skipped": summary(skipped)}]


def bench_many() -> Rows:
    """2,000 runs through the pool of one worker: memory on the way, and the report at the end."""
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Console(file=io.StringIO()), 1)
        began = time.perf_counter()

        class Watched(SweepResult):
            def note(self, event: Event) -> None:
                super().note(event)
                done = len(self.complete)
                if event.kind == "complete" and done in (10, 200, RUNS):
                    workers = [resident(worker.process.pid) for worker in pool.workers]
                    row = {"runs": done, "parent": resident(), "worker": max(workers)}
                    rows.append(row | {"seconds_a_run": (time.perf_counter() - began) / done})
                    say(
                        f"  after {done} runs: parent {row['parent']:.0f} MB, worker "
                        f"{row['worker']:.0f} MB, {rows[-1]['seconds_a_run']:.3f} s a run"
                    )

        pool.run(tiny(folder, RUNS), Watched())
        began = time.perf_counter()
        command = [sys.executable, "-m", "vaeq", "report", f"runs={folder}", f"output={folder}/out"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows.append({"report_seconds": time.perf_counter() - began})
        say(f"  report over them: {rows[-1]['report_seconds']:.1f} s\n")
    return rows


def resident(process: int | None = None) -> float:
    """Megabytes a process holds now."""
    lines = Path(f"/proc/{process or 'self'}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


BENCHMARKS: dict[str, Callable[[], Rows]] = {"overhead": bench_overhead, "many": bench_many}
LONG = ("many",)

if __name__ == "__main__":
    main("scale", BENCHMARKS, sys.argv[1:], long=LONG)
