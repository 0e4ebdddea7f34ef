"""Kills and interrupts at random moments, and what the same command makes of what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.conftest import TINY
from tests.sessions import (
    Session,
    content,
    contents,
    eventually,
    half_written,
    leftovers,
)
from tests.soak import SOAK, times
from vaeq.config import RunConfig
from vaeq.experiment import run
from vaeq.launch import pool
from vaeq.runs.record import run_directory

SHORT = (*TINY, "epochs=8", "data.n_train=1500")
N_SEEDS = times(2, 8)
SEEDS = ",".join(map(str, range(N_SEEDS)))
SWEEP = ("sweep", *SHORT, "latent_dim=2,3", f"seed={SEEDS}", "n_jobs=2")
TRAIN = ("train", *SHORT, "latent_dim=2", "seed=0")


class Siege:
    """Starts a command over and over in one folder and kills parts of it at random moments."""

    def __init__(self, folder: Path, temporary: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        folder.mkdir()
        self.temporary = temporary
        self.outputs = folder / "outputs"
        self.killed: Counter[str] = Counter()
        self.found: Counter[str] = Counter()

    def start(self, *words: str) -> Session:
        return Session(self.folder, *words, TMPDIR=str(self.temporary))

    def kill(self, session: Session, role: str) -> bool:
        """SIGKILL for one process of a role, at a moment that chance has; is it dead?"""
        if self.random.random() < 0.5:
            # While a file is being written: where one is found half-written, if ever.
            moment = time.monotonic() + 10 * self.random.random()
            while time.monotonic() < moment and not session.ended():
                if any(self.outputs.glob("*/*/.*.tmp")):
                    break
                time.sleep(0.0005)
        else:
            # A run takes about a second, and as many are to be killed as can be.
            time.sleep((0.3 if role == "worker" else 2) * self.random.random())
        own = session.of(role)
        if not own:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.random.choice(own), signal.SIGKILL)
            self.killed[role] += 1
            self.look()
            return True
        return False

    def kill_all(self, session: Session) -> None:
        time.sleep(2 * self.random.random())
        if not session.ended():
            session.kill_all()
            self.killed["everything"] += 1
            self.look()

    def look(self) -> None:
        """What a kill left behind, for the report; nothing may be half-written, ever."""
        assert half_written(self.outputs) == []
        self.found["temporary files"] += len(list(self.outputs.glob("*/*/.*.tmp")))
        for status in self.outputs.glob("*/*/status.json"):
            with contextlib.suppress(OSError, ValueError):
                self.found[json.loads(status.read_text())["state"]] += 1

    def round(self, way: str) -> None:
        """One command, one way to kill it, until it is dead or over."""
        session = self.start(*(TRAIN if way == "train" else SWEEP))
        role = "main" if way == "train" else "worker"
        assert eventually(lambda: session.of(role) or session.ended())
        if way == "train":
            # It has one process, whose first seconds are imports.
            eventually(lambda: any(self.outputs.glob("*/*/.lock")) or session.ended())
            self.kill(session, "main")
        elif way == "everything":
            self.kill_all(session)
        elif way == "sweep":
            self.kill(session, "main")
        else:
            for _ in range(2 * N_SEEDS - 2 if way == "workers" else 1):
                if not session.ended():
                    self.kill(session, "worker" if way == "workers" else "server")
            if way == "server":
                self.kill(session, "worker")  # whose place can be taken only by a new server's
        if session.ended() or way in ("everything", "sweep", "train"):
            assert session.process.wait(60) is not None
        else:
            assert session.wait() in (0, 1), session.stderr.read_text()
        session.wait_empty()
        assert "Traceback" not in session.stderr.read_text(), session.stderr.read_text()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The temporary folder of the program: short, for it holds a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The runs of the sweep, if nobody kills anything."""
    folder = tmp_path_factory.mktemp("undisturbed")
    session = Session(folder, *SWEEP)
    assert session.wait() == 0, session.stderr.read_text()
    return contents(folder / "outputs" / "smoke")


@pytest.mark.soak
def test_after_any_kills_the_same_command_ends_in_the_same_bits(
    tmp_path: Path,
    temporary: Path,
    undisturbed: dict[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(undisturbed) == 2 * N_SEEDS
    killed: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for seed in count():
        if killed.total() >= times(1, 100):
            break
        siege = Siege(tmp_path / str(seed), temporary, seed)
        # Several rounds over the same folder, then what is left is brought to its end.
        ways = ["workers", "sweep", "everything", "server", "train", "workers"]
        siege.random.shuffle(ways)
        for way in ["everything", "workers"] if times(1, 0) else ["workers", *ways]:
            siege.round(way)
        last = siege.start(*SWEEP)
        assert last.wait() == 0, last.stderr.read_text()
        last.wait_empty()
        assert contents(siege.outputs / "smoke") == undisturbed
        assert leftovers([siege.outputs, siege.temporary]) == []
        assert os.listdir(siege.temporary) == []
        killed += siege.killed
        found += siege.found
        with capsys.disabled():
            print(f"\n{killed.total()} kills: {dict(killed)}; they left: {dict(found)}")  # noqa: T201


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.soak
def test_an_interrupt_keeps_the_epoch_says_how_to_go_on_and_leaves_nobody(
    tmp_path: Path, temporary: Path, number: signal.Signals, status: int
) -> None:
    for seed in range(times(1, 20)):
        chance = random.Random(f"{number}-{seed}")
        folder = tmp_path / str(seed)
        folder.mkdir()
        command = "sweep" if seed % 2 == 0 else "train"
        words = ["n_jobs=2", "seed=0,1"] if command == "sweep" else ["seed=0"]
        session = Session(
            folder, command, *TINY, "epochs=20", "data.n_train=3000", *words,
            TMPDIR=str(temporary),
        )  # fmt: skip
        # From when the program has its own handler to the middle of training.
        assert eventually(lambda session=session: _handles(session.process.pid, signal.SIGTERM))
        if chance.random() < 0.5:
            time.sleep(4 * chance.random())
        else:
            runs = folder / "outputs" / "smoke"
            eventually(lambda runs=runs: any(runs.glob("*/checkpoint.safetensors")))
            time.sleep(chance.random())
        over = session.ended()
        # Ctrl-C in a terminal, and a stopped batch job, reach every process.
        if chance.random() < 0.5:
            os.killpg(session.process.pid, number)
        else:
            session.process.send_signal(number)
        ended = session.wait()
        words_told = session.stderr.read_text()
        # It may have been over, or so near its end that it ended well.
        if over or ended == 0:
            continue
        assert ended == status, words_told
        assert "the same command goes on" in words_told
        assert words_told.count("\n") == 1, words_told
        # Nobody is at a run when the command returns, and who waited for that goes, too.
        for lock in folder.glob("outputs/smoke/*/.lock"):
            FileLock(lock, blocking=False).acquire().lock.release()
        session.wait_empty()
        assert os.listdir(temporary) == []
        assert leftovers([folder / "outputs"]) == []
        assert half_written(folder / "outputs") == []
        for name, epoch in _epochs_told(session.stdout.read_text()).items():
            kept = json.loads((folder / "outputs" / "smoke" / name / "status.json").read_text())
            assert kept["epoch"] >= epoch


def _handles(process: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process}/status").read_text()
        caught = re.search(r"SigCgt:\s*([0-9a-f]+)", words)
        return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)
    return True


def _epochs_told(lines: str) -> dict[str, int]:
    """The last epoch that was announced of every run."""
    found = re.findall(r"^(latent_dim=\S+): epoch (\d+)/", lines, re.MULTILINE)
    return {name: int(epoch) for name, epoch in found}


@pytest.mark.skipif(not SOAK, reason="part of make soak")
@pytest.mark.soak
def test_an_interrupt_in_the_first_seconds_is_one_line_and_the_end(tmp_path: Path) -> None:
    # Imports and configs that are cut in two swallow it, or fail with errors of their own.
    for step in range(80):
        number, status = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][step % 2]
        folder = tmp_path / str(step)
        folder.mkdir()
        session = Session(folder, "train", *TINY, "epochs=100000")
        assert eventually(lambda session=session: _handles(session.process.pid, signal.SIGTERM))
        time.sleep(step * 0.025)
        session.process.send_signal(number)
        assert session.wait() == status, session.stderr.read_text()
        words = session.stderr.read_text()
        assert "the same command goes on" in words
        assert words.count("\n") == 1, words


def test_workers_end_when_the_sweep_alone_is_killed_also_while_they_measure(
    tmp_path: Path, temporary: Path
) -> None:
    # Annealing takes minutes, in which a worker has nothing to tell and reads nothing.
    session = Session(
        tmp_path, "sweep", *TINY, "seed=0,1", "n_jobs=2", "data.n_test=2000",
        "generation.ais_images=2000", TMPDIR=str(temporary),
    )  # fmt: skip
    measuring = lambda: [  # noqa: E731
        path
        for path in tmp_path.glob("outputs/smoke/*/checkpoint.safetensors")
        if b'"final": "true"' in path.read_bytes() or b'"final":"true"' in path.read_bytes()
    ]
    assert eventually(lambda: len(measuring()) == 2 or session.ended())
    assert len(session.of("worker")) == 2
    os.kill(session.process.pid, signal.SIGKILL)
    session.process.wait()
    assert session.wait_empty() < 30
    assert not list(tmp_path.glob("outputs/smoke/*/record.json"))


def test_a_worker_whose_sweep_was_killed_with_words_unread_leaves_and_fails_nothing(
    tiny: RunConfig,
) -> None:
    ours, theirs = Pipe()
    theirs.send("unread")
    ours.close()  # a reset, where a pipe that was read to its end is a broken one
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            pool._run(tiny, theirs)
    finally:
        signal.signal(signal.SIGTERM, before)
        theirs.close()
    assert not (run_directory(tiny) / "record.json").exists()
    assert run(tiny, lambda event: None, threads=1).state == "complete"


def test_the_judges_see_a_changed_bit_a_half_file_and_a_leftover(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "smoke" / "run"
    run.mkdir(parents=True)
    (run / "history.csv").write_text("epoch,seconds\n1,0.5\n")
    (run / "config.yaml").write_text("a: 1\n")
    (run / "record.json").write_text('{"estimates": {"elbo": 1.0}, "timing": {"total": 3}}')
    before = content(run)
    (run / "record.json").write_text('{"estimates": {"elbo": 1.0}, "timing": {"total": 4}}')
    assert content(run) == before
    (run / "record.json").write_text('{"estimates": {"elbo": 1.0000001}, "timing": {"total": 3}}')
    assert content(run) != before
    (run / "record.json").write_text('{"estimates": {"elbo"')
    assert "record.json" in half_written(tmp_path)[0]
    (run / ".record.json.0.tmp").write_text("")
    assert len(leftovers([tmp_path])) == 1
