"""A report over a thousand records, figures and page included: at most 5 s on two free cores."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.report_fixtures import full_sweep

SEEDS = 20
REPEATS = 3


def main() -> None:
    """Print the least wall time of a few runs of the program, its start included."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        full_sweep(runs, (2, 4, 8, 16, 32), range(1, 11), range(SEEDS))
        command = [sys.executable, "-m", "vaeq", "report", f"runs={runs}", f"output={folder}/out"]
        times = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - began)
        size = (Path(folder) / "out" / "report.html").stat().st_size
        print(f"report over {50 * SEEDS} records: {min(times):.1f} s, page {size / 1e6:.1f} MB")  # noqa: T201


if __name__ == "__main__":
    main()
