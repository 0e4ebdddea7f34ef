"""Many runs side by side: one single-threaded worker process a core, which takes run after run.

Workers are forked from a server that has torch imported already: one starts in milliseconds, and
keeps the images it has read for its next run. One that is killed takes only its own run with it;
another takes its place. No torch in this module.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from rich.console import Console

from vaeq.config import RunConfig, run_name
from vaeq.errors import InputError, Taken, VaeqError
from vaeq.progress import Event, display
from vaeq.sweep import SweepResult, record_death, require_folders

# Pause between two looks at a run that another process is at.
_RETRY_SECONDS = 0.5


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
        self.context.set_forkserver_preload(["vaeq.experiment"])
        self.workers: list[_Worker] = []
        # Runs that another process is at, perhaps on another machine: tried again in turn when no
        # others are left.
        self.taken: list[RunConfig] = []

    def run(self, configs: Sequence[RunConfig], result: SweepResult) -> None:
        """Run every config in this order; each one's end is in ``result``.

        Raises:
            InputError: a device, a data set or a folder cannot be used; nothing was started.
            KeyboardInterrupt: after every worker has been stopped; finished runs stay finished.
        """
        waiting = list(configs)
        self.taken.clear()
        try:
            self._preflight(waiting)
            require_folders(waiting)
            with display(self.console, [run_name(config) for config in waiting]) as screen:
                while self._assign(waiting):
                    ready = wait([worker.pipe for worker in self.workers])
                    for worker in [w for w in self.workers if w.pipe in ready]:
                        event = self._next_event(worker)
                        if event is not None:
                            result.note(event)
                            screen.update(event)
        finally:
            self._stop()

    def _assign(self, waiting: list[RunConfig]) -> bool:
        """Give every free worker a run, start workers while there is need; is any at work?"""
        for worker in self.workers:
            if worker.config is None and (waiting or self.taken):
                self._give(worker, waiting)
        while (waiting or self.taken) and len(self.workers) < self.n_jobs:
            self._give(self._start(), waiting)
        return any(worker.config is not None for worker in self.workers)

    def _start(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(theirs,))
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self.workers.append(worker)
        return worker

    def _give(self, worker: _Worker, waiting: list[RunConfig]) -> None:
        again = not waiting
        config = (self.taken if again else waiting).pop(0)
        worker.config, worker.epoch = config, 0
        with contextlib.suppress(BrokenPipeError):  # dead: its closed pipe says so in a moment
            worker.pipe.send((config, again))

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
        record_death(worker.config, worker.epoch, message)
        return Event("failed", run_name(worker.config), message=message)

    def _preflight(self, configs: Sequence[RunConfig]) -> None:
        """Load each data set and device once, in a worker: refuse the sweep, not its every run."""
        worker = self._start()
        # Of the convolutions the depth has to fit the images, too.
        depths = {c: (c.encoder_depth, c.decoder_depth) * (c.model == "conv") for c in configs}
        distinct = {(c.data, c.device, c.precision, c.logger, depths[c]): c for c in configs}
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

    def _stop(self) -> None:
        for worker in self.workers:
            if worker.config is None:
                worker.pipe.close()  # it has nothing to keep, and ends when nobody speaks to it
            else:
                worker.process.terminate()
        for worker in self.workers:
            worker.process.join()
        self.workers.clear()


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended early with exit status {exitcode}"


def _work(pipe: Connection) -> None:
    """A worker's life: a list of configs is to be checked, a single one run, until the end."""
    # Ctrl-C reaches the whole process group; the parent decides, and stops its workers. A run that
    # is terminated unwinds, and keeps the state of its last epoch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        if isinstance(order, list):
            pipe.send(_check(order))
        else:
            config, again = order
            _run(config, again, pipe)


def _check(configs: Sequence[RunConfig]) -> str:
    from vaeq.experiment import prepare

    try:
        for config in configs:
            prepare(config)
    except InputError as error:
        return str(error)
    return ""


def _run(config: RunConfig, again: bool, pipe: Connection) -> None:
    from vaeq.experiment import run

    def notify(event: Event) -> None:
        try:
            pipe.send(event)
        except BrokenPipeError:
            # The parent is gone, so nobody waits for this run; its last epoch is kept. SystemExit
            # passes by the handlers that would record a failure.
            sys.exit(1)

    try:
        run(config, notify, threads=config.threads or 1, wait=False)
    except Taken:
        if again:
            time.sleep(_RETRY_SECONDS)
        else:
            notify(
                Event("note", run_name(config), message="another process is at it; it comes last")
            )
        notify(Event("taken", run_name(config)))
    except VaeqError as error:
        notify(Event("failed", run_name(config), message=str(error)))
    except Exception as error:
        import traceback

        traceback.print_exc()
        words = f"{type(error).__name__}: {error}"
        notify(Event("failed", run_name(config), message=words))
