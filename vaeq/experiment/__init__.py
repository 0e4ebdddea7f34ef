"""Sweep points, end to end: the only place that joins data, models and measures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from vaeq.config import RunConfig, identified, run_name
from vaeq.errors import Taken, VaeqError
from vaeq.experiment.measuring import estimates_of, finish, measure_ppca, measure_together
from vaeq.experiment.preparation import build, prepare, recipe
from vaeq.experiment.training import train
from vaeq.experiment.under_way import Notify, Run, begin, fail
from vaeq.launch.progress import Event
from vaeq.memory import TOGETHER
from vaeq.runs.record import RunRecord

__all__ = ["build", "estimates_of", "prepare", "recipe", "run", "run_ensemble"]

# Seconds between two looks at a run that another process is at.
_LOOK = 1.0


def run(config: RunConfig, notify: Notify, threads: int, *, wait: bool = True) -> RunRecord:
    """Train, measure and record one configuration, or return the record it already has.

    A run that was stopped goes on from its last epoch on disk. A failure is recorded and raised.

    Args:
        notify: receives an Event a step; it must be quick.
        threads: CPU threads of this process; part of what makes weights bit-identical.
        wait: for another process that is at the run, to take it up where that leaves it.

    Raises:
        InputError: the device, the data or the folder cannot be used; nothing is written.
        Taken: another process is at the run, and ``wait`` is false.
        TrainingDiverged: the loss is not finite; the run is recorded as failed.
        DiskError: a file cannot be written; the run is recorded as failed, if that can be written.
    """
    (ending,) = run_ensemble([config], notify, threads)
    if wait and isinstance(ending, Taken):
        notify(Event("note", run_name(config), message="another process is at it; waiting for it"))
        while isinstance(ending, Taken):
            time.sleep(_LOOK)
            (ending,) = run_ensemble([config], notify, threads)
    if isinstance(ending, Exception):
        raise ending
    return ending


def run_ensemble(
    configs: Sequence[RunConfig], notify: Notify, threads: int
) -> list[RunRecord | Exception]:
    """Train runs of one shape as one program, then measure and record each as if it were alone.

    Finished ones are skipped; half-trained ones go on, those at the same epoch together, and those
    of model=conv one after the other. A member that fails is recorded, and the others go on; one
    that another process is at is left to it.

    Args:
        configs: of one network but for latent_dim, and one data, batch_size, epochs, warm-up of
            the learning rate, schedule, precision and device; see ``vaeq.launch.sweep.ensembles``.

    Returns:
        The record of each, or why it has none: Taken where another process is at it.
    """
    configs = identified(configs)
    torch.set_num_threads(threads)
    endings: list[RunRecord | Exception | None] = [None] * len(configs)
    with ExitStack() as locks:
        runs: dict[int, Run] = {}
        for i, config in enumerate(configs):
            try:
                begun: Run | RunRecord = begin(config, notify, threads, locks)
            except VaeqError as error:
                endings[i] = error
                continue
            if isinstance(begun, RunRecord):
                endings[i] = begun
            else:
                runs[i] = begun
        for i, one in runs.items():
            if one.config.model == "ppca":
                endings[i] = finish(one, partial(measure_ppca, one))
        networks = {i: one for i, one in runs.items() if endings[i] is None}
        for together in _programs(networks):
            failures = dict(zip(together, train(list(together.values())), strict=True))
            for i, failure in failures.items():
                if failure is not None:
                    fail(runs[i], failure)
                    endings[i] = failure
            trained = [i for i in together if failures[i] is None]
            for start in range(0, len(trained), TOGETHER):
                some = trained[start : start + TOGETHER]
                for i, ending in zip(some, measure_together([runs[i] for i in some]), strict=True):
                    endings[i] = ending
    return [ending for ending in endings if ending is not None]


def _programs(runs: dict[int, Run]) -> list[dict[int, Run]]:
    """Runs that take their steps together: at the same epoch, and convolutions by themselves."""
    found: dict[tuple[int, int], dict[int, Run]] = {}
    for i, one in runs.items():
        alone = i if one.config.model == "conv" else -1
        found.setdefault((one.first, alone), {})[i] = one
    return [found[key] for key in sorted(found)]
