"""Trackers: what each wrote is read back with its own reader and compared with the run's files."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file

from tests.conftest import TINY, Run
from tests.soak import SOAK
from vaeq import trackers
from vaeq.config import RunConfig, config_hash
from vaeq.errors import InputError
from vaeq.experiment import run, run_ensemble
from vaeq.launch.pool import Pool
from vaeq.launch.progress import Event
from vaeq.launch.sweep import SweepResult
from vaeq.runs.record import RunRecord, read_record, run_directory

LOGGERS = [
    pytest.param(
        logger,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
        ),
    )
    for logger, package in trackers.PACKAGES.items()
]
soak = pytest.mark.skipif(not SOAK, reason="make soak")
# Left to make soak where a process has to start: they take seconds each.
SOME = [
    pytest.param(p.values[0], marks=[*p.marks, soak, pytest.mark.soak])
    if p.values[0] != "tensorboard"
    else p
    for p in LOGGERS
]


Read = Callable[[str, Path], "Logged"]
Tiny = Callable[[str], RunConfig]


@dataclass
class Logged:
    """What a tracker holds of one run."""

    epochs: list[int] = field(default_factory=list)  # as often as each was written
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)
    table: str = ""
    pictures: dict[str, np.ndarray] = field(default_factory=dict)

    def put(self, values: dict[str, float], epoch: int) -> None:
        """Numbers of one row of the tracker's, sorted by what they are."""
        by_epoch = {name: v for name, v in values.items() if name.startswith("epoch/")}
        if by_epoch:
            self.epochs.append(epoch)
        for name, value in by_epoch.items():
            self.scalars.setdefault(name, {})[epoch] = value
        self.estimates |= {
            name: v for name, v in values.items() if name.startswith(("estimate/", "std_error/"))
        }


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """trackio reads its folder once a process."""
    folder = tmp_path_factory.mktemp("trackio")
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    yield folder
    del os.environ["TRACKIO_DIR"]
    if before is not None:
        os.environ["TRACKIO_DIR"] = before


@pytest.fixture
def read(trackio_folder: Path) -> Read:
    """What a logger wrote of the run in a folder."""

    def reader(logger: str, directory: Path) -> Logged:
        if logger == "tensorboard":
            return read_tensorboard(directory / "tensorboard")
        if logger == "trackio":
            return read_trackio(trackio_folder, directory.parent.name, directory.name)
        return read_wandb(directory / "wandb")

    return reader


def read_tensorboard(folder: Path) -> Logged:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    found = Logged()
    seconds = accumulator.Scalars("epoch/seconds") if accumulator.Tags()["scalars"] else []
    found.epochs = [event.step for event in seconds]
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            if tag.startswith("epoch/"):
                found.scalars.setdefault(tag, {})[event.step] = event.value
            else:
                found.estimates[tag] = event.value
    for tag in accumulator.Tags()["images"]:
        (event,) = accumulator.Images(tag)
        found.pictures[tag] = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    if "estimates/text_summary" in accumulator.Tags()["tensors"]:
        (event,) = accumulator.Tensors("estimates/text_summary")
        found.table = event.tensor_proto.string_val[0].decode()
    return found


def read_trackio(folder: Path, experiment: str, run: str) -> Logged:
    found = Logged()
    with closing(sqlite3.connect(folder / f"{experiment}.db")) as database:
        rows = database.execute(
            "SELECT step, metrics FROM metrics WHERE run_name = ?", (run,)
        ).fetchall()
    for step, text in rows:
        values = json.loads(text)
        found.put({n: v for n, v in values.items() if isinstance(v, float | int)}, step)
        for name, value in values.items():
            if name == "estimates":
                found.table = value["_value"]
            elif isinstance(value, dict):
                with Image.open(folder / "media" / value["file_path"]) as image:
                    found.pictures[name] = np.asarray(image.convert("RGB"))
    return found


def read_wandb(folder: Path) -> Logged:
    (file,) = folder.glob("offline-run-*/*.wandb")
    found = Logged()
    records = list(wandb_records(file))
    # Its service writes about once a second, on a busy machine later; of a killed run there is no
    # last word to wait for.
    while not (records and (records[-1].WhichOneof("record_type") == "exit" or _age(file) > 10)):
        assert _age(file) < 60, f"nothing is written to {file}"
        time.sleep(0.05)
        records = list(wandb_records(file))
    for record in records:
        for name in ("history", "summary"):
            if record.WhichOneof("record_type") != name:
                continue
            message = getattr(record, name)
            items = message.item if name == "history" else message.update
            values = {"/".join([*i.nested_key] or [i.key]): json.loads(i.value_json) for i in items}
            numbers = {n: v for n, v in values.items() if isinstance(v, float | int)}
            if name == "history":
                found.put(numbers, values["_step"])
            else:
                kept = {n: v for n, v in numbers.items() if not n.startswith("epoch/")}
                found.put(kept, 0)
                found.table = values.get("estimates", found.table)
            for key, value in values.items():
                if name == "history" and key.startswith("figure/") and key.endswith("/path"):
                    with Image.open(file.parent / "files" / value) as image:
                        found.pictures[key.removesuffix("/path")] = np.asarray(image)
    return found


def _age(file: Path) -> float:
    return time.time() - file.stat().st_mtime


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log in blocks of 32 KiB behind seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        if kind == 0 or len(body) < length:  # where a killed process left off
            return
        parts = body if kind in (1, 2) else parts + body
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def assert_logged(found: Logged, record: RunRecord) -> None:
    """The tracker holds the run's history and estimates, each once."""
    epochs = [int(epoch) for epoch in record.history["epoch"]]
    assert Counter(found.epochs) == Counter(epochs)
    assert set(found.scalars) == {f"epoch/{name}" for name in record.history if name != "epoch"}
    for name, by_epoch in found.scalars.items():
        column = record.history[name.removeprefix("epoch/")]
        # TensorBoard keeps float32.
        assert [by_epoch[epoch] for epoch in epochs] == pytest.approx(column, rel=1e-6)
    expected = {
        f"{group}/{name}": entry[part]
        for name, entry in record.estimates.items()
        for group, part in (("estimate", "value"), ("std_error", "std_error"))
        if entry[part] is not None
    }
    assert found.estimates == pytest.approx(expected, rel=1e-6)
    for name, entry in record.estimates.items():
        assert f"| {name} | " in found.table
        assert entry.get("reason", "") in found.table


@pytest.fixture(autouse=True)
def _one_figure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of the time: one test does it, the others take a picture that is there."""
    if request.node.originalname != "test_a_tracker_holds_the_run":
        grey = np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3))
        monkeypatch.setattr(trackers, "figures", lambda directory: iter([("grey", grey)]))


@pytest.fixture
def logged(tiny: RunConfig, request: pytest.FixtureRequest) -> Tiny:
    """The small run, with a logger and an experiment of this test's own."""
    name = "".join(c for c in request.node.name if c.isalnum())
    return lambda logger: replace(tiny, logger=logger, experiment=name, latent_dim=3)


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_tracker_holds_the_run(logger: str, logged: Tiny, read: Read) -> None:
    config = logged(logger)
    events: list[Event] = []
    record = run(config, events.append, threads=1)
    assert "note" not in {event.kind for event in events}
    found = read(logger, run_directory(config))
    assert_logged(found, record)
    names = {f"figure/{name}" for name, _ in trackers.figures(run_directory(config))}
    assert {"figure/training", "figure/samples", "figure/dimensions"} <= names
    assert set(found.pictures) == names
    for name, picture in found.pictures.items():
        assert picture.shape[2] == 3
        assert picture.std() > 5, name  # something is drawn


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_resumed_run_is_logged_as_if_it_had_never_stopped(
    logger: str, logged: Tiny, read: Read
) -> None:
    config = replace(logged(logger), epochs=4)

    def interrupt(event: Event) -> None:
        if event.kind == "epoch" and event.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, interrupt, threads=1)
    half = read(logger, run_directory(config))
    assert Counter(half.epochs) == Counter([1, 2])
    assert half.estimates == {}
    record = run(config, lambda event: None, threads=1)
    assert_logged(read(logger, run_directory(config)), record)


@pytest.mark.parametrize("logger", LOGGERS)
def test_members_of_an_ensemble_each_have_their_log(logger: str, logged: Tiny, read: Read) -> None:
    configs = [replace(logged(logger), seed=seed) for seed in (0, 1)]
    for config, record in zip(
        configs, run_ensemble(configs, lambda event: None, threads=1), strict=True
    ):
        assert isinstance(record, RunRecord)
        assert_logged(read(logger, run_directory(config)), record)


@soak
@pytest.mark.soak
@pytest.mark.parametrize("logger", LOGGERS)
def test_workers_of_the_pool_log_run_after_run(logger: str, logged: Tiny, read: Read) -> None:
    configs = [replace(logged(logger), seed=seed) for seed in (0, 1)]
    result = SweepResult()
    Pool(Console(file=io.StringIO()), n_jobs=1).run(configs, result)
    assert len(result.complete) == 2
    for config in configs:
        directory = run_directory(config)
        assert_logged(read(logger, directory), read_record(directory / "record.json"))


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_tracker_changes_nothing_of_a_run(
    logger: str, logged: Tiny, trackio_folder: Path, tmp_path: Path
) -> None:
    config = logged(logger)
    plain = replace(config, logger="none", outputs=str(tmp_path / "plain"))
    assert config_hash(config) == config_hash(plain)
    ours, theirs = (run(each, lambda event: None, threads=1) for each in (config, plain))
    assert ours.estimates == theirs.estimates
    assert ours.per_dimension == theirs.per_dimension
    for file in ("checkpoint.safetensors", "samples.safetensors", "pictures.safetensors"):
        a, b = (load_file(run_directory(each) / file) for each in (config, plain))
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name], equal_nan=True) for name in a), file


@pytest.mark.parametrize("when", ["start", "epoch", "estimates", "picture", "close"])
def test_a_tracker_that_raises_costs_a_warning_and_no_run(
    when: str, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def hurt(name: str) -> None:
        called.append(name)
        if name == when:
            raise OSError("the disk of the tracker\nis full")

    class Broken(trackers.Tracker):
        def __init__(self, config: RunConfig) -> None:
            hurt("start")

        def epoch(self, values: object, epoch: int) -> None:
            hurt("epoch")

        def estimates(self, values: object, table: str, epoch: int) -> None:
            hurt("estimates")

        def picture(self, name: str, picture: object, epoch: int) -> None:
            hurt("picture")

        def close(self) -> None:
            hurt("close")

    monkeypatch.setitem(trackers._TRACKERS, "tensorboard", Broken)
    monkeypatch.setitem(trackers.PACKAGES, "tensorboard", "json")  # any that is there
    events: list[Event] = []
    record = run(replace(tiny, logger="tensorboard"), events.append, threads=1)
    assert record.state == "complete"
    (note,) = (event for event in events if event.kind == "note")
    assert note.message == (
        "logger=tensorboard failed and is left out, the run goes on: "
        "OSError: the disk of the tracker is full"
    )
    assert called.count(when) <= 2  # close once more, at most
    assert events[-1].kind == "complete"


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs tensorboard")
def test_a_log_does_not_follow_a_link_out_of_outputs(tiny: RunConfig, tmp_path: Path) -> None:
    config = replace(tiny, logger="tensorboard")
    (tmp_path / "elsewhere").mkdir()
    run_directory(config).mkdir(parents=True)
    (run_directory(config) / "tensorboard").symlink_to(tmp_path / "elsewhere")
    events: list[Event] = []
    assert run(config, events.append, threads=1).state == "complete"
    (note,) = (event for event in events if event.kind == "note")
    assert "is a link out of outputs=" in note.message
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("logger", trackers.PACKAGES)
def test_a_missing_package_is_one_line_before_anything_starts(
    logger: str, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = trackers.PACKAGES[logger]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError) as caught:
        run(replace(tiny, logger=logger), lambda event: None, threads=1)
    assert str(caught.value) == f"logger={logger} needs pip install 'vaeq[{package}]'."
    assert not Path(tiny.outputs).exists()


@soak
@pytest.mark.soak
def test_a_sweep_without_the_package_starts_no_run(vaeq: Run, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "tensorboard.py").write_text("raise ModuleNotFoundError('gone')\n")
    done = vaeq("sweep", *TINY, "logger=tensorboard", PYTHONPATH=str(hidden))
    assert done.returncode == 2
    assert done.stderr == "vaeq: logger=tensorboard needs pip install 'vaeq[tensorboard]'.\n"
    assert set(os.listdir(tmp_path)) == {"hidden"}


def test_a_package_that_breaks_is_named(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("two versions of protobuf")

    monkeypatch.setattr(trackers.importlib, "import_module", broken)
    with pytest.raises(InputError, match=r"import wandb fails \(two versions of protobuf\)"):
        trackers.require(replace(tiny, logger="wandb_offline"))


@pytest.mark.parametrize("logger", SOME)
def test_a_killed_run_leaves_a_log_that_can_be_read(
    logger: str, read: Read, tmp_path: Path
) -> None:
    words = ["train", *TINY, f"logger={logger}", "epochs=100000"]
    child = subprocess.Popen(
        [sys.executable, "-m", "vaeq", *words], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (files := list(tmp_path.glob("outputs/smoke/*/history.csv"))) or (
            files[0].read_text().count("\n") < 12
        ):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2)  # what a tracker may hold back
    finally:
        child.kill()
        child.wait()
    found = read(logger, files[0].parent)
    assert len(found.epochs) >= 10
    assert sorted(found.epochs) == list(range(1, len(found.epochs) + 1))
