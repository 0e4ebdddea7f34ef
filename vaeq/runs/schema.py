"""What a record.json must hold, checked key by key before any of it is believed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaeq.config import SCHEMA_VERSION, RunConfig, keys_of
from vaeq.errors import InputError, one_line
from vaeq.files.checksum import DamagedFile, UnreadableFile, check_seal, is_sealed
from vaeq.files.foreign import read_bounded

# A record is some tens of kilobytes; a file of more than this was not written by vaeq.
LARGEST_RECORD = 64 * 2**20
# Empty lists and short texts take thirty times the memory of their JSON. The largest network has a
# histogram for each of 4096 dimensions; a hundred estimates and settings have a name each.
_MOST_PARTS = 100_000
_MOST_TEXTS = 200_000
_MOST_ENTRIES = 1000
# Levels of lists and objects; a record has six, and what walks them calls itself.
_DEEPEST, _TOO_DEEP = 20, "is nested too deeply to be a record"
# What float32 computes is below 1e39, and float64 holds the square of this.
_LARGEST_NUMBER = 1e100
_NAME = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
_FILE = re.compile(r"[a-z]{1,40}\.[a-z]{1,40}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTS = (
    "provenance",
    "timing",
    "history",
    "estimates",
    "per_dimension",
    "curves",
    "settings",
    "failure",
    "files",
)
_KNOWN = ("seal", "schema_version", "state", "config", "config_hash", *_PARTS)


_KEYS = keys_of(RunConfig)


class SchemaError(InputError):
    """A record written under another schema version: its numbers may mean something else."""

    def __init__(self, version: int) -> None:
        whose, remedy = "an older", "makes the run anew with the same vaeq train or sweep"
        if version > SCHEMA_VERSION:
            whose, remedy = "a newer", "must be updated to read it"
        super().__init__(
            f"has schema_version {version}, of {whose} vaeq; "
            f"this one reads {SCHEMA_VERSION} and {remedy}"
        )
        self.version = version


def read_content(path: Path) -> dict[str, Any]:
    """The content of a record.json, checked to have the keys and types others rely on.

    Raises:
        SchemaError: it was written under another schema version.
        UnreadableFile: the system does not hand it out.
        InputError: it does not match its checksum, is not JSON, or lacks or mistypes a key; the
            text says which.
    """
    try:
        text = read_bounded(path, LARGEST_RECORD)
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {error.strerror or error}") from None
    # Records of older versions have no checksum: their version must be read before it is asked for.
    has_seal = is_sealed(text)
    if has_seal:
        check_seal(text)
    if text.count(b"[") + text.count(b"{") > _MOST_PARTS or text.count(b'"') > 2 * _MOST_TEXTS:
        raise InputError("has more parts than any record")
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:  # far beyond what is asked for below, and not in every Python
        raise InputError(_TOO_DEEP) from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        what = "is empty" if not text else f"is not valid JSON ({error})"
        raise InputError(f"{what}: truncated or overwritten") from None
    except ValueError as error:
        raise InputError(f"is not valid JSON ({error})") from None
    except MemoryError:
        raise InputError("is larger than the free memory") from None
    if not isinstance(content, dict):
        raise InputError(f"holds {_type_words(content)} where an object is expected")
    _require_shallow(content)
    version = content.get("schema_version")
    if type(version) is not int:
        raise InputError("has no integer schema_version")
    if version != SCHEMA_VERSION:
        raise SchemaError(version)
    if not has_seal:
        raise DamagedFile("is damaged: it has no checksum of its own")
    _check_record(content)
    return content


def _require_shallow(content: dict[str, Any]) -> None:
    parts: list[Any] = [content]
    for _ in range(_DEEPEST):
        inner = (part.values() if isinstance(part, dict) else part for part in parts)
        parts = [each for values in inner for each in values if isinstance(each, dict | list)]
    if parts:
        raise InputError(_TOO_DEEP)


def _refuse_constant(token: str) -> None:
    raise ValueError(f"the token {token} is no JSON number")


def is_number(value: object) -> bool:
    """An int or float whose square a float can hold; True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER


def _type_words(value: object) -> str:
    for kind, words in ((dict, "an object"), (list, "a list"), (str, "text"), (bool, "a boolean")):
        if isinstance(value, kind):
            return words
    return "null" if value is None else "a number"


def _require(
    mapping: Mapping[str, Any], name: str, kind: type, words: str, prefix: str = ""
) -> Any:
    """``mapping[name]`` if it is there and of exactly that type."""
    if name not in mapping:
        raise InputError(f"lacks {prefix}{name}")
    value = mapping[name]
    if type(value) is not kind:
        raise InputError(f"has {_type_words(value)} for {prefix}{name}, where {words} is expected")
    return value


def _check_record(record: Mapping[str, Any]) -> None:
    """Raise InputError for the first key of a record that is missing or of the wrong type."""
    state = _require(record, "state", str, "text")
    if state not in ("complete", "failed"):
        raise InputError(f"has state {one_line(state, 40)!r}, where complete or failed is expected")
    config = _require(record, "config", dict, "an object")
    if not re.fullmatch("[0-9a-f]{0,64}", _require(record, "config_hash", str, "text")):
        raise InputError("has a config_hash that is no SHA-256")
    _check_settings(config)
    for name in record:
        if name not in _KNOWN:
            raise InputError(f"has an unknown part, {one_line(name, 40)}")
        if name in _PARTS:
            _require(record, name, dict, "an object")
    if state == "failed":
        return
    for name in ("latent_dim", "seed"):
        value, key = _require(config, name, int, "an integer", "config."), _KEYS[name][0]
        if not is_number(value) or not key.accepts(value):
            words = key.range_words("int")
            raise InputError(f"has another number for config.{name}, where {words} is expected")
    for name in _require(record, "files", dict, "an object"):
        if not _FILE.fullmatch(name):
            raise InputError(f"lists {one_line(name, 40)}, which is no file of a run")
        if not _DIGEST.fullmatch(_require(record["files"], name, str, "text", "files.")):
            raise InputError(f"has no SHA-256 for files.{name}")
    total = record.get("timing", {}).get("total_seconds")
    if total is not None and not is_number(total):
        raise InputError("has no finite number for timing.total_seconds")
    for name, entry in record.get("per_dimension", {}).items():
        if not isinstance(entry, list):
            raise InputError(f"has {_type_words(entry)} for per_dimension.{one_line(name)}")
    estimates = _require(record, "estimates", dict, "an object")
    if not estimates:
        raise InputError("is complete but has no estimates")
    if len(estimates) > _MOST_ENTRIES:
        raise InputError(f"has {len(estimates)} estimates")
    for name in estimates:
        _check_name("estimates", name)
        entry = _require(estimates, name, dict, "an object", "estimates.")
        _check_estimate(name, entry)
    _check_trained(record.get("history", {}))


def _check_trained(history: Mapping[str, Any]) -> None:
    """A result has epochs: without one nothing was trained, whatever the estimates are of."""
    epochs = history.get("epoch")
    if not isinstance(epochs, list) or not epochs or type(epochs[-1]) is not int or epochs[-1] < 1:
        raise InputError("is complete but has no epochs in its history: it never trained")


def _check_settings(config: Mapping[str, Any]) -> None:
    """Plain names, numbers that can be computed with, and sections one level deep."""
    sections = {"config": config}
    sections |= {f"config.{name}": v for name, v in config.items() if isinstance(v, dict)}
    if sum(map(len, sections.values())) > _MOST_ENTRIES:
        raise InputError("has more settings than any run")
    for section, values in sections.items():
        for name, value in values.items():
            _check_name(section, name)
            if isinstance(value, dict) and section != "config":
                raise InputError(f"has an object for {section}.{name}")
            if isinstance(value, int | float) and not (isinstance(value, bool) or is_number(value)):
                raise InputError(f"has no finite number for {section}.{name}")


def _check_name(part: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(f"has {one_line(name, 40)!r} in {part}, which is no name")


def _check_estimate(name: str, entry: Mapping[str, Any]) -> None:
    for part in ("value", "std_error"):
        if part not in entry:
            raise InputError(f"lacks estimates.{name}.{part}")
        number = entry[part]
        if number is not None and not is_number(number):
            raise InputError(f"has no finite number or null for estimates.{name}.{part}")
    if entry["std_error"] is not None and entry["std_error"] < 0:
        raise InputError(f"has a negative estimates.{name}.std_error")
    _require(entry, "unit", str, "text", f"estimates.{name}.")
    if not isinstance(entry.get("reason"), str | None):
        raise InputError(f"has {_type_words(entry['reason'])} for estimates.{name}.reason")
