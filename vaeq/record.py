"""A run on disk: which files, in which state, each written whole or not at all.

A run is complete if and only if its ``record.json`` is valid and says so. No torch here: the report
and the skipping of finished runs must start at once.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vaeq.config import SCHEMA_VERSION, RunConfig, config_hash, run_name
from vaeq.errors import InputError
from vaeq.schema import read_content

RECORD = "record.json"
STATUS = "status.json"
HISTORY = "history.csv"
CONFIG = "config.yaml"
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
    schema_version: int = SCHEMA_VERSION


def run_directory(config: RunConfig) -> Path:
    """``<outputs>/<experiment>/<axes>-<hash8>``; two configurations never share one."""
    return Path(config.outputs) / config.experiment / run_name(config)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    A temporary file in the same folder is written, flushed to the disk and renamed over ``path``.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def require_writable(folder: Path) -> None:
    """Make ``folder`` and prove that files can be written there, before hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"outputs={folder} cannot be written ({error.strerror or error}); "
            "choose another place with outputs=..."
        ) from None


def write_status(directory: Path, state: str, epoch: int, epochs: int, **more: Any) -> None:
    """``status.json``: what a person or a report sees of a run that has no record yet."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    status = {"state": state, "epoch": epoch, "epochs": epochs, "updated_at": now, **more}
    write_atomic(directory / STATUS, dump(status))


def read_status(directory: Path) -> dict[str, Any]:
    """What :func:`write_status` wrote last; empty where nothing of it can be read."""
    try:
        content = json.loads((directory / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_config(directory: Path, config: RunConfig) -> None:
    """``config.yaml``: the resolved settings."""
    write_atomic(directory / CONFIG, OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def write_history(directory: Path, history: Sequence[Mapping[str, float]]) -> None:
    """``history.csv``: one row an epoch."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomic(directory / HISTORY, stream.getvalue())


def write_record(directory: Path, record: RunRecord) -> None:
    """``record.json``, the last file of a run."""
    content = asdict(record)
    if record.failure is None:
        del content["failure"]
    write_atomic(directory / RECORD, dump(content))


def read_record(path: Path) -> RunRecord:
    """Read and check a ``record.json``.

    Raises:
        SchemaError: it was written under another schema version.
        InputError: it cannot be read, is not JSON, or lacks or mistypes a key. The text says what
            is wrong and leaves the path to the caller: ``is empty: truncated or overwritten``.
    """
    return RunRecord(**read_content(path))


def summary(record: RunRecord) -> str:
    """A finished run in one line."""
    value = {name: entry["value"] for name, entry in record.estimates.items()}
    return (
        f"ELBO {value['elbo']:.2f} nats, KL per dimension {value['dimension_kl_mean']:.4f}, "
        f"joint {value['marginal_kl']:.3f}, in {record.timing['total_seconds']:.0f} s"
    )


def complete_record(directory: Path, config: RunConfig) -> RunRecord | None:
    """The record of a finished run of exactly this configuration, or None."""
    try:
        record = read_record(directory / RECORD)
    except InputError:
        return None
    matches = record.state == "complete" and record.config_hash == config_hash(config)
    return record if matches else None


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
