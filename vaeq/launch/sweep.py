"""What a sweep is before any of it runs: which runs are left to do, in what order, how they ended.

No torch in this module: a sweep whose runs are all finished must be over in a moment.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from vaeq.config import SCHEMA_VERSION, RunConfig, config_hash, run_name
from vaeq.errors import DiskError, InputError, RunsFailed, Taken
from vaeq.launch.progress import Event
from vaeq.memory import networks
from vaeq.runs.lock import RunLock
from vaeq.runs.record import (
    RECORD,
    RunRecord,
    complete_record,
    read_record,
    remove_temporaries,
    require_inside,
    require_writable,
    run_directory,
    write_config,
    write_record,
)
from vaeq.runs.schema import SchemaError

# Failed runs named in the closing sentence; the others were shown when they fell.
_NAMED = 5


@dataclass
class SweepResult:
    """Run names by how they ended, with the message of each failure."""

    complete: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def note(self, event: Event) -> None:
        """Take in the last word of a run; other events pass."""
        if event.kind == "complete":
            self.complete.append(event.run)
        elif event.kind == "skipped":
            self.skipped.append(event.run)
        elif event.kind == "failed":
            self.failed[event.run] = event.message

    def raise_failures(self) -> None:
        """One sentence for the failed runs; each one's own reason was shown when it fell."""
        if not self.failed:
            return
        total = len(self.complete) + len(self.skipped) + len(self.failed)
        names = ", ".join(list(self.failed)[:_NAMED])
        more = ", ..." if len(self.failed) > _NAMED else ""
        raise RunsFailed(
            f"{len(self.failed)} of {total} runs failed: {names}{more}. "
            "The same command tries them again."
        )


def work(config: RunConfig) -> float:
    """About how long a run takes, in multiplications: to start the longest first."""
    images = config.epochs * (config.data.n_train or 60_000)
    return float(sum(network.products for network in networks(config))) * images


def run_sweep(
    configs: Sequence[RunConfig],
    console: Console,
    execute: Callable[[list[RunConfig], SweepResult], None],
) -> SweepResult:
    """Hand what is not finished yet, longest first, to ``execute``, which notes how each run ended.

    Raises:
        InputError: the folder, the device or the data of some run cannot be used; nothing started.
    """
    runs = {run_directory(config): config for config in configs}
    todo: list[RunConfig] = []
    result = SweepResult()
    for config, record in zip(runs.values(), _complete_records(runs), strict=True):
        if record is None:
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
    for version, n in sorted(_other_versions(todo).items()):
        console.print(
            f"{n} of the runs to do lie beside one of the same axes of schema_version {version}; "
            f"it stays as it is: its numbers mean something else than those of {SCHEMA_VERSION}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if todo:
        execute(sorted(todo, key=work, reverse=True), result)
    return result


def _complete_records(runs: Mapping[Path, RunConfig]) -> list[RunRecord | None]:
    """The record of every run that is finished and sound: all their files are read and hashed."""
    # Hashing lets go of Python's lock, and many cores hash as fast as a disk reads.
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        return list(threads.map(complete_record, runs, runs.values()))
    finally:
        threads.shutdown(cancel_futures=True)


def _other_versions(configs: Sequence[RunConfig]) -> Counter[int]:
    """How many of these runs lie beside a record of the same axes under another schema version."""
    found: Counter[int] = Counter()
    folders: dict[Path, dict[str, list[Path]]] = {}
    for config in configs:
        directory = run_directory(config)
        parent = directory.parent
        if parent not in folders:
            beside = folders.setdefault(parent, {})
            for path in parent.iterdir() if parent.is_dir() else ():
                beside.setdefault(path.name.rpartition("-")[0], []).append(path)
        versions = set()
        for path in folders[parent].get(directory.name.rpartition("-")[0], ()):
            if path != directory:
                try:
                    read_record(path / RECORD)
                except SchemaError as error:
                    versions.add(error.version)
                except InputError:
                    pass
        found.update(versions)
    return found


def require_folders(configs: Sequence[RunConfig]) -> None:
    """Prove that the folders of all runs can be written, and lie in outputs."""
    for config in configs:
        require_inside(run_directory(config), Path(config.outputs))
    for folder in {run_directory(config).parent for config in configs}:
        require_writable(folder)


def ensembles(configs: Sequence[RunConfig], most: int) -> list[list[RunConfig]]:
    """The runs that can train as one program, at most so many in each.

    Members share the network but for its latent dimension, the batches and the number of steps;
    seed, β, warm-up and learning rate are their own. Those of a learning rate stand together.
    """
    groups: dict[str, list[RunConfig]] = {}
    own = ("latent_dim", "seed", "beta", "kl_warmup_epochs", "learning_rate", "early_stopping")
    for config in configs:
        shared = {name: v for name, v in asdict(config).items() if name not in (*own, "measure")}
        groups.setdefault(repr(shared), []).append(config)
    result = []
    for group in groups.values():
        group.sort(key=lambda config: config.learning_rate)
        result += [group[i : i + most] for i in range(0, len(group), most)]
    return result


def record_death(config: RunConfig, epoch: int, message: str, *, kind: str = "WorkerDied") -> bool:
    """Write the failure of a run whose process could not write it; its checkpoint stays.

    Returns:
        Whether it failed: not if its process had written a complete record before it died.
    """
    directory = run_directory(config)
    # Where another process is at it by now, or nothing can be written, it is told all the same.
    with contextlib.suppress(Taken, DiskError), RunLock(directory):
        if complete_record(directory, config) is not None:
            return False
        write_death(config, epoch, message, kind=kind)
    return True


def write_death(config: RunConfig, epoch: int, message: str, *, kind: str = "WorkerDied") -> None:
    """As :func:`record_death`, for one who holds the run's lock and knows that it failed."""
    directory = run_directory(config)
    remove_temporaries(directory)
    failure = {"type": kind, "message": message}
    write_config(directory, config)
    record = RunRecord("failed", asdict(config), config_hash(config), failure=failure)
    write_record(directory, record, epoch)
