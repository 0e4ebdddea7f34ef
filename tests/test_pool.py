"""Sweeps: skipping, resuming, surviving the death of a worker; the program run for real."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from tests.conftest import TINY, Run
from vaeq.config import RunConfig, run_name
from vaeq.launch.pool import Pool, available_cores
from vaeq.launch.progress import Event
from vaeq.launch.sweep import SweepResult, ensembles, record_death, run_sweep, work
from vaeq.runs.record import read_record, run_directory


def records(folder: Path) -> dict[str, dict[str, object]]:
    return {
        file.parent.name: json.loads(file.read_text())
        for file in sorted(folder.glob("*/record.json"))
    }


def weights(directory: Path) -> bytes:
    with safe_open(directory / "checkpoint.safetensors", framework="np") as file:
        return b"".join(file.get_tensor(name).tobytes() for name in sorted(file.keys()))


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
    others = [replace(tiny, seed=seed) for seed in (2, 3, 4)]
    pool = Pool(Console(file=io.StringIO()), n_jobs=2)
    killed: list[int] = []

    class Killer(SweepResult):
        def note(self, event: Event) -> None:
            super().note(event)
            if event.run == run_name(victim) and event.kind == "epoch" and not killed:
                (worker,) = (w for w in pool.workers if w.config == victim)
                assert worker.process.pid is not None
                killed.append(worker.process.pid)
                os.kill(worker.process.pid, signal.SIGKILL)

    result = Killer()
    pool.run([victim, *others], result)
    assert killed
    assert result.failed == {run_name(victim): "its process was killed by SIGKILL (out of memory?)"}
    assert sorted(result.complete) == sorted(run_name(config) for config in others)
    assert read_record(run_directory(victim) / "record.json").failure == {
        "type": "WorkerDied",
        "message": "its process was killed by SIGKILL (out of memory?)",
    }


def test_a_worker_takes_run_after_run_and_none_sees_the_one_before(
    tiny: RunConfig, tmp_path: Path
) -> None:
    def outcome(configs: list[RunConfig]) -> list[dict[str, object]]:
        Pool(Console(file=io.StringIO()), n_jobs=1).run(configs, SweepResult())
        found = [read_record(run_directory(c) / "record.json") for c in configs]
        return [{"estimates": r.estimates, "elbo": r.history["test_elbo"]} for r in found]

    runs = [replace(tiny, seed=0), replace(tiny, latent_dim=5, precision="bf16")]
    runs.append(replace(tiny, data=replace(tiny.data, n_train=500)))
    in_one_worker = outcome(runs)
    for config, expected in zip(runs, in_one_worker, strict=True):
        assert outcome([replace(config, outputs=str(tmp_path / "alone"))]) == [expected]


def test_the_longest_run_starts_first(tiny: RunConfig) -> None:
    order: list[int] = []
    run_sweep(
        [replace(tiny, epochs=epochs) for epochs in (2, 30, 4)],
        Console(file=io.StringIO()),
        lambda todo, result: order.extend(config.epochs for config in todo),
    )
    assert order == [30, 4, 2]
    assert work(replace(tiny, encoder_width=64)) > work(tiny)
    assert work(replace(tiny, latent_dim=64)) > work(tiny)


def test_the_same_configuration_is_run_once(tiny: RunConfig) -> None:
    runs: list[RunConfig] = []
    run_sweep([tiny, tiny], Console(file=io.StringIO()), lambda todo, result: runs.extend(todo))
    assert runs == [tiny]


def test_ensembles_are_runs_of_one_shape(tiny: RunConfig) -> None:
    alike = [
        replace(tiny, latent_dim=d, seed=s, learning_rate=rate, beta=beta)
        for d, s, rate, beta in [(2, 0, 1e-3, 1.0), (8, 1, 1e-2, 1.0), (4, 2, 1e-3, 4.0)]
    ]
    others = [replace(tiny, encoder_width=17), replace(tiny, epochs=3), replace(tiny, batch_size=9)]
    groups = ensembles([*alike, *others], most=64)
    assert sorted(map(len, groups)) == [1, 1, 1, 3]
    (largest,) = (group for group in groups if len(group) == 3)
    assert [config.learning_rate for config in largest] == [1e-3, 1e-3, 1e-2]
    assert sorted(map(len, ensembles(alike, most=2))) == [1, 2]


def test_the_ensemble_launcher_runs_a_sweep(vaeq: Run, tmp_path: Path) -> None:
    words = ("sweep", *TINY, "latent_dim=2,3", "seed=0,1", "hydra/launcher=ensemble")
    first = vaeq(*words, check=True)
    found = records(tmp_path / "outputs" / "smoke")
    assert [record["state"] for record in found.values()] == ["complete"] * 4
    assert "[4/4]" in first.stdout
    # The pool knows these runs, and one that diverges is the only one to fail.
    again = vaeq("sweep", *TINY, "latent_dim=2,3", "seed=0,1", check=True)
    assert again.stdout == "4 of 4 runs are finished and skipped; 0 to do\n"
    done = vaeq(*words, "beta=1e6", "learning_rate=1e-3,10")
    assert done.returncode == 1
    assert "4 of 8 runs failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_cores_are_those_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= available_cores() <= len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n2:memory:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        ({}, None),
    ],
)
def test_cores_are_those_the_control_group_grants(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == (expected or len(os.sched_getaffinity(0)))


def test_a_death_without_words_is_written_down(tiny: RunConfig) -> None:
    record_death(tiny, 3, "its process was killed")
    directory = run_directory(tiny)
    assert read_record(directory / "record.json").state == "failed"
    assert json.loads((directory / "status.json").read_text())["epoch"] == 3
