"""A run under way: begun or resumed, its lock held, its files counted; or failed."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vaeq import __version__
from vaeq.config import RunConfig, config_hash, run_name
from vaeq.data.images import Images
from vaeq.errors import DiskError, VaeqError
from vaeq.experiment.preparation import build, prepare, step_kernels
from vaeq.files.checksum import DamagedFile
from vaeq.launch.progress import Event
from vaeq.runs.lock import RunLock
from vaeq.runs.record import (
    CACHE,
    CHECKPOINT,
    CONFIG,
    HISTORY,
    RunRecord,
    columns,
    complete_record,
    inspect_run,
    remove_temporaries,
    require_inside,
    require_writable,
    run_directory,
    write_config,
    write_listed,
    write_record,
)
from vaeq.trackers import Log
from vaeq.training.checkpoint import load_checkpoint
from vaeq.training.loop import State

Notify = Callable[[Event], None]


@dataclass(frozen=True)
class Run:
    """A run under way; its lock is held."""

    config: RunConfig
    directory: Path
    lock: RunLock
    images: Images
    provenance: dict[str, Any]
    notify: Notify
    history: list[dict[str, float]]  # one row an epoch, growing
    first: int  # epochs it had when this process took it up
    log: Log
    files: dict[str, str]  # SHA-256 of those written so far, for the record
    initial: str  # digest of the weights before the first step
    _state: State | None

    @property
    def state(self) -> State:
        """What is trained; ppca has none."""
        assert self._state is not None
        return self._state

    @property
    def name(self) -> str:
        return run_name(self.config)

    def keep(self, name: str, content: bytes) -> None:
        """Write one of its files, which its record will list.

        Raises:
            DiskError: it cannot be written, or the folder is not this run's any more.
        """
        self.lock.require_held()
        self.files[name] = write_listed(self.directory / name, content)

    def tell(self, kind: str, epoch: int, done: int = 0, elbo: float | None = None) -> None:
        """An event of training, ``done`` images into the epoch after ``epoch``."""
        n = len(self.images.train)
        seen, total = (epoch - self.first) * n + done, (self.config.epochs - self.first) * n
        shown = epoch + 1 if done else epoch
        self.notify(Event(kind, self.name, shown, self.config.epochs, seen, total, elbo))


def begin(config: RunConfig, notify: Notify, threads: int, locks: ExitStack) -> RunRecord | Run:
    """The record of a finished run, or the run, locked, at its last epoch on disk.

    Raises:
        Taken: another process is at the run.
        InputError: the device, the data or the folder of its experiment cannot be used.
        DiskError: its own folder cannot be written.
    """
    directory = run_directory(config)
    found = complete_record(directory, config)
    if found is not None:
        # Who begins runs has sorted out what was finished.
        notify(Event("skipped", run_name(config), message="finished by another process"))
        return found
    precision, images = prepare(config)
    for folder in (directory, directory.parent, Path(config.outputs) / CACHE):
        require_inside(folder, Path(config.outputs))
    require_writable(directory.parent)
    lock = locks.enter_context(RunLock(directory))
    # Another process may have finished it before this one had the lock.
    found, damaged = inspect_run(directory, config)
    if found is not None and not damaged:
        notify(Event("skipped", run_name(config), message="finished by another process"))
        return found
    if lock.by_file:
        words = "its file system has no flock: do not run it on two machines at once"
        notify(Event("note", run_name(config), message=words))
    remove_temporaries(directory)
    state = build(config, images) if config.model != "ppca" else None
    initial = matrices_digest(state) if state is not None else ""
    if state is not None:
        state = _resume(config, directory, images, state, damaged)
    history = state.history if state is not None else []
    if damaged:
        notify(Event("note", run_name(config), message=_damage_words(damaged, len(history))))
    # The record of a damaged run stays until a new one takes its place, but vouches for none of the
    # files that are written from here on: one that is killed goes on from its checkpoint.
    files = {CONFIG: write_config(directory, config)}
    if not history:
        # Of a training that is over; it would contradict the checkpoints to come.
        (directory / HISTORY).unlink(missing_ok=True)
    kernels = step_kernels(config, images.train.device)
    provenance = _provenance(images, precision, kernels, threads)
    log = Log(config, history, lambda text: notify(Event("note", run_name(config), message=text)))
    locks.callback(log.close)
    first = len(history)
    return Run(
        config,
        directory,
        lock,
        images,
        provenance,
        notify,
        history,
        first,
        log,
        files,
        initial,
        state,
    )


def _resume(
    config: RunConfig, directory: Path, images: Images, state: State, damaged: dict[str, str]
) -> State:
    """``state`` at the last epoch on disk, or at the beginning; why so, in ``damaged``."""
    try:
        load_checkpoint(directory, state, config_hash(config))
    except DamagedFile as error:
        damaged.setdefault(CHECKPOINT, str(error).removeprefix(f"{directory / CHECKPOINT} "))
        return build(config, images)
    return state


def matrices_digest(state: State) -> str:
    """SHA-256 of the weights, without the biases: those begin at 0 and any step moves them."""
    found = hashlib.sha256()
    for value in state.vae.parameters():
        if value.ndim > 1:
            found.update(value.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def _damage_words(damaged: dict[str, str], epochs: int) -> str:
    """One line: which files are not sound, and what becomes of the run."""
    words = "; ".join(f"{name} {what.removesuffix('.')}" for name, what in damaged.items())
    remedy = f"goes on from its checkpoint at epoch {epochs}" if epochs else "is trained again"
    return f"{words}. The run {remedy}."


def _provenance(images: Images, precision: str, kernels: str, threads: int) -> dict[str, Any]:
    device = images.train.device
    return {
        "vaeq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.machine(),
        "precision": precision,
        "kernels": kernels,
        "threads": threads,
        "data": {
            "name": images.name,
            "md5": images.md5,
            "n_train": len(images.train),
            "n_test": len(images.test),
        },
    }


def fail(run: Run, error: Exception) -> None:
    """Leave word of a failure where the report and the next sweep look for it."""
    kind = type(error).__name__
    expected = isinstance(error, VaeqError)
    failure = {"type": kind, "message": str(error) if expected else f"{kind}: {error}"}
    if not expected:
        failure["traceback"] = "".join(traceback.format_exception(error))
    record = RunRecord(
        "failed",
        asdict(run.config),
        config_hash(run.config),
        run.provenance,
        history=columns(run.history),
        failure=failure,
    )
    # Where nothing can be written, the run is no less failed: it has no record, and is tried again.
    with contextlib.suppress(DiskError):
        run.lock.require_held()
        write_record(run.directory, record, len(run.history))
