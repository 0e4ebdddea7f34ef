"""Two processes that want the same runs, and the lock of a run's folder that keeps them apart."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import SoftFileLock
from rich.console import Console

from tests.conftest import TINY
from tests.failing_runs import tiny as small_run
from tests.sessions import Session, contents, half_written, leftovers
from tests.soak import SOAK, times
from vaeq.config import RunConfig, config_hash, run_name
from vaeq.errors import DiskError, Taken
from vaeq.experiment import run, run_ensemble
from vaeq.launch.pool import Pool
from vaeq.launch.progress import Event
from vaeq.launch.sweep import SweepResult, record_death
from vaeq.runs.lock import RunLock
from vaeq.runs.record import RunRecord, complete_record, read_record, run_directory, write_record

SWEEP = ("sweep", *TINY, "epochs=6", "data.n_train=1500", "latent_dim=2,3", "seed=0,1,2")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small_run(tmp_path / "outputs")


class Holder:
    """Another process that is at a run: it holds its lock until it is told to end, or dies."""

    def __init__(self, config: RunConfig) -> None:
        words = (
            "import sys, pathlib\n"
            "from vaeq.runs.lock import RunLock\n"
            f"with RunLock(pathlib.Path({str(run_directory(config))!r})):\n"
            "    print('held', flush=True)\n"
            "    sys.stdin.read()\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def end(self, number: signal.Signals | None = None) -> None:
        if number is not None:
            self.process.send_signal(number)
        self.process.communicate()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    started: list[Holder] = []
    yield started
    for holder in started:
        if holder.process.poll() is None:
            holder.end(signal.SIGKILL)


def silently(config: RunConfig) -> RunRecord:
    return run(config, lambda event: None, threads=1)


def test_a_lock_of_a_dead_process_is_taken_over(config: RunConfig, holders: list[Holder]) -> None:
    holders.append(Holder(config))
    with pytest.raises(Taken, match="another process is at latent_dim=2"):
        run(config, lambda event: None, threads=1, wait=False)
    # Nothing was written into the folder of the other one.
    assert os.listdir(run_directory(config)) == [".lock"]
    holders[0].end(signal.SIGKILL)
    assert run(config, lambda event: None, threads=1, wait=False).state == "complete"


def test_a_lock_of_a_dead_process_is_taken_over_where_there_is_no_flock(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, holders: list[Holder]
) -> None:
    # What filelock leaves where a process dies that had the file alone for a lock.
    monkeypatch.setattr("vaeq.runs.record.FileLock", SoftFileLock)
    directory = run_directory(config)
    directory.mkdir(parents=True)
    words = (
        "import os, signal\n"
        "from filelock import SoftFileLock\n"
        f"lock = SoftFileLock({str(directory / '.lock')!r})\n"
        "lock.acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", words])
    assert (directory / ".lock").exists()
    # The attempt that finds it dead takes it away, and one of the next gets it.
    events: list[Event] = []
    assert run(config, events.append, threads=1).state == "complete"
    with ExitStack() as held:
        held.enter_context(RunLock(directory))
        with pytest.raises(Taken), RunLock(directory):
            pass


def test_a_single_run_waits_for_the_process_that_is_at_it(
    config: RunConfig, holders: list[Holder]
) -> None:
    holders.append(Holder(config))
    threading.Timer(0.3, holders[0].end).start()
    events: list[Event] = []
    assert run(config, events.append, threads=1).state == "complete"
    assert events[0].kind == "note"
    assert events[0].message == "another process is at it; waiting for it"
    assert [event.kind for event in events].count("note") == 1


def test_an_ensemble_leaves_a_member_to_the_process_that_is_at_it(
    config: RunConfig, holders: list[Holder]
) -> None:
    other = replace(config, seed=1)
    holders.append(Holder(other))
    first, second = run_ensemble([config, other], lambda event: None, threads=1)
    assert isinstance(first, RunRecord)
    assert isinstance(second, Taken)


def test_a_pool_takes_other_runs_first_and_takes_up_what_another_process_left(
    config: RunConfig, holders: list[Holder]
) -> None:
    taken, finished, *free = (replace(config, seed=seed) for seed in range(4))
    holders += [Holder(taken), Holder(finished)]
    screen = io.StringIO()
    story: list[tuple[str, str]] = []

    class Watcher(SweepResult):
        def note(self, event: Event) -> None:
            super().note(event)
            if event.kind in ("start", "complete", "skipped", "taken"):
                story.append((event.kind, event.run))
            if event.kind == "complete" and len(self.complete) == len(free):
                threading.Timer(0.5, let_go).start()

    def let_go() -> None:
        # One dies without having done it, the other has.
        holders[0].end(signal.SIGKILL)
        record = read_record(run_directory(free[0]) / "record.json")
        done = replace(record, config_hash=config_hash(finished), files={})
        write_record(run_directory(finished), done)
        holders[1].end()

    result = Watcher()
    Pool(Console(file=screen), n_jobs=1).run([taken, finished, *free], result)
    assert result.failed == {}
    own = [run_name(one) for one in free]
    assert [run for kind, run in story if kind == "start"] == [*own, run_name(taken)]
    assert result.skipped == [run_name(finished)]
    assert sorted(result.complete) == sorted([*own, run_name(taken)])
    assert screen.getvalue().count("another process is at what is left (2); waiting\n") == 1
    assert f"{run_name(finished)}: skipped: finished by another process" in screen.getvalue()


def test_a_death_is_not_written_over_what_another_process_does_or_has_done(
    config: RunConfig, holders: list[Holder]
) -> None:
    directory = run_directory(config)
    holders.append(Holder(config))
    assert record_death(config, 1, "its process was killed")
    assert not (directory / "record.json").exists()
    holders[0].end()
    record = silently(config)
    assert not record_death(config, 1, "its process was killed")
    assert complete_record(directory, config) == record


def test_a_lock_of_a_folder_that_was_removed_holds_nothing(config: RunConfig) -> None:
    directory = run_directory(config)
    with RunLock(directory) as lock:
        lock.require_held()
        (directory / ".lock").rename(directory / "old")
        with pytest.raises(DiskError, match="removed or replaced"):
            lock.require_held()
        # What is there now is another's to lock.
        with RunLock(directory) as other:
            other.require_held()
            with pytest.raises(DiskError, match="removed or replaced"):
                lock.require_held()


@pytest.mark.parametrize("launcher", times(["pool"], ["pool", "ensemble"]))
@pytest.mark.soak
def test_two_sweeps_at_once_train_every_run_once(tmp_path: Path, launcher: str) -> None:
    for attempt in range(times(1, 5)):
        both = []
        for name in ("first", "second"):
            own = tmp_path / str(attempt) / name
            own.mkdir(parents=True)
            more = ["n_jobs=2"] if launcher == "pool" else ["hydra/launcher=ensemble"]
            both.append(
                Session(own, *SWEEP, *more, f"outputs={tmp_path / str(attempt) / 'outputs'}")
            )
        endings = [session.wait() for session in both]
        words = [session.stdout.read_text() for session in both]
        assert endings == [0, 0], [session.stderr.read_text() for session in both]
        outputs = tmp_path / str(attempt) / "outputs" / "smoke"
        names = sorted(path.name for path in outputs.iterdir())
        assert len(names) == 6
        trained = re.findall(r"^(\S+): training", "".join(words), re.MULTILINE)
        assert sorted(trained) == names
        for own in words:
            complete = re.findall(r"^\[\d/\d\] (\S+): complete", own, re.MULTILINE)
            skipped = re.findall(
                r"^\[\d/\d\] (\S+): skipped: finished by another process", own, re.MULTILINE
            )
            before = re.search(r"^(\d) of 6 runs are finished and skipped", own, re.MULTILINE)
            assert len(complete) + len(skipped) + int(before[1] if before else 0) == 6
        assert half_written(outputs) == []
        assert leftovers([outputs]) == []
        for session in both:
            session.wait_empty()
    # Who trained it does not change a run.
    if SOAK and launcher == "pool":
        alone = Session(tmp_path, *SWEEP, "n_jobs=1", f"outputs={outputs.parent}-alone")
        assert alone.wait() == 0
        ours, theirs = contents(outputs), contents(Path(f"{outputs.parent}-alone") / "smoke")
        for name, files in ours.items():
            for file in ("checkpoint.safetensors", "samples.safetensors", "history.csv"):
                assert files[file] == theirs[name][file]
            assert files["record.json"]["estimates"] == theirs[name]["record.json"]["estimates"]


@pytest.mark.skipif(not SOAK, reason="part of make soak")
@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_the_runs_of_a_killed_sweep_are_taken_over_by_the_other(tmp_path: Path, seed: int) -> None:
    both = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        both.append(Session(tmp_path / name, *SWEEP, "n_jobs=2", f"outputs={tmp_path / 'outputs'}"))
    outputs = tmp_path / "outputs" / "smoke"
    while not any(outputs.glob("*/status.json")) and not both[0].ended():
        time.sleep(0.01)
    time.sleep(seed * 0.2)
    both[0].kill_all()
    assert both[1].wait() == 0, both[1].stderr.read_text()
    assert len(list(outputs.glob("*/record.json"))) == 6
    assert half_written(outputs) == []
    assert leftovers([outputs]) == []
    both[1].wait_empty()
