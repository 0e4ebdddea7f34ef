"""Many runs side by side: one single-threaded process a run, one at a time a core.

A process a run, forked from a server that has torch imported already: it starts in milliseconds,
and one that is killed takes only its own run with it. No torch in this module: a sweep whose runs
are all finished must be over in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from rich.console import Console

from vaeq.config import RunConfig, config_hash, run_name
from vaeq.errors import InputError, VaeqError
from vaeq.progress import Event, display
from vaeq.record import (
    RunRecord,
    complete_record,
    require_writable,
    run_directory,
    write_config,
    write_record,
    write_status,
)

# Failed runs named in the closing sentence; the others were shown when they fell.
_NAMED = 5


@dataclass
class SweepResult:
    """Run names by how they ended, with the message of each failure."""

    complete: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class _Worker:
    config: RunConfig
    process: ForkServerProcess
    events: Connection
    epoch: int = 0
    ended: bool = False


def available_cores() -> int:
    """Cores this process may use: its affinity mask, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control group, or its quota is "max"
    return cores


def work(config: RunConfig) -> float:
    """About how long a run takes, in multiplications: to start the longest first."""
    pixels = 784
    encoder = [pixels, *[config.encoder_width] * config.encoder_depth, 2 * config.latent_dim]
    decoder = [config.latent_dim, *[config.decoder_width] * config.decoder_depth, pixels]
    weights = sum(a * b for sizes in (encoder, decoder) for a, b in pairwise(sizes))
    return float(weights) * config.epochs * (config.data.n_train or 60_000)


def run_sweep(configs: Sequence[RunConfig], n_jobs: int | None, console: Console) -> SweepResult:
    """Run what is not finished yet, longest first, ``n_jobs`` at a time.

    Raises:
        InputError: the folder, the device or the data of some run cannot be used; nothing started.
        KeyboardInterrupt: after every worker has been stopped; finished runs stay finished.
    """
    runs = {run_directory(config): config for config in configs}
    todo: list[RunConfig] = []
    result = SweepResult()
    for directory, config in runs.items():
        if complete_record(directory, config) is None:
            todo.append(config)
        else:
            result.skipped.append(run_name(config))
    if result.skipped:
        console.print(
            f"{len(result.skipped)} of {len(runs)} runs are finished and skipped; "
            f"{len(todo)} to do",
            markup=False,
            highlight=False,
        )
    if not todo:
        return result
    pool = Pool(console, n_jobs or available_cores())
    pool.preflight(todo)
    for folder in {directory.parent for directory in runs}:
        require_writable(folder)
    pool.run(sorted(todo, key=work, reverse=True), result)
    return result


def raise_failures(result: SweepResult) -> None:
    """One sentence for the failed runs of a sweep; each one's own reason was shown when it fell."""
    if result.failed:
        total = len(result.complete) + len(result.skipped) + len(result.failed)
        names = ", ".join(list(result.failed)[:_NAMED]) + (
            ", ..." if len(result.failed) > _NAMED else ""
        )
        raise VaeqError(
            f"{len(result.failed)} of {total} runs failed: {names}. "
            "The same command tries them again."
        )


class Pool:
    """Starts workers, shows their events, and survives the death of any of them."""

    def __init__(self, console: Console, n_jobs: int) -> None:
        self.console = console
        self.n_jobs = n_jobs
        # Before the server starts: its children inherit it, and OpenMP reads it but once.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["vaeq.experiment"])
        self.active: list[_Worker] = []

    def run(self, configs: Sequence[RunConfig], result: SweepResult) -> None:
        """Run every config in this order; each one's end is in ``result``."""
        waiting = list(configs)
        try:
            with display(self.console, [run_name(config) for config in waiting]) as screen:
                while waiting or self.active:
                    while waiting and len(self.active) < self.n_jobs:
                        self.active.append(self._start(waiting.pop(0)))
                    sources = [w.events for w in self.active if not w.ended]
                    wait([*sources, *(w.process.sentinel for w in self.active)])
                    for worker in list(self.active):
                        for event in self._collect(worker):
                            self._note(event, result)
                            screen.update(event)
        finally:
            self._stop()

    def _start(self, config: RunConfig) -> _Worker:
        receive, send = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_run_in_worker, args=(config, send))
        process.start()
        send.close()
        return _Worker(config, process, receive)

    def preflight(self, configs: Sequence[RunConfig]) -> None:
        """Load each data set and device once, in a worker: refuse the sweep, not its every run.

        Raises:
            InputError: a device or a data set cannot be used.
        """
        distinct = {(config.data, config.device): config for config in configs}
        receive, send = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_prepare_in_worker, args=(list(distinct.values()), send)
        )
        process.start()
        send.close()
        try:
            message = receive.recv()
        except EOFError:
            process.join()
            raise VaeqError(
                f"a worker process could not start: {_death(process.exitcode)}."
            ) from None
        finally:
            receive.close()
        process.join()
        if message:
            raise InputError(message)

    def _collect(self, worker: _Worker) -> list[Event]:
        """The events a worker has sent; its last one is made up here if it died without a word."""
        dead = not worker.process.is_alive()
        events: list[Event] = []
        try:
            while worker.events.poll():
                events.append(worker.events.recv())
        except (EOFError, OSError):
            worker.ended = True
        for event in events:
            worker.epoch = max(worker.epoch, event.epoch)
        said_last = any(event.kind in ("complete", "failed", "skipped") for event in events)
        if said_last or dead:
            worker.process.join()
            worker.events.close()
            self.active.remove(worker)
            if not said_last:
                message = f"its process {_death(worker.process.exitcode)}"
                record_death(worker.config, worker.epoch, message)
                events.append(Event("failed", run_name(worker.config), message=message))
        return events

    @staticmethod
    def _note(event: Event, result: SweepResult) -> None:
        if event.kind == "complete":
            result.complete.append(event.run)
        elif event.kind == "skipped":
            result.skipped.append(event.run)
        elif event.kind == "failed":
            result.failed[event.run] = event.message

    def _stop(self) -> None:
        for worker in self.active:
            worker.process.terminate()
        for worker in self.active:
            worker.process.join()
        self.active.clear()


def _death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended early with exit status {exitcode}"


def record_death(config: RunConfig, epoch: int, message: str) -> None:
    """Write the failure of a run whose process could not write it; its checkpoint stays."""
    directory = run_directory(config)
    directory.mkdir(parents=True, exist_ok=True)
    failure = {"type": "WorkerDied", "message": message}
    write_config(directory, config)
    write_record(
        directory, RunRecord("failed", asdict(config), config_hash(config), failure=failure)
    )
    write_status(directory, "failed", epoch, config.epochs, failure=failure)


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole process group; the parent decides, and stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prepare_in_worker(configs: Sequence[RunConfig], events: Connection) -> None:
    from vaeq.experiment import prepare

    _ignore_interrupts()
    message = ""
    try:
        for config in configs:
            prepare(config)
    except InputError as error:
        message = str(error)
    events.send(message)


def _run_in_worker(config: RunConfig, events: Connection) -> None:
    from vaeq.experiment import run

    _ignore_interrupts()

    def notify(event: Event) -> None:
        try:
            events.send(event)
        except BrokenPipeError:
            # The parent is gone, so nobody waits for this run; the checkpoint has its last epoch.
            # SystemExit passes by the handlers that would record a failure.
            sys.exit(1)

    try:
        run(config, notify, threads=config.threads or 1)
    except VaeqError as error:
        events.send(Event("failed", run_name(config), message=str(error)))
    except Exception as error:
        import traceback

        traceback.print_exc()
        words = f"{type(error).__name__}: {error}"
        events.send(Event("failed", run_name(config), message=words))
