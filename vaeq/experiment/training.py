"""Runs while they train together: their states kept, their progress told, stopped between steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import torch

from vaeq.config import config_hash
from vaeq.errors import DiskError, NeverTrained
from vaeq.experiment.preparation import recipe
from vaeq.experiment.under_way import Run, matrices_digest
from vaeq.interrupts import held_back
from vaeq.runs.record import CHECKPOINT, HISTORY, write_history, write_status
from vaeq.training.checkpoint import save_checkpoint
from vaeq.training.loop import fit_together


class _Keeper:
    """Writes the states of runs after an epoch, but spends a twentieth of the time on it at most.

    A network that trains thirty epochs a second would do nothing else but write, and so would many
    that train together if each kept count by itself. What is lost to a SIGKILL is seconds of work
    and no result: the same bits are computed again.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._kept = [run.first for run in runs]
        self._epoch = 0  # that which is written, or not, of every run
        self._writing = False
        self._spent = 0.0
        self._due = 0.0

    def epoch_done(self, i: int) -> None:
        """Write the state of run i, if this epoch is one to write."""
        began = time.monotonic()
        if self._runs[i].state.epoch != self._epoch:
            self._epoch = self._runs[i].state.epoch
            self._writing = began >= self._due
            self._spent = 0.0
        if self._writing:
            self.write(i)
            ended = time.monotonic()
            self._spent += ended - began
            self._due = ended + 20 * self._spent

    def write(self, i: int, *, final: bool = False) -> None:
        """Bring the files of run i up to its state, if they are behind.

        Raises:
            DiskError: they cannot be written, or are not this run's any more.
        """
        run = self._runs[i]
        state = run.state
        if final or state.epoch > self._kept[i]:
            run.lock.require_held()
            checkpoint = save_checkpoint(run.directory, state, config_hash(run.config), final=final)
            history = write_history(run.directory, state.history)
            run.files.update({CHECKPOINT: checkpoint, HISTORY: history})
            write_status(run.directory, run.config, "running", state.epoch)
            self._kept[i] = state.epoch


def train(runs: Sequence[Run]) -> list[Exception | None]:
    """Fit the runs together; what went wrong with each, if anything did.

    Ctrl-C and SIGTERM are let in between steps, where the state of every run is that of the end of
    an epoch: one that came as it is brought up to the next would keep a mixture of the two.
    """
    failures: list[Exception | None] = [None] * len(runs)
    keeper = _Keeper(runs)
    told = 0.0

    def on_images(epoch: int, done: int) -> None:
        nonlocal told
        let_in()
        if time.monotonic() - told < 0.1:
            return
        told = time.monotonic()
        for run, failure in zip(runs, failures, strict=True):
            if failure is None:
                run.tell("images", epoch - 1, done)

    def on_epoch(i: int) -> None:
        keeper.epoch_done(i)
        history = runs[i].history
        runs[i].log.epoch(history[-1])
        runs[i].tell("epoch", len(history), elbo=history[-1]["test_elbo"])

    with held_back() as let_in:
        for run in runs:
            run.tell("start", run.first)
        # Adam's moments of pixels that are seldom lit decay into denormals: 100 cycles each.
        torch.set_flush_denormal(True)
        try:
            for i, run in enumerate(runs):
                try:
                    write_status(run.directory, run.config, "running", run.first)
                except DiskError as error:
                    failures[i] = error
            whole = [i for i, failure in enumerate(failures) if failure is None]
            fit_together(
                [runs[i].state for i in whole],
                runs[0].images,
                [recipe(runs[i].config) for i in whole],
                precision=runs[0].provenance["precision"],
                kernels=runs[0].provenance["kernels"],
                on_images=on_images,
                on_epoch=lambda member: on_epoch(whole[member]),
                on_failed=lambda member, error: failures.__setitem__(whole[member], error),
            )
        except Exception as error:
            failures = [failure or error for failure in failures]
        except BaseException:
            for i in range(len(runs)):
                # The last epoch of one whose disk is full is lost, and that of the others is not.
                with contextlib.suppress(DiskError):
                    keeper.write(i)
            raise
        finally:
            torch.set_flush_denormal(False)
        for i, run in enumerate(runs):
            if failures[i] is None and matrices_digest(run.state) == run.initial:
                failures[i] = NeverTrained(run.state.epoch, run.config.learning_rate)
            try:
                keeper.write(i, final=failures[i] is None)
            except DiskError as error:
                failures[i] = failures[i] or error
    return failures
