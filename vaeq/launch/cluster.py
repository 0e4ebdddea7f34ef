"""Runs as the jobs of a cluster whose machines share the folder of the results.

A job leaves everything it has to say in the files of its run, so these are what is watched: epochs
in ``status.json``, the end in ``record.json``. The cluster is asked for one thing alone, which jobs
are over; one that is over and left no record is lost, and said to be. No torch in this module.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from vaeq.compose import explain
from vaeq.config import RunConfig, run_config, run_name
from vaeq.errors import DiskError, InputError, Taken
from vaeq.launch.progress import Event, display
from vaeq.launch.sweep import SweepResult, record_death, write_death
from vaeq.runs.lock import RunLock
from vaeq.runs.record import (
    RECORD,
    RunRecord,
    read_record,
    read_status,
    run_directory,
    summary,
)

S = TypeVar("S")


class Jobs(Protocol):
    """The jobs of a sweep, numbered as its runs are."""

    def over(self, seconds: float) -> dict[int, str]:
        """Wait up to so many seconds; jobs that are over, and what the cluster says of each."""

    def cancel(self) -> None:
        """Stop all that are not over."""


@dataclass
class _Watched:
    config: RunConfig
    before: tuple[int, int] | None  # which record.json lay there before the job
    first: int  # epochs that were done before the job
    seen: int = -1  # epochs done when it was first seen at work; -1 before
    epoch: int = 0  # the last one told
    over: bool = False

    def new_record(self) -> RunRecord | None:
        """The record that the job wrote, if it has."""
        if _identity(self.config) == self.before:
            return None
        try:
            return read_record(run_directory(self.config) / RECORD)
        except InputError:
            return None


def _identity(config: RunConfig) -> tuple[int, int] | None:
    # The listing makes a network file system look again for files it has not found before.
    directory = run_directory(config)
    try:
        os.listdir(directory)
        found = (directory / RECORD).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def watched(configs: Sequence[RunConfig]) -> list[_Watched]:
    """The state of the folders before any job starts, for :func:`gather`."""
    return [
        _Watched(
            config, _identity(config), read_status(run_directory(config), config).get("epoch", 0)
        )
        for config in configs
    ]


def gather(
    runs: Sequence[_Watched],
    jobs: Jobs,
    result: SweepResult,
    console: Console,
    poll_seconds: float,
) -> None:
    """Show the runs until all are over, and note in ``result`` how each ended.

    A job that is over without a record is looked for once more, as files of another machine may be
    seen late, and then recorded as failed with what the cluster says of it.

    Raises:
        KeyboardInterrupt, SystemExit: after the jobs have been cancelled.
    """
    left = dict(enumerate(runs))
    with display(console, [run_name(one.config) for one in runs]) as screen:
        try:
            while left:
                over = jobs.over(poll_seconds)
                for i, one in list(left.items()):
                    for event in _news(one, over.get(i)):
                        result.note(event)
                        screen.update(event)
                        if event.kind in ("complete", "failed"):
                            del left[i]
        except BaseException:
            jobs.cancel()
            raise


def _news(one: _Watched, word: str | None) -> list[Event]:
    """What the files tell that was not told before; ``word`` where the job is over."""
    record = one.new_record()
    name = run_name(one.config)
    if record is None:
        if word is None:
            return _progress(one)
        if not one.over:
            one.over = True
            return []
        return [Event("failed", name, message=_lost(one, word))]
    if record.state == "complete":
        return [Event("complete", name, message=summary(record))]
    return [Event("failed", name, message=(record.failure or {}).get("message", ""))]


def _progress(one: _Watched) -> list[Event]:
    status = read_status(run_directory(one.config), one.config)
    if status.get("state") != "running":
        return []
    epoch, epochs, images = status["epoch"], one.config.epochs, one.config.data.n_train or 60_000
    name = run_name(one.config)
    if one.seen < 0:
        one.seen = one.epoch = epoch
        return [Event("start", name, one.first, epochs, 0, (epochs - epoch) * images)]
    if epoch == one.epoch:
        return []
    one.epoch = epoch
    # The rate is that since it was first seen.
    done, total = (epoch - one.seen) * images, (epochs - one.seen) * images
    return [Event("epoch", name, epoch, epochs, done, total)]


def _lost(one: _Watched, word: str) -> str:
    """Record a run whose job ended without a word, unless somebody else is at it by now."""
    directory = run_directory(one.config)
    message = f"its job left no record: {word}"
    try:
        with RunLock(directory):
            if one.new_record() is None:
                write_death(one.config, max(one.first, one.epoch), message)
    except Taken:
        return f"{message}; another process has taken the run up"
    except DiskError as error:
        return f"{message}; {error}"
    return message


def run_job(values: dict[str, Any], folder: str) -> None:
    """What a job does: one run, whose every end is a record in its folder.

    Args:
        values: the plain values of a RunConfig.
        folder: where the sweep was started; relative paths in the values start there.
    """
    os.chdir(folder)
    config = run_config(values)
    threads = config.threads or 1
    # Before torch loads OpenMP, which reads them once.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from vaeq.experiment import run

    try:
        run(config, lambda event: None, threads)
    except InputError as error:
        # The run was refused before it began, by a machine that has no such device or data.
        record_death(config, 0, str(error), kind="InputError")
        raise


def settings(schema: type[S], values: dict[str, Any]) -> S:
    """The typed settings of a launcher.

    Raises:
        InputError: a setting is unknown, mistyped or out of its range.
    """
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        words = explain(error, schema, [])
        raise InputError(f"hydra.launcher.{words.removeprefix('hydra.launcher.')}") from error
    assert isinstance(found, schema)
    return found
