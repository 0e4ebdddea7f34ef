"""Records of other schema versions: every command says so, none takes their numbers for its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, Run
from vaeq.config import SCHEMA_VERSION, RunConfig, SampleConfig
from vaeq.errors import InputError
from vaeq.experiment import run
from vaeq.files.checksum import BLANK, sealed
from vaeq.generation.sample import sample
from vaeq.launch.progress import Event
from vaeq.runs.record import RECORD, complete_record, inspect_run, read_record, run_directory
from vaeq.runs.schema import SchemaError

OTHERS = (1, 2, 99)


def as_version(content: bytes, version: int) -> bytes:
    """A record as the vaeq of that version writes it: the first two had neither seal nor files."""
    record: dict[str, Any] = json.loads(content) | {"schema_version": version}
    if version > SCHEMA_VERSION:
        future = record | {"seal": BLANK, "files": ["a list by then"], "novelty": {"x": 1}}
        return sealed(json.dumps(future).encode())
    del record["seal"], record["files"]
    # A text of 64 digits that is no seal: the checksum of the digit classifier.
    record["settings"] |= {"generation": {"classifier": {"checksum": "a" * 64}}}
    return json.dumps(record, indent=1).encode()


def words(version: int) -> str:
    if version < SCHEMA_VERSION:
        remedy = "makes the run anew with the same vaeq train or sweep"
        return f"has schema_version {version}, of an older vaeq; this one reads 3 and {remedy}"
    return f"has schema_version {version}, of a newer vaeq; this one reads 3 and must be updated"


@pytest.mark.parametrize("version", OTHERS)
def test_a_record_of_another_version_in_a_run_s_own_folder(tiny: RunConfig, version: int) -> None:
    fresh = run(tiny, lambda event: None, threads=1)
    directory = run_directory(tiny)
    path = directory / RECORD
    path.write_bytes(as_version(path.read_bytes(), version))
    with pytest.raises(SchemaError) as error:
        read_record(path)
    assert str(error.value).startswith(words(version))
    assert error.value.version == version
    with pytest.raises(InputError, match=rf"no finished run: record\.json {words(version)}") as no:
        sample(SampleConfig(run=str(directory)))
    assert "\n" not in str(no.value)
    assert complete_record(directory, tiny) is None
    assert list(inspect_run(directory, tiny)[1]) == [RECORD]
    events: list[Event] = []
    again = run(tiny, events.append, threads=1)
    assert events[0].kind == "note"
    assert events[0].message.startswith(f"{RECORD} {words(version)}")
    assert again.estimates == fresh.estimates
    assert complete_record(directory, tiny) == again


@pytest.mark.parametrize("version", OTHERS)
def test_damage_to_a_sealed_record_is_not_taken_for_another_version(
    tiny: RunConfig, version: int
) -> None:
    run(tiny, lambda event: None, threads=1)
    path = run_directory(tiny) / RECORD
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b'"schema_version": 3', f'"schema_version": {version}'.encode())
    )
    assert path.read_bytes() != content
    with pytest.raises(InputError, match="is damaged: it does not match its own checksum"):
        read_record(path)


def test_runs_of_other_versions_lie_beside_and_are_named(vaeq: Run, tmp_path: Path) -> None:
    vaeq("sweep", *TINY, "latent_dim=2", check=True)
    folder = tmp_path / "outputs" / "smoke"
    (own,) = folder.iterdir()
    content = (own / RECORD).read_bytes()
    axes = own.name.rpartition("-")[0]
    for version in OTHERS:
        beside = folder / f"{axes}-{version:08x}"
        beside.mkdir()
        (beside / RECORD).write_bytes(as_version(content, version))
    before = {path: path.read_bytes() for path in folder.glob("*-000000*/*")}
    assert len(before) == 3

    report = vaeq("report", "runs=outputs/smoke", COLUMNS="500", check=True).stdout
    assert "4 runs: 1 complete, 3 of another schema version" in report
    for version in OTHERS:
        assert f"{axes}-{version:08x} (other schema): {RECORD} {words(version)}" in report

    # Finished runs need no word; one that is to do says what lies beside it, and leaves it there.
    assert "schema_version" not in vaeq("sweep", *TINY, "latent_dim=2", check=True).stdout
    (own / RECORD).unlink()
    sweep = vaeq("sweep", *TINY, "latent_dim=2,3", check=True).stdout
    for version in OTHERS:
        line = f"1 of the runs to do lie beside one of the same axes of schema_version {version}; "
        assert sweep.count(line) == 1
    assert before == {path: path.read_bytes() for path in folder.glob("*-000000*/*")}
    assert (own / RECORD).exists()
