"""A report over a thousand records, figures and page included, the program's start counted in.

Run with `python -m tests.benchmarks.bench_report`; writes outputs/bench/report.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.harness import Rows, main, say, seconds, summary, three
from tests.report_fixtures import full_sweep

SEEDS = 20


def bench_report() -> Rows:
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        full_sweep(runs, (2, 4, 8, 16, 32), range(1, 11), range(SEEDS))
        command = [sys.executable, "-m", "vaeq", "report", f"runs={runs}", f"output={folder}/out"]
        times = summary(
            seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
        )
        megabytes = (Path(folder) / "out" / "report.html").stat().st_size / 1e6
    say(f"report over {50 * SEEDS} records: {three(times)} s, page {megabytes:.1f} MB\n")
    return [{"records": 50 * SEEDS, "seconds": times, "megabytes": megabytes}]


BENCHMARKS = {"report": bench_report}

if __name__ == "__main__":
    main("report", BENCHMARKS, sys.argv[1:])
