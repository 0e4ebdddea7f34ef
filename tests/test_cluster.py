"""Slurm, Ray and shared folders: the same numbers as the pool's, and no run lost unnoticed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from tests.conftest import TINY, Run
from tests.soak import SOAK
from tests.test_pool import records, weights
from vaeq.config import RunConfig, run_name
from vaeq.errors import InputError
from vaeq.launch import cluster
from vaeq.launch.ray_cluster import RaySettings
from vaeq.launch.slurm import SlurmSettings
from vaeq.launch.sweep import SweepResult, record_death
from vaeq.runs.record import (
    LOCK,
    PICTURES,
    RECORD,
    SAMPLES,
    read_record,
    run_directory,
    write_status,
)

NODE = Path(__file__).with_name("slurm_node.sh")
SLURM = ("slurmctld", "slurmd", "munged", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
SWEPT = ("latent_dim=2", "seed=0,1,2")
ON_SLURM = ("hydra/launcher=submitit_slurm", "hydra.launcher.poll_seconds=0.2")


def missing_slurm() -> str:
    """Why there can be no Slurm here; empty where there can."""
    lacking = [word for word in SLURM if shutil.which(word, path=PATH) is None]
    if lacking:
        return f"{lacking[0]} is not installed (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "a Slurm node is started by root"
    return "" if importlib.util.find_spec("submitit") else "submitit is not installed"


needs_slurm = pytest.mark.skipif(bool(missing_slurm()), reason=missing_slurm() or "there")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Slurm of one node, as the environment in which its commands find it."""
    folder = tmp_path_factory.mktemp("slurm")
    with standing([str(NODE), str(folder)], folder) as word:
        assert word == "ready"
        yield {"SLURM_CONF": str(folder / "slurm.conf")}


@contextmanager
def standing(command: list[str], folder: Path, **env: str) -> Iterator[str]:
    """The first line of a program that stands by until its standard input ends."""
    with (folder / "stderr").open("w") as errors:
        program = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        word = program.stdout.readline().strip()
        assert word, (folder / "stderr").read_text()
        yield word
    finally:
        program.stdin.close()
        program.wait(timeout=60)
        program.stdout.close()


@pytest.fixture(scope="module")
def pool_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the default launcher makes of the sweep that the others repeat."""
    folder = tmp_path_factory.mktemp("pool")
    subprocess.run(
        [sys.executable, "-m", "vaeq", "sweep", *TINY, *SWEPT],
        cwd=folder, check=True, capture_output=True, timeout=900,
    )  # fmt: skip
    return folder / "outputs" / "smoke"


def begin(folder: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    """A sweep in a folder, under way."""
    return subprocess.Popen(
        [sys.executable, "-m", "vaeq", "sweep", *TINY, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def science(directory: Path) -> dict[str, Any]:
    """A record without its times, the checksums of files without times, and the weights."""
    content = json.loads((directory / RECORD).read_text())
    for name in ("timing", "seal"):
        content.pop(name)
    content["history"].pop("seconds")
    content["files"] = {name: content["files"].get(name) for name in (SAMPLES, PICTURES)}
    return {**content, "weights": weights(directory)}


def assert_same(found: Path, expected: Path) -> None:
    names = {directory.name for directory in expected.iterdir()}
    assert {directory.name for directory in found.iterdir()} == names
    assert len(names) == 3
    for name in names:
        assert science(found / name) == science(expected / name)


def states(folder: Path) -> dict[str, str]:
    return {name: str(record["state"]) for name, record in records(folder).items()}


def written(folder: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("*/record.json")}


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_only_the_lost_one_runs_again(
    again: subprocess.CompletedProcess[str], folder: Path, before: dict[str, int], lost: str
) -> None:
    assert "2 of 3 runs are finished and skipped; 1 to do" in again.stdout
    after = written(folder)
    assert {name for name in after if after[name] != before.get(name)} == {lost}


@pytest.mark.slow
@needs_slurm
def test_of_a_slurm_array_the_cancelled_job_is_reported_and_only_it_is_run_again(
    vaeq: Run, node: dict[str, str], pool_runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs" / "smoke"
    (tmp_path / "hold").touch()
    # The second job of the array is held back until it has been cancelled.
    loop = "while [ $SLURM_ARRAY_TASK_ID = 1 -a -e hold ]; do sleep 0.1; done"
    sweep = begin(tmp_path, *SWEPT, *ON_SLURM, f"hydra.launcher.setup=['{loop}']", **node)
    wait_until(lambda: len(written(folder)) == 2)
    (script,) = (tmp_path / "outputs" / ".submitit").glob("*_submission.sh")
    array = script.name.split("_")[0]
    subprocess.run(["scancel", f"{array}_1"], env={**os.environ, **node}, check=True)
    said, errors = sweep.communicate(timeout=300)
    (tmp_path / "hold").unlink()
    assert sweep.returncode == 1
    assert f"Slurm array {array}, 3 jobs" in said
    assert "its job left no record: Slurm says CANCELLED" in said
    assert "1 of 3 runs failed" in errors
    assert errors.count("\n") == 1
    assert sorted(states(folder).values()) == ["complete", "complete", "failed"]
    (lost,) = (name for name, state in states(folder).items() if state == "failed")
    before = written(folder)

    again = vaeq("sweep", *TINY, *SWEPT, *ON_SLURM, check=True, **node)
    assert_only_the_lost_one_runs_again(again, folder, before, lost)
    assert_same(folder, pool_runs)


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="part of make soak")
@needs_slurm
def test_a_stopped_sweep_takes_its_jobs_back(node: dict[str, str], tmp_path: Path) -> None:
    sweep = begin(tmp_path, "seed=0,1", "epochs=1000000", *ON_SLURM, **node)
    wait_until(lambda: list((tmp_path / "outputs" / "smoke").glob("*/history.csv")))
    sweep.send_signal(signal.SIGTERM)
    _, words = sweep.communicate(timeout=300)
    assert sweep.returncode == 143
    assert "the same command goes on" in words

    def jobs() -> str:
        asked = ["squeue", "--noheader", "--array"]
        env = {**os.environ, **node}
        return subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout

    wait_until(lambda: not jobs(), 30)


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="part of make soak: Slurm queues a job again after 2 minutes")
@needs_slurm
def test_a_job_that_loses_its_node_is_queued_again_and_goes_on(
    node: dict[str, str], tmp_path: Path
) -> None:
    env = {**os.environ, **node}
    sweep = begin(tmp_path, "seed=0", "epochs=3000", *ON_SLURM, **node)
    folder = tmp_path / "outputs" / "smoke"
    wait_until(lambda: list(folder.glob("*/history.csv")))
    (script,) = (tmp_path / "outputs" / ".submitit").glob("*_submission.sh")
    # What submitit asks Slurm to send before a time limit, and what it sends before preemption.
    number = script.name.split("_")[0]
    subprocess.run(["scancel", "--signal=USR2", number], env=env, check=True)
    said, _ = sweep.communicate(timeout=500)
    assert sweep.returncode == 0
    assert "[1/1]" in said
    (log,) = (tmp_path / "outputs" / ".submitit").glob("*_log.out")
    assert "Requeued job" in log.read_text()
    assert list(states(folder).values()) == ["complete"]


@needs_slurm
def test_what_slurm_refuses_is_one_line(vaeq: Run, node: dict[str, str], tmp_path: Path) -> None:
    done = vaeq("sweep", *TINY, *SWEPT, *ON_SLURM, "hydra.launcher.partition=none_such", **node)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "invalid partition" in done.stderr
    assert not list(tmp_path.glob("outputs/smoke/*"))


def test_a_machine_without_slurm_is_one_line(vaeq: Run, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    done = vaeq("sweep", *TINY, *ON_SLURM, PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "vaeq: hydra/launcher=submitit_slurm needs sbatch, which is not in PATH; start it on a "
        "machine that submits to Slurm.\n"
    )
    assert not list(tmp_path.glob("outputs"))


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray cluster of two nodes of one core, each a raylet of its own."""
    folder = tmp_path_factory.mktemp("ray")
    # Ray puts its sockets there, whose paths must be short.
    place = Path("/tmp") / f"vaeq-ray-{os.getpid()}"
    code = (
        "import sys\nfrom ray.cluster_utils import Cluster\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})\n"
        "cluster.add_node(num_cpus=1)\n"
        "print(cluster.address, flush=True)\nsys.stdin.read()\ncluster.shutdown()\n"
    )
    env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(place)}
    try:
        with standing([sys.executable, "-c", code], folder, **env) as address:
            yield address
    finally:
        shutil.rmtree(place, ignore_errors=True)


def busy_ray_workers_in(folder: Path) -> list[int]:
    """Ray's processes that are at a task in a folder: it renames those that are not to IDLE."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            busy = (place / "cmdline").read_bytes().startswith(b"ray::run_job")
            if busy and (place / "cwd").resolve() == folder:
                found.append(int(place.name))
    return found


@pytest.mark.slow
@needs_ray
def test_of_a_ray_cluster_the_dead_worker_is_reported_and_only_its_run_is_run_again(
    vaeq: Run, two_workers: str, pool_runs: Path, tmp_path: Path
) -> None:
    on_ray = ("hydra/launcher=ray", f"hydra.launcher.address={two_workers}")
    folder = tmp_path / "outputs" / "smoke"
    lost = sorted(directory.name for directory in pool_runs.iterdir())[0]
    (folder / lost).mkdir(parents=True)
    # The run to be lost is held back, at its lock, until the others are done.
    with FileLock(folder / lost / LOCK):
        sweep = begin(tmp_path, *SWEPT, *on_ray)
        wait_until(lambda: len(written(folder)) == 2)
        wait_until(lambda: len(busy_ray_workers_in(tmp_path)) == 1)
        os.kill(*busy_ray_workers_in(tmp_path), signal.SIGKILL)
    said, errors = sweep.communicate(timeout=300)
    assert sweep.returncode == 1
    assert f"{lost}: failed: its job left no record: Ray says that its worker died" in said
    assert "1 of 3 runs failed" in errors
    assert states(folder)[lost] == "failed"
    before = written(folder)

    again = vaeq("sweep", *TINY, *SWEPT, *on_ray, check=True)
    assert_only_the_lost_one_runs_again(again, folder, before, lost)
    assert_same(folder, pool_runs)


@needs_ray
def test_a_ray_cluster_that_is_not_there_is_one_line(vaeq: Run) -> None:
    done = vaeq("sweep", *TINY, "hydra/launcher=ray", "hydra.launcher.address=127.0.0.1:x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "hydra.launcher.address=127.0.0.1:x cannot be used" in done.stderr


@pytest.fixture
def two_roots(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two folders that are one: mounts of the same place, or links where none may be mounted."""
    shared = tmp_path / "shared"
    roots = (tmp_path / "one", tmp_path / "two")
    shared.mkdir()
    mounted = []
    try:
        for root in roots:
            root.mkdir()
            done = subprocess.run(["mount", "--bind", shared, root], capture_output=True)
            if done.returncode:
                root.rmdir()
                root.symlink_to(shared)
            else:
                mounted.append(root)
        yield roots
    finally:
        for root in mounted:
            subprocess.run(["umount", root], check=True)


@pytest.mark.slow
def test_two_machines_that_share_a_folder_split_a_sweep(
    two_roots: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("latent_dim=2", "seed=0,1,2,3,4,5", "epochs=20", "n_jobs=1")
    folder = tmp_path / "shared" / "smoke"
    logs = [tmp_path / "log-one", tmp_path / "log-two"]
    with ExitStack() as locks:
        # Held until both are there, and have found every run taken.
        runs = begin(tmp_path, *words, f"outputs={tmp_path / 'names'}")
        runs.communicate(timeout=300)
        names = [directory.name for directory in (tmp_path / "names" / "smoke").iterdir()]
        assert len(names) == 6
        for name in names:
            (folder / name).mkdir(parents=True)
            locks.enter_context(FileLock(folder / name / LOCK))
        both = []
        for root, log in zip(two_roots, logs, strict=True):
            with log.open("w") as stream:
                sweep = [sys.executable, "-m", "vaeq", "sweep", *TINY, *words, f"outputs={root}"]
                both.append(subprocess.Popen(sweep, cwd=tmp_path, stdout=stream, stderr=stream))
        wait_until(
            lambda: all("another process is at what is left (6)" in log.read_text() for log in logs)
        )
    for process in both:
        assert process.wait(timeout=300) == 0
    trained = [
        {line.split()[1] for line in log.read_text().splitlines() if ": complete: " in line}
        for log in logs
    ]
    assert all(trained)
    assert not trained[0] & trained[1]
    assert len(trained[0] | trained[1]) == 6
    for log in logs:
        assert "[6/6]" in log.read_text()
    for name in names:
        alone = science(tmp_path / "names" / "smoke" / name)
        found = science(folder / name)
        for content in (alone, found):
            content["config"].pop("outputs")
        assert found == alone


@pytest.mark.parametrize(
    ("schema", "values", "words"),
    [
        (SlurmSettings, {"timeout_min": 0}, "timeout_min must be an integer between 1"),
        (SlurmSettings, {"timeout_min": "soon"}, "timeout_min must be an integer between 1"),
        (SlurmSettings, {"partitoin": "cpu"}, "partitoin"),
        (SlurmSettings, {"setup": "module load x"}, "setup must be a list of shell commands"),
        (SlurmSettings, {"additional_parameters": [1]}, "additional_parameters must be options"),
        (SlurmSettings, {"mem_gb": -1}, "mem_gb must be a number > 0"),
        (RaySettings, {"num_cpus": 0}, "num_cpus must be a number > 0"),
        (RaySettings, {"resources": "many"}, "resources must be {name: amount}"),
    ],
)
def test_a_bad_setting_of_a_launcher_is_one_line(
    schema: type, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        cluster.settings(schema, values)
    assert "hydra.launcher." in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def quiet_console() -> Console:
    return Console(file=io.StringIO())


class Ended:
    """Jobs that are all over, as a cluster says that has lost them."""

    def __init__(self) -> None:
        self.asked = 0
        self.cancelled = False

    def over(self, seconds: float) -> dict[int, str]:
        self.asked += 1
        return {0: "the node burnt down", 1: "all is well"}

    def cancel(self) -> None:
        self.cancelled = True


def test_a_job_is_lost_only_where_no_record_follows_its_end(
    tiny: RunConfig, quiet_console: Console
) -> None:
    from vaeq.experiment import run

    lost, seen_late = replace(tiny, seed=1), replace(tiny, seed=2)
    # A failure of an earlier attempt is not the word of this one.
    record_death(lost, 0, "an old failure")
    runs = cluster.watched([lost, seen_late])
    write_status(run_directory(lost), lost, "running", 1)

    class Late(Ended):
        def over(self, seconds: float) -> dict[int, str]:
            if self.asked == 1:  # after the first look at what is over
                run(seen_late, lambda event: None, 1)
            return super().over(seconds)

    result = SweepResult()
    cluster.gather(runs, Late(), result, quiet_console, 0)
    message = "its job left no record: the node burnt down"
    assert result.complete == [run_name(seen_late)]
    assert result.failed == {run_name(lost): message}
    failure = read_record(run_directory(lost) / RECORD).failure
    assert failure == {"type": "WorkerDied", "message": message}


def test_a_lost_run_that_somebody_else_is_at_is_left_alone(
    tiny: RunConfig, quiet_console: Console
) -> None:
    runs = cluster.watched([tiny])
    run_directory(tiny).mkdir(parents=True)
    result = SweepResult()
    with FileLock(run_directory(tiny) / LOCK):
        cluster.gather(runs, Ended(), result, quiet_console, 0)
    assert "another process has taken the run up" in result.failed[run_name(tiny)]
    assert not (run_directory(tiny) / RECORD).exists()


def test_a_machine_that_cannot_run_a_job_leaves_its_reason(tiny: RunConfig) -> None:
    config = replace(tiny, device="cuda:63")
    with pytest.raises(InputError):
        cluster.run_job(asdict(config), str(Path.cwd()))
    failure = read_record(run_directory(config) / RECORD).failure
    assert failure is not None
    assert failure["type"] == "InputError"
    assert "cuda:63" in failure["message"]
