"""Damage to any byte of any file of a run is found, named and made good, to the same bits."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from tests.conftest import TINY
from tests.conftest import Run as Vaeq
from tests.soak import SOAK, times
from vaeq.config import DataConfig, GenerationConfig, MeasureConfig, RunConfig
from vaeq.errors import InputError
from vaeq.experiment import run, run_ensemble
from vaeq.files.checksum import DamagedFile
from vaeq.generation.sample import load_decoder
from vaeq.launch.progress import Event
from vaeq.report.figures.sources import read_pictures, read_samples
from vaeq.report.runs import Run, read_runs
from vaeq.runs import record as record_module
from vaeq.runs.record import (
    CHECKPOINT,
    CONFIG,
    HISTORY,
    PICTURES,
    RECORD,
    SAMPLES,
    STATUS,
    RunRecord,
    complete_record,
    inspect_run,
    read_record,
    run_directory,
)

FINISHED = (RECORD, STATUS, CONFIG, HISTORY, CHECKPOINT, SAMPLES, PICTURES)
HALF_TRAINED = (STATUS, CONFIG, HISTORY, CHECKPOINT)
KINDS = ("flipped", "zeroed", "truncated", "extended", "swapped")
# How every corruption of this session ended.
ENDINGS: Counter[str] = Counter()


@dataclass(frozen=True)
class Kept:
    """A run on disk as it was left, another's files, and what the run comes to undisturbed."""

    config: RunConfig
    files: dict[str, bytes]
    foreign: dict[str, bytes]
    outcome: dict[str, Any]

    def restore(self) -> Path:
        directory = run_directory(self.config)
        for path in directory.iterdir():
            path.unlink()
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".lock"}


def arrays(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load(path.read_bytes()).items()}


def outcome(directory: Path) -> dict[str, Any]:
    """All that a run leaves but for the time it took and where it lies."""
    record = read_record(directory / RECORD)
    found: dict[str, Any] = {name: arrays(directory / name) for name in (CHECKPOINT, SAMPLES)}
    found[PICTURES] = arrays(directory / PICTURES)
    for name in ("state", "config_hash", "estimates", "per_dimension", "curves", "settings"):
        found[name] = getattr(record, name)
    found["history"] = {k: v for k, v in record.history.items() if k != "seconds"}
    rows = [line.split(",")[:-1] for line in (directory / HISTORY).read_text().splitlines()]
    return found | {"rows": rows, "status": b'"complete"' in (directory / STATUS).read_bytes()}


def train(config: RunConfig, until: int | None = None) -> list[Event]:
    events: list[Event] = []

    def notify(event: Event) -> None:
        events.append(event)
        if event.kind == "epoch" and event.epoch == until:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        run(config, notify, threads=1)
    return events


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A finished run."""
    yield from _keep(tmp_path_factory.mktemp("whole"), None)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    """A run that was stopped after two of its three epochs."""
    yield from _keep(tmp_path_factory.mktemp("half"), 2)


def _keep(folder: Path, until: int | None) -> Iterator[Kept]:
    config = RunConfig(
        encoder_depth=1,
        encoder_width=8,
        decoder_depth=1,
        decoder_width=8,
        epochs=3,
        batch_size=100,
        outputs=str(folder / "outputs"),
        device="cpu",
        data=DataConfig(n_train=300, n_test=100),
        measure=MeasureConfig(panel="decomposition", n_samples=100),
        generation=GenerationConfig(n_importance=None, quality=False),
    )
    with pytest.MonkeyPatch.context() as patch:
        # A cut of the power is not the subject, and a disk takes longer than these runs.
        patch.setattr(os, "fsync", lambda descriptor: None)
        torch.set_num_threads(1)
        undisturbed = replace(config, outputs=str(folder / "undisturbed"))
        train(undisturbed)
        other = replace(config, seed=1, outputs=str(folder / "other"))
        for each in (config, other):
            train(each, until)
        files, foreign = (contents(run_directory(each)) for each in (config, other))
        yield Kept(config, files, foreign, outcome(run_directory(undisturbed)))


@pytest.fixture(scope="module", autouse=True)
def _tally(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if SOAK:
        lines = [f"\n{ENDINGS.total()} corruptions"]
        lines += [f"{n:6d}  {ending}" for ending, n in sorted(ENDINGS.items())]
        capture = request.config.pluginmanager.get_plugin("capturemanager")
        assert capture is not None
        with capture.global_and_fixture_disabled():
            print("\n".join(lines))  # noqa: T201


@st.composite
def corruptions(draw: st.DrawFn, names: tuple[str, ...]) -> tuple[str, str, int, bytes, float]:
    """Which file, what happens to it, and where: among its first bytes or anywhere in it."""
    name, kind = draw(st.sampled_from(names)), draw(st.sampled_from(KINDS))
    length = draw(st.sampled_from((1, 1, 2, 8, 100, 5000)))
    mask = draw(st.binary(min_size=1, max_size=8).filter(any))
    place = draw(st.floats(0, 1, exclude_max=True) | st.integers(1, 300).map(float))
    return name, kind, length, mask, place


def corrupt(kept: Kept, how: tuple[str, str, int, bytes, float]) -> bytes:
    """The content of the file after that, which is not what it was."""
    name, kind, length, mask, place = how
    content = kept.files[name]
    start = int(place * len(content)) if place < 1 else min(int(place), len(content) - 1)
    part = content[start : start + length]
    repeated = (mask * length)[: len(part)]
    if kind == "flipped":
        part = bytes(a ^ b for a, b in zip(part, repeated, strict=True))
        changed = content[:start] + part + content[start + len(part) :]
    elif kind == "zeroed":
        changed = content[:start] + bytes(len(part)) + content[start + len(part) :]
    elif kind == "truncated":
        changed = content[:start]
    elif kind == "extended":
        changed = content + (mask * length)[:length]
    else:
        changed = kept.foreign[name]
    assume(changed != content)
    return changed


def damage(kept: Kept, how: tuple[str, str, int, bytes, float]) -> tuple[Path, str]:
    """Restore the run, corrupt one of its files; the folder and the name of the file."""
    changed = corrupt(kept, how)
    directory = kept.restore()
    (directory / how[0]).write_bytes(changed)
    return directory, how[0]


def quick(short: int, long: int) -> settings:
    return settings(
        max_examples=times(short, long),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def test_what_is_kept_is_sound(whole: Kept, half: Kept) -> None:
    assert set(whole.files) == set(FINISHED)
    assert set(half.files) == set(HALF_TRAINED)
    for kept in (whole, half):
        directory = kept.restore()
        record, damaged = inspect_run(directory, kept.config)
        assert (record is not None, damaged) == (kept is whole, {})
        assert all(kept.files[name] != kept.foreign[name] for name in kept.files)
    assert outcome(whole.restore()) == whole.outcome
    assert [event.kind for event in train(whole.config)] == ["skipped"]
    load_decoder(run_directory(whole.config))
    # A lock has no content, and whatever is written into it is nobody's.
    (run_directory(whole.config) / ".lock").write_bytes(b"x")
    assert [event.kind for event in train(whole.config)] == ["skipped"]


@pytest.mark.soak
@given(how=corruptions(FINISHED))
@quick(60, 2000)
def test_no_reader_takes_a_damaged_file_for_right(
    whole: Kept, how: tuple[str, str, int, bytes, float]
) -> None:
    directory, name = damage(whole, how)
    record, damaged = inspect_run(directory, whole.config)
    assert set(damaged) == {name}
    assert (record is None) == (name == RECORD)
    assert complete_record(directory, whole.config) is None
    ends = ["not skipped"]
    runs, excluded = read_runs([directory.parent])
    if name == RECORD:
        assert runs == []
        assert [one.kind for one in excluded] in (["unreadable"], ["other schema"])
        assert excluded[0].reason.startswith(RECORD)
        ends.append("excluded from the report")
    else:
        assert excluded == []
        values = {key: estimate.value for key, estimate in runs[0].estimates.items()}
        assert values == {k: v["value"] for k, v in whole.outcome["estimates"].items()}
        for file, show in ((SAMPLES, shown_samples), (PICTURES, shown_pictures)):
            if file == name:
                with pytest.raises(DamagedFile, match=rf"{file} is not as record\.json lists it"):
                    show(runs[0])
                ends.append("its figures refused")
            else:
                assert show(runs[0]).items() <= whole.outcome[file].items()
    if name in (RECORD, CHECKPOINT):
        with pytest.raises(InputError, match=name):
            load_decoder(directory)
        ends.append("refused by vaeq sample")
    ENDINGS[f"finished, {name} {how[1]}: {', '.join(ends)}"] += 1


def shown_samples(found: Run) -> dict[str, bytes]:
    return {"z": np.asarray(read_samples(found).z).tobytes()}


def shown_pictures(found: Run) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in read_pictures(found)[0].items()}


@pytest.mark.soak
@given(how=corruptions(FINISHED))
@quick(10, 800)
def test_a_finished_run_that_was_damaged_is_made_again_to_the_same_bits(
    whole: Kept, how: tuple[str, str, int, bytes, float]
) -> None:
    directory, name = damage(whole, how)
    events = train(whole.config)
    (note,) = [event.message for event in events if event.kind == "note"]
    remedy = "is trained again" if name == CHECKPOINT else "goes on from its checkpoint at epoch 3"
    assert note.startswith(f"{name} ")
    assert note.endswith(f". The run {remedy}.")
    assert "\n" not in note
    assert events[-1].kind == "complete"
    assert outcome(directory) == whole.outcome
    assert complete_record(directory, whole.config) is not None
    ENDINGS[f"finished, {name} {how[1]}: {remedy}, same bits"] += 1


@pytest.mark.soak
@given(how=corruptions(HALF_TRAINED))
@quick(10, 800)
def test_a_half_trained_run_that_was_damaged_ends_in_the_same_bits(
    half: Kept, how: tuple[str, str, int, bytes, float]
) -> None:
    directory, name = damage(half, how)
    assert set(inspect_run(directory, half.config)[1]) == {name}
    (left_out,) = read_runs([directory.parent])[1]
    assert left_out.kind == "unfinished"
    assert left_out.reason.startswith(STATUS if name == STATUS else "epoch 2 of 3")
    events = train(half.config)
    (note,) = [event.message for event in events if event.kind == "note"]
    remedy = "is trained again" if name == CHECKPOINT else "goes on from its checkpoint at epoch 2"
    assert note.startswith(f"{name} ")
    assert note.endswith(f". The run {remedy}.")
    (start,) = [event for event in events if event.kind == "start"]
    assert start.epoch == (0 if name == CHECKPOINT else 2)
    assert outcome(directory) == half.outcome
    assert complete_record(directory, half.config) is not None
    ENDINGS[f"half-trained, {name} {how[1]}: {remedy}, same bits"] += 1


@pytest.mark.parametrize("damaged", [None, CHECKPOINT])
def test_a_kill_between_any_two_writes_leaves_a_run_that_goes_on_or_is_complete(
    whole: Kept, monkeypatch: pytest.MonkeyPatch, damaged: str | None
) -> None:
    """From nothing, or while a damaged run is made again: nothing written after the nth file."""
    real = record_module.write_together
    written: list[str] = []
    states: list[str] = []
    for n in itertools.count():
        directory = whole.restore()
        if damaged is None:
            shutil.rmtree(directory)
        else:
            (directory / damaged).write_bytes(whole.foreign[damaged])
        written.clear()

        def write(files: Mapping[Path, bytes | str], most: int = n) -> None:
            for path, content in files.items():
                written.append(path.name)
                if len(written) <= most:
                    real({path: content})

        monkeypatch.setattr(record_module, "write_together", write)
        train(whole.config)
        monkeypatch.undo()
        complete = complete_record(directory, whole.config) is not None
        # The record is the last file of all.
        assert complete == (n >= len(written))
        events = train(whole.config)
        states.append(events[0].kind)
        assert events[-1].kind == ("skipped" if complete else "complete")
        if damaged is None:
            # A kill is no damage: no file is suspected.
            assert "note" not in [event.kind for event in events]
        assert outcome(directory) == whole.outcome
        if complete:
            break
    assert written[-2:] == [STATUS, RECORD]
    assert states[-1] == "skipped"
    # The settings, the state after each epoch and of the whole, and what was measured.
    assert set(written) == set(FINISHED)
    assert written.count(CHECKPOINT) >= 2


def test_a_file_that_the_system_refuses_stops_that_run_alone(whole: Kept) -> None:
    other = replace(whole.config, seed=2)
    for name in (RECORD, CHECKPOINT, STATUS):
        directory = whole.restore()
        (directory / name).unlink()
        (directory / name).mkdir()  # "Is a directory", also for a superuser
        assert complete_record(directory, whole.config) is None
        refused, fine = run_ensemble([whole.config, other], lambda event: None, threads=1)
        assert isinstance(refused, InputError)
        assert isinstance(fine, RunRecord)
        assert str(refused).startswith(f"{directory / name} cannot be read")
        assert str(refused).endswith("make it readable, or delete it.")
        assert (directory / PICTURES).read_bytes() == whole.files[PICTURES]
        shutil.rmtree(directory)
        shutil.rmtree(run_directory(other))
        directory.mkdir()


def test_the_commands_name_what_is_damaged_and_the_sweep_heals_it(
    vaeq: Vaeq, tmp_path: Path
) -> None:
    words = ("sweep", *TINY, "latent_dim=2,3,4")
    vaeq(*words, check=True)
    folder = tmp_path / "outputs" / "smoke"
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    listed = "is not as record.json lists it: damaged or replaced"
    damage = {PICTURES: listed, CHECKPOINT: listed, RECORD: "is damaged: it does not match"}
    before = [arrays(directory / PICTURES) for directory in runs]
    for directory, name in zip(runs, damage, strict=True):
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 4
        (directory / name).write_bytes(bytes(content))
    report = vaeq("report", "runs=outputs/smoke", COLUMNS="500", check=True).stdout
    assert f"No samples: outputs/smoke/{runs[0].name}/{PICTURES} {listed}" in report
    assert f"{runs[2].name} (unreadable): {RECORD} {damage[RECORD]}" in report
    assert "3 runs: 2 complete, 1 unreadable" in report
    for directory, name in list(zip(runs, damage, strict=True))[1:]:
        sample = vaeq("sample", f"run={directory}")
        assert sample.returncode == 2
        assert f"{name} {damage[name]}" in sample.stderr
        assert sample.stderr.count("\n") == 1
    sweep = vaeq(*words, check=True).stdout
    assert "finished and skipped" not in sweep
    for directory, (name, what) in zip(runs, damage.items(), strict=True):
        assert sweep.count(f"{directory.name}: {name} {what}") == 1
    assert sweep.count("The run is trained again.") == 1
    assert sweep.count("The run goes on from its checkpoint at epoch ") == 2
    again = vaeq(*words, check=True).stdout
    assert again == "3 of 3 runs are finished and skipped; 0 to do\n"
    assert before == [arrays(directory / PICTURES) for directory in runs]
