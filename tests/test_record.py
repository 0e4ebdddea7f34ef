"""Files: whole or absent, checked when read, complete only when they say so."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vaeq.config import RunConfig, config_hash
from vaeq.errors import InputError
from vaeq.files.checksum import BLANK, sealed
from vaeq.runs.record import (
    RECORD,
    RunRecord,
    complete_record,
    read_record,
    require_writable,
    run_directory,
    write_atomic,
    write_config,
    write_history,
    write_record,
    write_status,
)


@pytest.fixture
def record() -> RunRecord:
    return RunRecord(
        "complete",
        {"latent_dim": 2, "seed": 0},
        config_hash(RunConfig()),
        history={"epoch": [1], "test_elbo": [-101.0]},
        estimates={"elbo": {"value": -100.0, "std_error": 0.1, "unit": "nats"}},
        per_dimension={"kl": [0.1, 0.2]},
    )


def test_a_record_comes_back_as_it_was(tmp_path: Path, record: RunRecord) -> None:
    write_record(tmp_path, record)
    assert read_record(tmp_path / RECORD) == record


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path, record: RunRecord) -> None:
    history = {"epoch": [1, 2], "test_elbo": [float("nan"), 1.0]}
    write_record(tmp_path, replace(record, history=history))
    text = (tmp_path / RECORD).read_text()
    assert "NaN" not in text
    assert read_record(tmp_path / RECORD).history == {"epoch": [1, 2], "test_elbo": [None, 1.0]}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda c: c.pop("estimates"), "lacks estimates"),
        (lambda c: c.update(config=3), "a number for config"),
        (lambda c: c.update(state="done"), "state 'done'"),
        (lambda c: c.update(schema_version=99), "schema_version 99"),
        (lambda c: c.update(surprise=1), "unknown part, surprise"),
        (lambda c: c["estimates"]["elbo"].pop("unit"), r"lacks estimates\.elbo\.unit"),
        (
            lambda c: c["estimates"]["elbo"].update(value="x"),
            r"no finite number or null for estimates\.elbo\.value",
        ),
        (lambda c: c["estimates"]["elbo"].update(value=True), "no finite number"),
        (lambda c: c["per_dimension"].update(kl=1), r"a number for per_dimension\.kl"),
    ],
)
def test_a_damaged_record_is_named_with_its_reason(
    tmp_path: Path, record: RunRecord, damage: Any, reason: str
) -> None:
    write_record(tmp_path, record)
    content = json.loads((tmp_path / RECORD).read_text())
    damage(content)
    (tmp_path / RECORD).write_bytes(sealed(json.dumps(content | {"seal": BLANK}).encode()))
    with pytest.raises(InputError, match=reason):
        read_record(tmp_path / RECORD)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b"1e999" * 3],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(InputError):
        read_record(tmp_path / RECORD)


def test_complete_means_a_valid_record_of_this_very_configuration(
    tmp_path: Path, record: RunRecord
) -> None:
    config = RunConfig()
    assert complete_record(tmp_path, config) is None
    write_record(tmp_path, record)
    assert complete_record(tmp_path, config) == record
    assert complete_record(tmp_path, replace(config, seed=1)) is None
    write_record(tmp_path, replace(record, state="failed"))
    assert complete_record(tmp_path, config) is None
    content = (tmp_path / RECORD).read_bytes()
    (tmp_path / RECORD).write_bytes(content[:-10])
    assert complete_record(tmp_path, config) is None


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_atomic(file, "a" * 100_000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for letter in "ab":
                write_atomic(file, letter * 100_000)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [file.read_text() for _ in range(300)]
    finally:
        stop.set()
        writer.join()
    assert all(len(text) == 100_000 and len(set(text)) == 1 for text in seen)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f"
    write_atomic(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_files_have_the_permissions_of_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "f", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*with outputs="):
        require_writable(tmp_path / "file" / "outputs")
    require_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []


def test_small_files_are_readable_by_people_and_programs(tmp_path: Path) -> None:
    write_status(tmp_path, RunConfig(epochs=10), "running", 3)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["epoch"], status["epochs"]) == ("running", 3, 10)
    assert status["updated_at"].endswith("+00:00")
    write_history(tmp_path, [{"epoch": 1, "test_elbo": -2.5}, {"epoch": 2, "test_elbo": -2.0}])
    assert (tmp_path / "history.csv").read_text() == "epoch,test_elbo\n1,-2.5\n2,-2.0\n"
    write_config(tmp_path, RunConfig(latent_dim=7))
    assert "latent_dim: 7\n" in (tmp_path / "config.yaml").read_text()


def test_the_directory_is_named_by_experiment_axes_and_hash() -> None:
    config = RunConfig(latent_dim=8, experiment="finding", outputs="out")
    directory = run_directory(config)
    assert directory.parent == Path("out/finding")
    assert directory.name.startswith("latent_dim=8,encoder_depth=2,encoder_width=500,seed=0-")
