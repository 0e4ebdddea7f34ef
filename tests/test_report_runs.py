"""Which runs count, and how every other one is named: corrupted records never stop a report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.report_fixtures import (
    LOG_N,
    config_of,
    default_sweep,
    estimates_of,
    record_of,
    write_json,
    write_run,
    write_status,
)
from vaeq.config import SCHEMA_VERSION
from vaeq.errors import InputError
from vaeq.files.checksum import BLANK, sealed
from vaeq.report.folders import newest_experiment
from vaeq.report.runs import read_runs
from vaeq.runs.record import read_record


def good_record() -> dict[str, Any]:
    numbers = {"kl": 6.6, "mi": 6.2, "dim": 0.1, "moment": 0.04, "active": 2, "elbo": -144.0}
    return record_of(config_of(2, 0), estimates_of(2, numbers))


def broken(change: str, value: Any) -> str:
    """A record's text with the entry at a dotted path replaced, or removed where value is None.

    It is still to be sealed.
    """
    record = {"seal": BLANK} | good_record()
    *path, last = change.split(".")
    place = record
    for name in path:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(record)


CORRUPTED = {
    "empty": ("", "is empty"),
    "truncated": (json.dumps(good_record())[:400], "truncated"),
    "no JSON": ("latent_dim: 2", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe\xfa{}", "not UTF-8"),
    "a list": ("[1, 2]", "a list where an object"),
    "null": ("null", "null where an object"),
    "NaN": (broken("estimates.elbo.value", math.nan), "NaN"),
    "Infinity": (broken("estimates.elbo.value", math.inf), "Infinity"),
    "overflow": (broken("estimates.elbo.value", 1).replace('"value": 1,', '"value": 1e999,'),
                 "no finite number or null for estimates.elbo.value"),
    "huge integer": (broken("estimates.elbo.value", 10**400), "estimates.elbo.value"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "no schema": (broken("schema_version", None), "no integer schema_version"),
    "true schema": (broken("schema_version", True), "no integer schema_version"),
    "no state": (broken("state", None), "lacks state"),
    "odd state": (broken("state", "done"), "state 'done'"),
    "no config": (broken("config", None), "lacks config"),
    "config a list": (broken("config", []), "a list for config"),
    "no latent_dim": (broken("config.latent_dim", None), "lacks config.latent_dim"),
    "latent_dim text": (broken("config.latent_dim", "2"), "text for config.latent_dim"),
    "seed true": (broken("config.seed", True), "a boolean for config.seed"),
    "no estimates": (broken("estimates", None), "lacks estimates"),
    "no files": (broken("files", None), "lacks files"),
    "file a number": (broken("files", {"a.b": 3}), "a number for files.a.b"),
    "file elsewhere": (broken("files", {"../a.b": "0"}), "lists ../a.b, which is no file"),
    "no digest": (broken("files", {"a.b": "0"}), "no SHA-256 for files.a.b"),
    "no seal": (json.dumps(good_record()), "has no checksum of its own"),
    "seal of other content": (json.dumps({"seal": "1" * 64} | good_record()).encode(),
                              "does not match its own checksum"),
    "empty estimates": (broken("estimates", {}), "has no estimates"),
    "estimate a number": (broken("estimates.elbo", -100.0), "estimates.elbo"),
    "value text": (broken("estimates.elbo.value", "-100"), "estimates.elbo.value"),
    "value true": (broken("estimates.elbo.value", True), "estimates.elbo.value"),
    "no unit": (broken("estimates.elbo.unit", None), "lacks estimates.elbo.unit"),
    "no error": (broken("estimates.elbo.std_error", None), "lacks estimates.elbo.std_error"),
    "negative error": (broken("estimates.elbo.std_error", -0.1), "negative"),
    "per_dimension": (broken("per_dimension.kl", 3), "per_dimension.kl"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_corrupted_record_is_named_with_the_reason_and_the_rest_goes_on(
    tmp_path: Path, name: str
) -> None:
    content, reason = CORRUPTED[name]
    write_run(tmp_path, 2)
    bad = tmp_path / "bad"
    bad.mkdir()
    data = content if isinstance(content, bytes) else content.encode()
    (bad / "record.json").write_bytes(sealed(data) if BLANK.encode() in data else data)
    with pytest.raises(InputError):
        read_record(bad / "record.json")
    runs, excluded = read_runs([tmp_path])
    assert len(runs) == 1
    assert [(run.name, run.kind) for run in excluded] == [("bad", "unreadable")]
    assert reason in excluded[0].reason
    assert "\n" not in excluded[0].reason


def test_the_sound_record_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "record.json", good_record())
    assert asdict(read_record(tmp_path / "record.json")).items() >= good_record().items()


def test_a_record_that_is_a_folder_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "run" / "record.json").mkdir(parents=True)
    _, excluded = read_runs([tmp_path])
    assert excluded[0].kind == "unreadable"
    assert "cannot be read" in excluded[0].reason


def test_another_schema_version_is_left_out_by_name(tmp_path: Path) -> None:
    write_json(tmp_path / "old" / "record.json", good_record() | {"schema_version": 0})
    write_run(tmp_path, 2)
    runs, excluded = read_runs([tmp_path])
    assert len(runs) == 1
    assert [(run.name, run.kind) for run in excluded] == [("old", "other schema")]
    assert "schema_version 0" in excluded[0].reason


def test_failed_and_unfinished_runs_say_what_happened_and_when(tmp_path: Path) -> None:
    failed = tmp_path / "a"
    failure = {"type": "TrainingDiverged", "message": "the loss is\nnot finite"}
    record = {
        "schema_version": SCHEMA_VERSION,
        "state": "failed",
        "config": config_of(2, 0),
        "config_hash": "",
    }
    write_json(failed / "record.json", record | {"failure": failure})
    write_status(failed, "failed", 3)
    (tmp_path / "b").mkdir()
    write_status(tmp_path / "b", "failed", 4, failure={"type": "OSError", "message": "disk full"})
    (tmp_path / "c").mkdir()
    write_status(tmp_path / "c", "running", 7)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "config.yaml").write_text("latent_dim: 2\n")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "status.json").write_text("{")
    (tmp_path / "f").mkdir()
    write_status(tmp_path / "f", "complete", 10)
    runs, excluded = read_runs([tmp_path])
    assert runs == []
    assert {run.name: (run.kind, run.reason) for run in excluded} == {
        "a": ("failed", "epoch 3 of 10, TrainingDiverged: the loss is not finite"),
        "b": ("failed", "epoch 4 of 10, OSError: disk full"),
        "c": ("unfinished", "epoch 7 of 10, last written 2025-01-01T00:00:00+00:00"),
        "d": ("unfinished", "not started: it has no status.json"),
        "e": ("unfinished", "status.json is damaged: it has no checksum of its own"),
        "f": ("unreadable", "status.json says complete, but there is no record.json"),
    }


def test_a_failed_record_without_details(tmp_path: Path) -> None:
    record = {
        "schema_version": SCHEMA_VERSION,
        "state": "failed",
        "config": {"epochs": 9},
        "config_hash": "",
    }
    write_json(tmp_path / "x" / "record.json", record | {"history": {"epoch": [1, 2]}})
    _, excluded = read_runs([tmp_path])
    assert excluded[0].reason == "epoch 2 of 9, no failure recorded"


def test_runs_are_found_down_to_three_levels_and_once(tmp_path: Path) -> None:
    deep = write_run(tmp_path / "a" / "b", 2)
    write_run(tmp_path / "a" / "b" / "c", 8)  # four levels down
    write_run(tmp_path / ".hidden", 8)
    runs, _ = read_runs([tmp_path, deep, tmp_path])
    assert [run.directory for run in runs] == [deep]
    assert runs[0].name == f"a/b/{deep.name}"
    assert read_runs([deep])[0][0].name == deep.name


def test_a_copy_in_another_experiment_does_not_pass_for_a_second_seed(tmp_path: Path) -> None:
    write_run(tmp_path / "one", 2)
    write_run(tmp_path / "two", 2, experiment="two", device="cuda", threads=4)
    write_run(tmp_path / "two", 2, seed=1)
    runs, excluded = read_runs([tmp_path])
    assert [run.seed for run in runs] == [0, 1]
    assert [run.kind for run in excluded] == ["duplicate"]
    assert runs[0].name in excluded[0].reason


@pytest.mark.parametrize("where", ["empty", "absent", "file"])
def test_no_runs_is_one_clear_sentence(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"runs=.*{where}") as error:
        read_runs([tmp_path / where])
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default_sweep(tmp_path / "open")
    (tmp_path / "shut").mkdir()
    scandir, listdir = os.scandir, os.listdir

    def refuse(path: Path) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied")
        return path

    def scan(path: Path) -> Iterator[os.DirEntry[str]]:
        return scandir(refuse(path))

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(os, "listdir", lambda path: listdir(refuse(path)))
    runs, excluded = read_runs([tmp_path])
    assert len(runs) == 3
    assert [(run.name, run.kind) for run in excluded] == [("shut", "unreadable")]
    assert "Permission denied" in excluded[0].reason


def test_the_number_of_images_is_read_or_follows_from_the_ceiling(tmp_path: Path) -> None:
    directory = write_run(tmp_path, 2)
    assert read_runs([tmp_path])[0][0].n_images == 60_000
    record = json.loads((directory / "record.json").read_text())
    del record["provenance"]
    write_json(directory / "record.json", record)
    assert read_runs([tmp_path])[0][0].n_images == round(math.exp(LOG_N))
    del record["estimates"]["mutual_information"]
    write_json(directory / "record.json", record)
    assert read_runs([tmp_path])[0][0].n_images is None


def test_the_newest_experiment_is_the_one_written_last(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first", 2), write_run(tmp_path / "second", 2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    for when, directory in enumerate((second, first)):
        for path in directory.iterdir():
            os.utime(path, (1e9 + when, 1e9 + when))
    assert newest_experiment(tmp_path) == tmp_path / "first"
    write_json(second / "status.json", {"state": "running"})
    assert newest_experiment(tmp_path) == tmp_path / "second"


@pytest.mark.parametrize("where", [".", "absent"])
def test_no_experiment_yet_is_one_clear_sentence(tmp_path: Path, where: str) -> None:
    (tmp_path / "reference").mkdir()
    with pytest.raises(InputError, match=r"no runs in .* yet; make some with: vaeq sweep"):
        newest_experiment(tmp_path / where)
