"""Sweeps: skipping, resuming, surviving the death of a worker; the program run for real."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from tests.conftest import TINY, Run
from vaeq.config import RunConfig, run_name
from vaeq.pool import Pool, SweepResult, available_cores, record_death, run_sweep, work
from vaeq.record import read_record, run_directory


def records(folder: Path) -> dict[str, dict[str, object]]:
    return {
        file.parent.name: json.loads(file.read_text())
        for file in sorted(folder.glob("*/record.json"))
    }


def weights(directory: Path) -> bytes:
    with safe_open(directory / "checkpoint.safetensors", framework="np") as file:
        return b"".join(file.get_tensor(name).tobytes() for name in sorted(file.keys()))


def wait_for(sweep: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Until two runs have left a file, or the sweep is over, or two minutes."""
    deadline = time.monotonic() + 120
    while sweep.poll() is None and time.monotonic() < deadline:
        if len(list(folder.glob(pattern))) >= 2:
            return
        time.sleep(0.01)


def test_a_sweep_runs_every_combination_once_and_then_skips(vaeq: Run, tmp_path: Path) -> None:
    words = ("sweep", *TINY, "latent_dim=2,3", "seed=0,1")
    first = vaeq(*words, check=True)
    folder = tmp_path / "outputs" / "smoke"
    found = records(folder)
    assert len(found) == 4
    assert all(record["state"] == "complete" for record in found.values())
    assert "[4/4]" in first.stdout
    assert "\x1b" not in first.stdout
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    again = vaeq(*words, check=True)
    assert again.stdout == "4 of 4 runs are finished and skipped; 0 to do\n"
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    # The number of workers, and the rest of the sweep, never change a run.
    alone = vaeq("sweep", *TINY, "latent_dim=3", "seed=1", "n_jobs=1", "outputs=alone", check=True)
    assert "[1/1]" in alone.stdout
    (directory,) = (tmp_path / "alone" / "smoke").iterdir()
    assert weights(directory) == weights(folder / directory.name)
    twin = found[directory.name]
    single = records(tmp_path / "alone" / "smoke")[directory.name]
    assert single["estimates"] == twin["estimates"]


def test_a_run_that_diverges_is_marked_and_the_sweep_goes_on(vaeq: Run, tmp_path: Path) -> None:
    done = vaeq("sweep", *TINY, "latent_dim=2", "beta=1e6", "learning_rate=1e-3,10")
    assert done.returncode == 1
    assert "1 of 2 runs failed" in done.stderr
    assert "Traceback" not in done.stderr
    found = list(records(tmp_path / "outputs" / "smoke").values())
    assert sorted(str(record["state"]) for record in found) == ["complete", "failed"]
    (failed,) = (record for record in found if record["state"] == "failed")
    assert "epoch 1" in str(failed["failure"])


def test_a_killed_worker_takes_only_its_own_run_with_it(tiny: RunConfig) -> None:
    # The victim trains for minutes, so that the kill finds it at work.
    victim = replace(tiny, epochs=100_000, seed=1)
    others = [replace(tiny, seed=seed) for seed in (2, 3)]
    output = io.StringIO()
    pool = Pool(Console(file=output), n_jobs=2)
    start = pool._start
    killed: list[int] = []

    def start_and_kill(config: RunConfig):  # type: ignore[no-untyped-def]
        worker = start(config)
        if config == victim:
            status = run_directory(victim) / "history.csv"
            while not status.exists():
                time.sleep(0.01)
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal.SIGKILL)
            killed.append(worker.process.pid)
        return worker

    pool._start = start_and_kill  # type: ignore[method-assign]
    result = SweepResult()
    pool.run([victim, *others], result)
    assert killed
    assert result.failed == {run_name(victim): "its process was killed by SIGKILL (out of memory?)"}
    assert sorted(result.complete) == sorted(run_name(config) for config in others)
    assert read_record(run_directory(victim) / "record.json").failure == {
        "type": "WorkerDied",
        "message": "its process was killed by SIGKILL (out of memory?)",
    }


def test_a_killed_sweep_goes_on_where_it_was_and_ends_in_the_same_bits(
    vaeq: Run, tmp_path: Path
) -> None:
    words = ("sweep", *TINY, "latent_dim=2", "seed=0,1", "epochs=30", "data.n_train=3000")
    sweep = subprocess.Popen(
        [sys.executable, "-m", "vaeq", *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = tmp_path / "outputs" / "smoke"
    wait_for(sweep, folder, "*/checkpoint.safetensors")
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.wait()
    interrupted = [json.loads(file.read_text()) for file in folder.glob("*/status.json")]
    assert any(status["state"] == "running" for status in interrupted)

    resumed = vaeq(*words, check=True).stdout
    assert "training from epoch " in resumed
    vaeq(*words, "outputs=undisturbed", check=True)
    for directory in folder.iterdir():
        twin = tmp_path / "undisturbed" / "smoke" / directory.name
        assert weights(directory) == weights(twin)
        mine, other = (read_record(d / "record.json") for d in (directory, twin))
        assert mine.estimates == other.estimates
        assert mine.per_dimension == other.per_dimension


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sweep_leaves_no_worker_behind(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    sweep = subprocess.Popen(
        [sys.executable, "-m", "vaeq", "sweep", *TINY, "latent_dim=2", "epochs=100000", "seed=0,1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "outputs" / "smoke"
    wait_for(sweep, folder, "*/history.csv")
    sweep.send_signal(number)
    _, words = sweep.communicate(timeout=60)
    assert sweep.returncode == status
    assert "the same command goes on" in words
    assert words.count("\n") == 1
    epochs = [json.loads(f.read_text())["epoch"] for f in folder.glob("*/status.json")]
    time.sleep(1)
    assert epochs == [json.loads(f.read_text())["epoch"] for f in folder.glob("*/status.json")]


def test_the_longest_run_starts_first(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    monkeypatch.setattr(Pool, "preflight", lambda self, configs: None)
    monkeypatch.setattr(
        Pool, "run", lambda self, configs, result: order.extend(c.epochs for c in configs)
    )
    configs = [replace(tiny, epochs=epochs) for epochs in (2, 30, 4)]
    run_sweep(configs, 1, Console(file=io.StringIO()))
    assert order == [30, 4, 2]
    assert work(replace(tiny, encoder_width=64)) > work(tiny)
    assert work(replace(tiny, latent_dim=64)) > work(tiny)


def test_the_same_configuration_is_run_once(tiny: RunConfig) -> None:
    result = run_sweep([tiny, tiny], 2, Console(file=io.StringIO()))
    assert result.complete == [run_name(tiny)]


def test_cores_are_those_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= available_cores() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_death_without_words_is_written_down(tiny: RunConfig) -> None:
    record_death(tiny, 3, "its process was killed")
    directory = run_directory(tiny)
    assert read_record(directory / "record.json").state == "failed"
    assert json.loads((directory / "status.json").read_text())["epoch"] == 3
