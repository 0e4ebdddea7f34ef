"""Reading run folders: which runs are complete, and why the others are not."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vaeq.config import SweepConfig
from vaeq.errors import InputError, one_line
from vaeq.estimate import Estimate
from vaeq.files.checksum import DamagedFile, check_seal
from vaeq.files.foreign import read_bounded
from vaeq.report.folders import MAKE_SOME, SEARCH_DEPTH, find_runs
from vaeq.runs.record import RECORD, STATUS, RunRecord, read_record
from vaeq.runs.schema import SchemaError

Scalar = str | int | float | bool | None
# A status is a few lines, with the traceback of a failure at most.
_LARGEST_STATUS = 2**20
Kind = Literal["failed", "unfinished", "unreadable", "other schema", "duplicate"]


@dataclass(frozen=True)
class Run:
    """A complete run: its settings, its seed and what was measured."""

    name: str
    directory: Path
    settings: Mapping[str, Scalar]
    seed: int
    experiment: str
    estimates: Mapping[str, Estimate]
    per_dimension: Mapping[str, Sequence[Any]] = field(default_factory=dict, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)
    seconds: float | None = None
    history: Mapping[str, Sequence[Any]] = field(default_factory=dict, repr=False)
    curves: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config_hash: str = ""
    # SHA-256 of the files beside the record, which are believed if they match.
    files: Mapping[str, str] = field(default_factory=dict, repr=False)

    def value(self, metric: str) -> float | None:
        """The value of a metric, or None where the record has no number for it."""
        estimate = self.estimates.get(metric)
        return None if estimate is None else estimate.value

    @property
    def n_images(self) -> int | None:
        """N, the number of components of the aggregated posterior, where the record tells."""
        data = self.provenance.get("data")
        n = data.get("n_train") if isinstance(data, dict) else None
        if isinstance(n, int) and not isinstance(n, bool) and n > 0:
            return n
        information = self.value("mutual_information")
        fraction = self.value("mutual_information_fraction")
        if not information or not fraction or not 0 < information / fraction < 50:
            return None
        return round(math.exp(information / fraction))


@dataclass(frozen=True)
class Excluded:
    """A run, or what is left of one, that is not in the table, and why."""

    name: str
    directory: Path
    kind: Kind
    reason: str


def read_runs(roots: Sequence[Path]) -> tuple[list[Run], list[Excluded]]:
    """Every run under the folders: the complete ones and, named, all others.

    Of two complete runs of the same configuration and seed the first counts; a copy in a second
    experiment folder would otherwise pass for a second seed.

    Raises:
        InputError: a folder does not exist, or none of them holds a run.
    """
    runs: list[Run] = []
    excluded: list[Excluded] = []
    first: dict[tuple[object, ...], Run] = {}
    found = False
    for name, directory in find_runs(roots):
        found = True
        try:
            run = _read_run(name, directory)
        except OSError as error:
            run = Excluded(name, directory, "unreadable", f"cannot be read: {error.strerror}")
        if isinstance(run, Excluded):
            excluded.append(run)
            continue
        identity = (*sorted(run.settings.items()), run.seed)
        if identity in first:
            reason = f"same configuration and seed as {first[identity].name}, which is counted"
            excluded.append(Excluded(name, directory, "duplicate", reason))
            continue
        first[identity] = run
        runs.append(run)
    if not found:
        where = ", ".join(str(root) for root in roots) or "no folder"
        raise InputError(
            f"runs={where}: no runs there (searched {SEARCH_DEPTH} levels deep); {MAKE_SOME}"
        )
    return runs, excluded


def _read_run(name: str, directory: Path) -> Run | Excluded:
    path = directory / RECORD
    os.listdir(directory)  # raises OSError where the directory is closed to us
    if not path.exists():
        return _without_record(name, directory)
    try:
        record = read_record(path)
    except SchemaError as error:
        return Excluded(name, directory, "other schema", f"{RECORD} {error}")
    except InputError as error:
        return Excluded(name, directory, "unreadable", f"{RECORD} {error}")
    if _foreign(directory, record.config_hash):
        return Excluded(name, directory, "unreadable", f"{RECORD} belongs to another run")
    if record.state == "failed":
        status, problem = _read_status(directory)
        reason = _failure_words(record.failure)
        progress = _progress(status) or _last_epoch(record)
        words = ", ".join(filter(None, (progress, reason, problem)))
        return Excluded(name, directory, "failed", words)
    config = flatten(record.config)
    seconds = record.timing.get("total_seconds")
    return Run(
        name=name,
        directory=directory,
        settings={key: _plain(value) for key, value in config.items() if key not in _SET_APART},
        seed=record.config["seed"],
        experiment=one_line(str(config.get("experiment", "")), 100),
        estimates={key: _estimate(entry) for key, entry in record.estimates.items()},
        per_dimension=record.per_dimension,
        provenance=record.provenance,
        seconds=float(seconds) if seconds is not None else None,
        history=record.history,
        curves=record.curves,
        config_hash=record.config_hash,
        files=record.files,
    )


def _without_record(name: str, directory: Path) -> Excluded:
    status, problem = _read_status(directory)
    if status is None:
        reason = problem or f"not started: it has no {STATUS}"
        return Excluded(name, directory, "unfinished", reason)
    state, progress = status.get("state"), _progress(status)
    if state == "failed":
        reason = ", ".join(filter(None, (progress, _failure_words(status.get("failure")))))
        return Excluded(name, directory, "failed", reason)
    if state == "complete":
        reason = f"{STATUS} says complete, but there is no {RECORD}"
        return Excluded(name, directory, "unreadable", reason)
    updated = status.get("updated_at")
    when = f"last written {one_line(updated, 40)}" if isinstance(updated, str) else ""
    reason = ", ".join(filter(None, (progress or "no epoch finished", when)))
    return Excluded(name, directory, "unfinished", reason)


def _read_status(directory: Path) -> tuple[dict[str, Any] | None, str]:
    """The content of status.json, or None and what is wrong with it, if it is there."""
    try:
        text = read_bounded(directory / STATUS, _LARGEST_STATUS)
        check_seal(text)
        status = json.loads(text)
        if not isinstance(status, dict) or _foreign(directory, status.get("config_hash")):
            raise DamagedFile("belongs to another run")
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{STATUS} cannot be read: {error.strerror}"
    except DamagedFile as error:
        return None, f"{STATUS} {error}"
    except InputError as error:
        return None, f"{STATUS} {error}"
    except (ValueError, RecursionError):
        return None, f"{STATUS} is not valid JSON"
    return status, ""


def _foreign(directory: Path, config_hash: object) -> bool:
    """Is this the hash of another configuration than the folder's name tells?

    A folder that was given another name tells none.
    """
    told = re.search(r"-([0-9a-f]{8})$", directory.name or directory.resolve().name)
    return told is not None and not str(config_hash).startswith(told[1])


def _progress(status: Mapping[str, Any] | None) -> str:
    """``epoch 3 of 10``, or nothing where the status does not say."""
    epoch, total = (status.get(name) if status else None for name in ("epoch", "epochs"))
    if not _is_count(epoch):
        return ""
    return f"epoch {epoch}" + (f" of {total}" if _is_count(total) else "")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**9


def _last_epoch(record: RunRecord) -> str:
    epochs = record.history.get("epoch")
    if not isinstance(epochs, list) or not epochs:
        return ""
    return _progress({"epoch": epochs[-1], "epochs": record.config.get("epochs")})


def _failure_words(failure: object) -> str:
    if not isinstance(failure, dict):
        return "no failure recorded"
    parts = (failure.get("type"), failure.get("message"))
    words = ": ".join(one_line(part) for part in parts if isinstance(part, str) and part)
    return words or "no failure recorded"


def _estimate(entry: Mapping[str, Any]) -> Estimate:
    value, error, unit = entry["value"], entry["std_error"], one_line(entry["unit"], 40)
    if value is None:
        reason = one_line(entry.get("reason") or "")
        return Estimate(None, None, unit, reason or "no reason recorded")
    return Estimate(float(value), None if error is None else float(error), unit)


def _plain(value: Scalar) -> Scalar:
    """A setting whose text cannot act on a terminal or break a line of a table."""
    return one_line(value) if isinstance(value, str) else value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """A nested config as ``{"data.name": "mnist", ...}``; a list becomes its JSON text."""
    flat: dict[str, Scalar] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, str | int | float):
            flat[prefix + name] = value
        else:
            flat[prefix + name] = json.dumps(value)
    return flat


def _not_science(config: type, prefix: str = "") -> Iterator[str]:
    """Settings that change no number of a run: runs that differ in these alone are the same."""
    for item in dataclasses.fields(config):
        spec = item.metadata.get("key")
        if spec is not None and not spec.science:
            yield prefix + item.name
        elif dataclasses.is_dataclass(item.default_factory):
            yield from _not_science(item.default_factory, f"{prefix}{item.name}.")


# The seed makes no configuration of its own either: it is what a configuration is averaged over.
_SET_APART = frozenset(_not_science(SweepConfig)) | {"seed"}
