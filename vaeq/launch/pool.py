"""Many runs side by side: one single-threaded worker process a core, which takes run after run.

Workers are forked from a server that has torch imported already: one starts in milliseconds, and
keeps the images it has read for its next run. One that is killed takes only its own run with it;
another takes its place, and another server that of a killed server. When this process is killed,
they end by themselves. No torch in this module.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from vaeq.config import RunConfig, run_name
from vaeq.errors import InputError, Taken, VaeqError
from vaeq.files.scratch import scratch_folder
from vaeq.interrupts import held_back
from vaeq.launch.progress import Event, display
from vaeq.launch.sweep import SweepResult, record_death, require_folders
from vaeq.memory import available_memory, fitting, gigabytes, needed

# Seconds between two looks at runs that another process is at.
_LOOK = 1.0
# Seconds that a stopped worker has to come to the end of its step and write its state.
_GRACE = 60.0


@dataclass
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    config: RunConfig | None = None  # the run it is at
    epoch: int = 0


def available_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its affinity mask, and the quotas of its control groups."""
    cores = len(os.sched_getaffinity(0))
    for quota, period in _quotas(root):
        cores = min(cores, max(1, quota // period))
    return cores


def _quotas(root: Path) -> Iterator[tuple[int, int]]:
    """(quota, period) of CPU time of this process's control group and of those above it."""
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        base = groups if number == "0" else groups / "cpu"
        own = Path(path.lstrip("/"))
        for folder in {base / own, *(base / parent for parent in own.parents), base}:
            with contextlib.suppress(OSError, ValueError):  # no quota here, or it is "max"
                if number == "0":
                    quota, period = (folder / "cpu.max").read_text("ascii").split()
                else:
                    quota = (folder / "cpu.cfs_quota_us").read_text("ascii")
                    period = (folder / "cpu.cfs_period_us").read_text("ascii")
                if int(quota) > 0:
                    yield int(quota), int(period)


class Pool:
    """Starts workers, shows their events, and survives the death of any of them."""

    def __init__(self, console: Console, n_jobs: int) -> None:
        self.console = console
        self.n_jobs = n_jobs
        # Before the server starts: its children inherit it, and OpenMP reads it but once.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["vaeq.launch.preloaded"])
        self.workers: list[_Worker] = []
        # Runs that another process is at: they come last, when there is nothing but to wait.
        self.taken: list[RunConfig] = []
        self._look = 0.0

    def run(self, configs: Sequence[RunConfig], result: SweepResult) -> None:
        """Run every config in this order; each one's end is in ``result``.

        Raises:
            InputError: a device, a data set or a folder cannot be used; nothing was started.
            KeyboardInterrupt: after every worker has been stopped; finished runs stay finished.
        """
        waiting = list(configs)
        self.taken.clear()
        waited = False
        try:
            self._preflight(waiting)
            require_folders(waiting)
            self._limit(waiting)
            with display(self.console, [run_name(config) for config in waiting]) as screen:
                while self._assign(waiting):
                    idle = not any(worker.config is not None for worker in self.workers)
                    if idle and not waited:
                        waited = True
                        screen.line(
                            f"another process is at what is left ({len(self.taken)}); waiting"
                        )
                    # With runs that are taken there is something to do though no worker speaks.
                    ready = wait([w.pipe for w in self.workers], _LOOK if self.taken else None)
                    for worker in [w for w in self.workers if w.pipe in ready]:
                        event = self._next_event(worker)
                        if event is not None:
                            result.note(event)
                            screen.update(event)
        finally:
            self._stop()

    def _assign(self, waiting: list[RunConfig]) -> bool:
        """Give every free worker a run, start workers while there is need; is any run left?"""
        if not waiting and self.taken and time.monotonic() >= self._look:
            self._look = time.monotonic() + _LOOK
            waiting += self.taken
            self.taken.clear()
        for worker in self.workers:
            if worker.config is None and waiting:
                self._give(worker, waiting.pop(0))
        while waiting and len(self.workers) < self.n_jobs:
            self._give(self._start(), waiting.pop(0))
        return bool(self.taken) or any(worker.config is not None for worker in self.workers)

    def _start(self) -> _Worker:
        reason = ""
        for _ in range(2):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(target=_work, args=(theirs,), daemon=True)
            # One that was cut in two would leave a worker that nobody knows. Where the server is
            # still at its imports, that takes the seconds that those do.
            with held_back():
                try:
                    _start_server()
                    process.start()
                except (OSError, EOFError) as error:
                    # Mostly the server was killed: the next attempt starts another.
                    reason = str(error) or type(error).__name__
                    ours.close()
                    continue
                finally:
                    theirs.close()
                worker = _Worker(process, ours)
                self.workers.append(worker)
            return worker
        raise VaeqError(f"a worker process could not start: {reason}.")

    @staticmethod
    def _give(worker: _Worker, config: RunConfig) -> None:
        worker.config, worker.epoch = config, 0
        with contextlib.suppress(OSError):  # dead: its closed pipe says so in a moment
            worker.pipe.send(config)

    def _next_event(self, worker: _Worker) -> Event | None:
        """What a worker says; its last word is made up here if it died without one."""
        try:
            event: Event = worker.pipe.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        worker.epoch = max(worker.epoch, event.epoch)
        if event.kind == "taken" and worker.config is not None:
            self.taken.append(worker.config)
        if event.kind in ("complete", "failed", "skipped", "taken"):
            worker.config = None
        return event

    def _bury(self, worker: _Worker) -> Event | None:
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)
        if worker.config is None:
            return None
        message = f"its process {_death(worker.process.exitcode)}"
        if record_death(worker.config, worker.epoch, message):
            return Event("failed", run_name(worker.config), message=message)
        return Event("complete", run_name(worker.config), message=f"{message}, having finished")

    def _preflight(self, configs: Sequence[RunConfig]) -> None:
        """Load each data set and device once, in a worker: refuse the sweep, not its every run."""
        worker = self._start()
        # Of the convolutions the depth has to fit the images, too.
        depths = {c: (c.encoder_depth, c.decoder_depth) * (c.model == "conv") for c in configs}
        # Of several sizes the one that needs most memory, which comes last.
        by_size = sorted(configs, key=lambda config: needed(config).total)
        distinct = {
            (c.data, c.device, c.precision, c.kernels, c.logger, depths[c]): c for c in by_size
        }
        try:
            worker.pipe.send(list(distinct.values()))
            message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            raise VaeqError(
                f"a worker process could not start: {_death(worker.process.exitcode)}."
            ) from None
        if message:
            raise InputError(message)

    def _limit(self, configs: Sequence[RunConfig]) -> None:
        """Take no more workers than the largest runs leave memory for, and say so."""
        available = available_memory()
        networks = [config for config in configs if config.model != "ppca"]
        most = fitting(networks, available)
        if most < min(self.n_jobs, len(networks)):
            largest = max(needed(config).total for config in networks)
            self.console.print(
                f"{most} of {self.n_jobs} runs at a time: the largest needs about "
                f"{gigabytes(largest)} of memory, and {gigabytes(available)} are free",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            self.n_jobs = most

    def _stop(self) -> None:
        """End every worker; those at work keep the state of their last epoch."""
        with held_back():
            deadline = time.monotonic() + _GRACE
            for worker in self.workers:
                worker.process.terminate()
            for worker in self.workers:
                # Its end of the pipe closes with it; the server, which knows, may have been killed.
                if not _silent(worker.pipe, deadline):
                    worker.process.kill()
                worker.process.join()
                worker.pipe.close()
            self.workers.clear()


def _silent(pipe: Connection, deadline: float) -> bool:
    """Whether the other end closes before the deadline, whatever it says till then."""
    try:
        while pipe.poll(max(0.0, deadline - time.monotonic())):
            pipe.recv()
    except (EOFError, OSError):
        return True
    return False


def _start_server() -> None:
    """Start the server of workers, if there is none.

    Ctrl-C reaches the whole process group; this process decides, and stops its workers. They never
    see it, not even while they import: it is blocked before the server starts. The server's socket
    lies in a folder that does not stay if this process is killed.
    """
    # It unblocks signals when it starts, so it has to be there before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    temporary, tempfile.tempdir = tempfile.tempdir, str(scratch_folder())
    try:
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = temporary
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended early with exit status {exitcode}"


def _work(pipe: Connection) -> None:
    """A worker's life: a list of configs is to be checked, a config to be run, until the end."""
    signal.signal(signal.SIGTERM, lambda number, frame: _leave())
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            order = pipe.recv()
        except (EOFError, OSError):
            return
        if isinstance(order, list):
            with contextlib.suppress(OSError):
                pipe.send(_check(order))
        else:
            _run(order, pipe)


def _leave() -> NoReturn:
    """End this worker. A run unwinds, and keeps its state: SystemExit is no failure of a run."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the state is being written
    sys.exit(128 + signal.SIGTERM)


def _follow_parent() -> None:
    """Leave when the sweep was killed, also in the middle of measuring, when nobody is told."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _check(configs: Sequence[RunConfig]) -> str:
    from vaeq.experiment import prepare

    try:
        for config in configs:
            prepare(config)
    except InputError as error:
        return str(error)
    return ""


def _run(config: RunConfig, pipe: Connection) -> None:
    from vaeq.experiment import run

    def notify(event: Event) -> None:
        try:
            pipe.send(event)
        except OSError:
            # The parent is gone (a reset, where it left words unread): nobody waits for this run.
            _leave()

    try:
        run(config, notify, threads=config.threads or 1, wait=False)
    except Taken:
        notify(Event("taken", run_name(config)))
    except VaeqError as error:
        notify(Event("failed", run_name(config), message=str(error)))
    except Exception as error:
        import traceback

        traceback.print_exc()
        words = f"{type(error).__name__}: {error}"
        notify(Event("failed", run_name(config), message=words))
