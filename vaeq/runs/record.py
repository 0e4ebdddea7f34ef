"""A run on disk: which files, in which state, each written whole or not at all.

A run is complete if and only if its ``record.json`` is valid and says so, and every file it lists
is as it was written. No torch here: the report and the skipping of finished runs start at once.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import OmegaConf

from vaeq.config import SCHEMA_VERSION, RunConfig, config_hash, run_name
from vaeq.errors import DiskError, InputError, one_line
from vaeq.files.checksum import (
    BLANK,
    DamagedFile,
    UnreadableFile,
    check_seal,
    digest,
    file_digest,
    sealed,
)
from vaeq.files.foreign import require_regular
from vaeq.runs.schema import read_content

RECORD = "record.json"
STATUS = "status.json"
HISTORY = "history.csv"
CONFIG = "config.yaml"
CHECKPOINT = "checkpoint.safetensors"
# Held by the process that is at the run.
LOCK = ".lock"
SAMPLES = "samples.safetensors"
PICTURES = "pictures.safetensors"
# Beside the experiments: what their runs share and can make anew.
CACHE = ".cache"


@dataclass(frozen=True)
class RunRecord:
    """What a run found, with what it takes to trust and to repeat it."""

    state: str  # "complete" or "failed"
    config: dict[str, Any]
    config_hash: str
    provenance: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    estimates: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_dimension: dict[str, list[Any]] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, str] | None = None
    # SHA-256 of every other file of a complete run, but for status.json, which changes after it.
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def run_directory(config: RunConfig) -> Path:
    """``<outputs>/<experiment>/<axes>-<hash8>``; two configurations never share one."""
    return Path(config.outputs) / config.experiment / run_name(config)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    A temporary file in the same folder is written, flushed to the disk and renamed over ``path``.

    Raises:
        DiskError: it could not be written; the old content is still there.
    """
    write_together({path: content})


def write_together(files: Mapping[Path, bytes | str]) -> None:
    """Write several files, each whole or not at all, and in this order.

    All are on the disk under temporary names before the first is renamed: a full disk leaves the
    old ones, not some of either.

    Raises:
        DiskError: one of them could not be written.
    """
    suffix = f".{uuid.uuid4().hex}.tmp"
    temporaries = {path: path.with_name(f".{path.name}{suffix}") for path in files}
    path = next(iter(files))
    try:
        for path, content in files.items():
            with temporaries[path].open("xb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
        for path, temporary in temporaries.items():
            temporary.replace(path)
        for folder in {path.parent for path in files}:
            _flush(folder)
    except BaseException as error:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DiskError(path, error) from None
        raise


def _flush(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (FUSE, CIFS) flush files, and know no flushing of folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path, of: str = "*") -> None:
    """Remove what a killed writer of the files ``of`` left; no other may be writing them now."""
    for temporary in folder.glob(f".{of}.tmp"):
        with contextlib.suppress(OSError):
            temporary.unlink()


def require_writable(folder: Path) -> None:
    """Make ``folder`` and prove that files can be written there, before hours of training."""
    try:
        os.fsencode(folder).decode("utf-8")
    except UnicodeDecodeError:
        # Written they could be; but safetensors opens no file under such a name again.
        raise InputError(
            f"outputs={folder} is no UTF-8 text; choose another place with outputs=..."
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"outputs={folder} cannot be written ({error.strerror or error}); "
            "choose another place with outputs=..."
        ) from None


def require_inside(folder: Path, outputs: Path) -> None:
    """Prove that what is written into ``folder`` stays in ``outputs``, which itself may be a link.

    Raises:
        InputError: a link leads out of it.
    """
    if not (place := folder.resolve()).is_relative_to(outputs.resolve()):
        shown, top, place_shown = (one_line(str(path)) for path in (folder, outputs, place))
        raise InputError(
            f"{shown} is a link out of outputs={top}, to {place_shown}; remove it, or name that "
            "place with outputs=..."
        )


def lock(path: Path, timeout: float = -1) -> FileLock:
    """The lock that a file stands for; a link is refused, since locking empties what it names.

    Args:
        timeout: seconds to wait for it; negative: for ever.

    Raises:
        InputError: a link lies there.
    """
    if path.is_symlink():
        raise InputError(f"{one_line(str(path))} is a link, which no lock is; delete it.")
    return FileLock(path, timeout)


def write_status(directory: Path, config: RunConfig, state: str, epoch: int, **more: Any) -> None:
    """``status.json``: what a person or a report sees of a run that has no record yet."""
    status = _status(config_hash(config), state, epoch, config.epochs, **more)
    write_atomic(directory / STATUS, status)


def _status(owner: str, state: str, epoch: int, epochs: int, **more: Any) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    progress = {"state": state, "epoch": epoch, "epochs": epochs, "updated_at": now}
    return sealed(dump({"seal": BLANK, "config_hash": owner, **progress, **more}).encode())


def read_status(directory: Path, config: RunConfig) -> dict[str, Any]:
    """What :func:`write_status` wrote last for that run; empty where nothing of it is sound."""
    try:
        content = _regular_bytes(directory / STATUS)
        check_seal(content, config_hash(config))
        status: dict[str, Any] = json.loads(content)
    except (OSError, ValueError):
        return {}
    return status


def write_config(directory: Path, config: RunConfig) -> str:
    """``config.yaml``: the resolved settings. Returns its SHA-256."""
    head = f"# seal: {BLANK}\n# config_hash: {config_hash(config)}\n"
    settings = OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
    return write_listed(directory / CONFIG, sealed((head + settings).encode()))


def write_history(directory: Path, history: Sequence[Mapping[str, float]]) -> str:
    """``history.csv``: one row an epoch. Returns its SHA-256."""
    return write_listed(directory / HISTORY, _history_text(history).encode())


def _history_text(history: Sequence[Mapping[str, float]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return stream.getvalue()


def write_listed(path: Path, content: bytes) -> str:
    """Write a file that the record will list; returns the SHA-256 of what is meant to be in it."""
    write_atomic(path, content)
    return digest(content)


def write_record(directory: Path, record: RunRecord, epoch: int = 0) -> None:
    """``status.json`` after the run's last epoch and ``record.json``, which vouches for the others.

    It is the last file of a run: who finds a complete one finds nothing left to do in its folder.
    """
    content = {"seal": BLANK, **asdict(record)}
    more = {} if record.failure is None else {"failure": record.failure}
    if record.failure is None:
        del content["failure"]
    epochs = record.config.get("epochs", epoch)
    status = _status(record.config_hash, record.state, epoch, epochs, **more)
    text = sealed(dump(content).encode())
    write_together({directory / STATUS: status, directory / RECORD: text})


def read_record(path: Path) -> RunRecord:
    """Read and check a ``record.json``.

    Raises:
        SchemaError: it was written under another schema version.
        InputError: it cannot be read, does not match its checksum, is not JSON, or lacks or
            mistypes a key. The text says what is wrong and leaves the path to the caller: ``is
            empty: truncated or overwritten``.
    """
    content = read_content(path)
    del content["seal"]
    return RunRecord(**content)


def summary(record: RunRecord) -> str:
    """A finished run in one line."""

    def shown(name: str, decimals: int) -> str:
        value = record.estimates[name]["value"]
        return "not available" if value is None else f"{value:.{decimals}f}"

    return (
        f"ELBO {shown('elbo', 2)} nats, KL per dimension {shown('dimension_kl_mean', 4)}, "
        f"joint {shown('marginal_kl', 3)}, in {record.timing['total_seconds']:.0f} s"
    )


def complete_record(directory: Path, config: RunConfig) -> RunRecord | None:
    """The record of a finished run of exactly this configuration, all of whose files are sound."""
    try:
        record, damaged = inspect_run(directory, config)
    except InputError:
        return None
    return None if damaged else record


def inspect_run(directory: Path, config: RunConfig) -> tuple[RunRecord | None, dict[str, str]]:
    """The record of a finished run if there is one, and the files of the run that are not sound.

    A record vouches for every file it lists. Without one, ``config.yaml``, ``status.json`` and the
    checkpoint are held against their own checksums, and ``history.csv`` against the checkpoint;
    ``samples.safetensors`` and ``pictures.safetensors`` are then read by nobody.

    Returns:
        The record, if it is sound, complete and of this configuration; by name of the file, what
        is wrong with it.

    Raises:
        UnreadableFile: the system does not hand a file out.
    """
    owner = config_hash(config)
    try:
        record, damaged = _own_record(directory, owner)
        found = _unlisted(directory, owner) if record is None else _listed(directory, record)
        damaged |= dict(found) | dict(_unsealed(directory, STATUS, owner))
    except OSError as error:
        what = f"{error.filename} cannot be read ({error.strerror})"
        raise UnreadableFile(f"{what}; make it readable, or delete it.") from None
    return record, damaged


def read_listed(directory: Path, name: str, files: Mapping[str, str]) -> bytes:
    """The content of a file that a record lists, as it was written.

    Raises:
        DamagedFile: it is something else; the text names it and says what makes it again.
        OSError: it does not exist, is not listed, or cannot be read.
    """
    if name not in files:
        raise FileNotFoundError(f"{RECORD} lists no {name}")
    content = _regular_bytes(directory / name)
    if digest(content) != files[name]:
        raise DamagedFile(
            f"{directory / name} is not as {RECORD} lists it: damaged or replaced; "
            "the same vaeq train or sweep makes it again"
        )
    return content


def _regular_bytes(path: Path) -> bytes:
    """The content of a file; OSError where it is a pipe or a device, which may have no end."""
    require_regular(path)
    return path.read_bytes()


def _own_record(directory: Path, owner: str) -> tuple[RunRecord | None, dict[str, str]]:
    """The record of a run if it is sound, complete and its own, and what else is wrong with it."""
    path = directory / RECORD
    if not path.exists():
        return None, {}
    try:
        record = read_record(path)
        if record.config_hash != owner:
            raise DamagedFile("belongs to another run")
    except UnreadableFile as error:
        raise UnreadableFile(f"{path} {error}; make it readable, or delete it.") from None
    except InputError as error:
        return None, {RECORD: str(error)}
    return (record if record.state == "complete" else None), {}


def _listed(directory: Path, record: RunRecord) -> Iterator[tuple[str, str]]:
    """Files that are not those a record lists."""
    for name, expected in record.files.items():
        try:
            require_regular(directory / name)
            found = file_digest(directory / name)
        except FileNotFoundError:
            yield name, "is missing"
        else:
            if found != expected:
                yield name, f"is not as {RECORD} lists it: damaged or replaced"


def _unlisted(directory: Path, owner: str) -> Iterator[tuple[str, str]]:
    """Files of an unfinished run that contradict themselves or each other."""
    yield from _unsealed(directory, CONFIG, owner)
    damage = dict(_unsealed(directory, CHECKPOINT, owner))
    yield from damage.items()
    if not damage and not _history_agrees(directory):
        yield HISTORY, f"is damaged: it does not agree with {CHECKPOINT}"


def _unsealed(directory: Path, name: str, owner: str) -> Iterator[tuple[str, str]]:
    """The file of that name, if it is there and does not bear out its own checksum."""
    try:
        check_seal(_regular_bytes(directory / name), owner)
    except FileNotFoundError:
        pass
    except DamagedFile as error:
        yield name, str(error)


def _history_agrees(directory: Path) -> bool:
    """Does ``history.csv`` hold the history of the checkpoint, or of an earlier one?

    It is written after the checkpoint: a process that was killed in between leaves it behind.
    """
    if not (directory / CHECKPOINT).exists() or not (directory / HISTORY).exists():
        return True
    from safetensors import SafetensorError, safe_open

    found = _regular_bytes(directory / HISTORY)
    epochs = found.count(b"\n") - 1
    try:
        with safe_open(directory / CHECKPOINT, framework="numpy") as file:
            history = json.loads(file.metadata().get("history", "[]"))
        return not history or (epochs > 0 and found == _history_text(history[:epochs]).encode())
    except (SafetensorError, ValueError, TypeError, AttributeError):
        return True  # sealed, but no checkpoint of ours: whoever loads it says so


def columns(rows: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Rows of equal keys as one list a key."""
    result: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            result.setdefault(name, []).append(value)
    return result


def plain(value: Any) -> Any:
    """The same numbers as JSON can hold them: NaN and infinity become null, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def dump(content: Mapping[str, Any]) -> str:
    """The content as strict JSON text."""
    return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"
