"""Codes in shards: a million that no process may hold, and what ten millions would take.

Run with `python -m tests.benchmarks.bench_shards`. `vaeq measure` runs as its users run it, under a
limit on the memory of each of its processes (RLIMIT_DATA) that the codes in one piece pass.
Prints a table and writes outputs/bench/shards.json.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.bench_divergence import codes
from tests.benchmarks.harness import main, say

DIMS, DRAWS, SHARDS, THREADS = 64, 2_000, 16, 2
SIZES = (100_000, 1_000_000)
PAPER = 10_000_000
# Beyond what a process with torch in it has mapped before it holds anything.
ROOM = 512 * 2**20
_STEP = 100_000


def write_codes(folder: Path, n: int) -> None:
    """Codes like those of a trained VAE, as .npy files that were never in memory at once."""
    files = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (n, DIMS))
        for name in ("mean", "logvar")
    }
    for start in range(0, n, _STEP):
        part = slice(start, min(start + _STEP, n))
        found = codes(part.stop - start, DIMS, seed=start // _STEP)
        for file, values in zip(files.values(), found, strict=True):
            file[part] = values.numpy()


def mapped() -> int:
    """Private memory that a process has mapped once torch and vaeq are loaded, in bytes."""
    code = (
        "import torch, vaeq.posterior.shards, vaeq.measurement\ntorch.ones(9).sum()\n"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmData')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def look(session: int, memory: dict[int, int], work: dict[int, float]) -> None:
    """The processes of a session: largest anonymous memory so far in kB, processor seconds."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            lines = (place / "status").read_text().splitlines()
        except OSError:
            continue
        process = int(place.name)
        anonymous = next((int(x.split()[1]) for x in lines if x.startswith("RssAnon")), 0)
        memory[process] = max(memory.get(process, 0), anonymous)
        work[process] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(folder: Path, shards: int, limit: int | None) -> dict[str, Any]:
    """Seconds, the largest process, and the numbers or the words of one `vaeq measure`."""
    output = folder / f"shards-{shards}.json"
    output.unlink(missing_ok=True)
    words = [f"codes={folder}", f"shards={shards}", f"threads={THREADS}", "panel=decomposition"]

    def bounded() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vaeq", "measure", *words, f"n_samples={DRAWS}", f"output={output}"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=bounded,
    )
    memory: dict[int, int] = {}
    work: dict[int, float] = {}
    while process.poll() is None:
        look(process.pid, memory, work)
        time.sleep(0.1)
    assert process.stderr is not None
    return {
        "shards": shards,
        "limited": limit is not None,
        "seconds": time.perf_counter() - start,
        "processor_seconds": sum(work.values()),
        "largest_process_megabytes": max(memory.values()) / 1024,
        "processes": len(memory),
        "exit": process.returncode,
        "words": process.stderr.read().strip().splitlines()[-1:],
        "estimates": json.loads(output.read_text())["estimates"] if output.exists() else None,
    }


def bench_shards() -> list[dict[str, Any]]:
    base = mapped()
    limit = base + ROOM
    say(
        f"the decomposition in shards: D = {DIMS}, {DRAWS} draws, {THREADS} threads; limit "
        f"{limit / 2**20:.0f} MB, of which {base / 2**20:.0f} are mapped before anything is read"
    )
    rows = []
    for n in SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_codes(folder, n)
            runs = [measured(folder, SHARDS, limit)]
            if n == max(SIZES):
                runs += [measured(folder, 1, limit), measured(folder, 1, None)]
        for run in runs:
            rows.append({"n": n, "latent_dim": DIMS, "draws": DRAWS, **run})
            ending = " ".join(run["words"]) if run["exit"] else "done"
            say(
                f"  N = {n:>8}, {run['shards']:>2} shards{', limited' if run['limited'] else '':<9}"
                f" {run['seconds']:7.1f} s, {run['processor_seconds']:7.1f} s of processors, "
                "largest process "
                f"{run['largest_process_megabytes']:6.0f} MB: {ending}"
            )
    sharded, whole = rows[1], rows[-1]
    if sharded["estimates"] and whole["estimates"]:
        gap = max(
            abs(value["value"] - whole["estimates"][name]["value"])
            for name, value in sharded["estimates"].items()
        )
        say(f"  largest difference from one piece: {gap:.1e}")
        rows[1]["largest_difference"] = gap
    # A straight line in N at fixed D and draws.
    name = "processor_seconds"
    slope = (sharded[name] - rows[0][name]) / (SIZES[1] - SIZES[0])
    seconds = sharded[name] + slope * (PAPER - SIZES[1])
    piece = 8 * DIMS * PAPER / SHARDS
    shards = SHARDS * PAPER // SIZES[1]
    say(
        f"  on paper, N = {PAPER}: {seconds:.0f} s of processors, in {shards} shards with the "
        f"memory above (in {SHARDS}, {piece / 2**20:.0f} MB of codes a worker)\n"
    )
    rows.append({"n": PAPER, "on_paper": True, name: seconds, "shards": shards})
    return rows


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {"shards": bench_shards}

if __name__ == "__main__":
    main("shards", BENCHMARKS, sys.argv[1:])
