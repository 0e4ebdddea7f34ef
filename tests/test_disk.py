"""Disks that are full, read-only, failing or gone: one line, a failed run, healed by the next."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import TINY, Run
from tests.failing_runs import tiny as small_run
from tests.sessions import half_written, leftovers
from tests.soak import SOAK, times
from vaeq.config import RunConfig
from vaeq.errors import DiskError, InputError
from vaeq.experiment import run, run_ensemble
from vaeq.launch.progress import Event
from vaeq.runs.record import RunRecord, complete_record, read_record, run_directory

Mount = Callable[..., None]
HERE = Path(__file__).parent


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mount something, or skip where that is not permitted; all is unmounted at the end."""
    mounted: list[Path] = []

    def mount(*options: str, at: Path) -> None:
        done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        if "remount" not in " ".join(options):
            mounted.append(at)

    yield mount
    for at in reversed(mounted):
        unmount(at)


def unmount(at: Path) -> None:
    subprocess.run(["umount", "--lazy", str(at)], capture_output=True)


def read_only(mount: Mount, folder: Path) -> None:
    """Close a folder to writers, root among them, until it is unmounted."""
    mount("--bind", str(folder), at=folder)
    mount("-o", "remount,ro,bind", at=folder)


def silently(config: RunConfig) -> RunRecord:
    return run(config, lambda event: None, threads=1)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return small_run(tmp_path / "outputs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return silently(small_run(tmp_path_factory.mktemp("undisturbed")))


def assert_failed_and_healed(
    config: RunConfig, undisturbed: RunRecord, heal: Callable[[], None]
) -> None:
    """What must be true of a run whose disk failed, and of the next attempt at it."""
    directory = run_directory(config)
    assert complete_record(directory, config) is None
    assert half_written(Path(config.outputs)) == []
    assert leftovers([Path(config.outputs)]) == []
    heal()
    assert silently(config).estimates == undisturbed.estimates
    assert leftovers([Path(config.outputs)]) == []


@pytest.mark.soak
def test_a_disk_that_is_full_at_any_moment(
    mount: Mount, tmp_path: Path, config: RunConfig, undisturbed: RunRecord
) -> None:
    # From no room for config.yaml to room for all but record.json.
    ballast_size, whole = 4 * 2**20, run_directory(config)
    silently(config)
    needed = sum(path.stat().st_size for path in whole.iterdir())
    met = set()
    for room in range(0, needed + 65_536, times(needed // 8, 4096)):
        disk = tmp_path / str(room)
        disk.mkdir()
        mount("-t", "tmpfs", "-o", f"size={ballast_size + room}", "tmpfs", at=disk)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(ballast_size))
        own = replace(config, outputs=str(disk / "outputs"))
        (ending,) = run_ensemble([own], lambda event: None, threads=1)
        if isinstance(ending, Exception):
            sentence = str(ending)
            assert (
                sentence.endswith(
                    "cannot be written: No space left on device; free some space and try again"
                )
                or "(No space left on device); choose another place" in sentence
            )
            met.add(sentence.split(" cannot")[0].rpartition("/")[2])
            assert_failed_and_healed(own, undisturbed, ballast.unlink)
        unmount(disk)
    assert len(met) > times(2, 3), met


@pytest.mark.skipif(not SOAK, reason="part of make soak")
@pytest.mark.soak
def test_a_full_disk_fails_the_run_that_fills_it_and_not_the_sweep(
    mount: Mount, vaeq: Run, tmp_path: Path
) -> None:
    disk = tmp_path / "outputs"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", at=disk)
    # The wider one's checkpoint alone is larger than the disk.
    words = ("sweep", *TINY, "latent_dim=2", "encoder_width=256,16")
    done = vaeq(*words)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "checkpoint.safetensors cannot be written: No space left on device" in done.stdout
    assert done.stderr.startswith("vaeq: 1 of 2 runs failed: ")
    assert done.stderr.count("\n") == 1
    states = {
        file.parent.name: json.loads(file.read_text()) for file in disk.glob("*/*/record.json")
    }
    assert sorted(state["state"] for state in states.values()) == ["complete", "failed"]
    assert half_written(disk) == []
    assert leftovers([disk]) == []
    mount("-o", "remount,size=64m", at=disk)
    again = vaeq(*words, check=True)
    assert again.stdout.startswith("1 of 2 runs are finished and skipped; 1 to do\n")
    assert len(list(disk.glob("*/*/pictures.safetensors"))) == 2


def test_a_read_only_folder_is_refused_before_anything_starts(
    mount: Mount, vaeq: Run, tmp_path: Path, config: RunConfig, undisturbed: RunRecord
) -> None:
    outputs = Path(config.outputs)
    outputs.mkdir()
    read_only(mount, outputs)
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\)"):
        silently(config)
    done = vaeq("train", *TINY)
    assert done.returncode == 2
    assert "Read-only file system" in done.stderr
    assert done.stderr.count("\n") == 1
    assert_failed_and_healed(config, undisturbed, lambda: unmount(outputs))


@pytest.mark.parametrize("moment", ["before", "training", "measuring"])
def test_a_run_whose_folder_is_read_only_fails_alone(
    mount: Mount, config: RunConfig, undisturbed: RunRecord, moment: str
) -> None:
    closed = replace(config, seed=1)
    directory = run_directory(closed)
    directory.mkdir(parents=True)
    if moment == "before":
        read_only(mount, directory)
    kinds = {"training": "epoch", "measuring": "stage"}

    def notify(event: Event) -> None:
        if event.run == directory.name and event.kind == kinds.get(moment) and event.epoch < 2:
            read_only(mount, directory)

    first, failure = run_ensemble([config, closed], notify, threads=1)
    assert isinstance(first, RunRecord)
    assert complete_record(run_directory(config), config) == first
    assert isinstance(failure, DiskError)
    assert "Read-only file system; make it writable and try again" in str(failure)
    whole = silently(replace(closed, outputs=f"{config.outputs}-whole"))
    assert_failed_and_healed(closed, whole, lambda: unmount(directory))


@pytest.mark.parametrize("again", [False, True], ids=["removed", "replaced"])
@pytest.mark.parametrize("moment", ["epoch", "stage"])
def test_a_folder_that_is_removed_under_a_run_fails_that_run_alone(
    config: RunConfig, moment: str, again: bool
) -> None:
    victim = replace(config, seed=1)
    directory = run_directory(victim)

    def notify(event: Event) -> None:
        if event.run == directory.name and event.kind == moment and event.epoch < 2:
            shutil.rmtree(directory)
            if again:  # by another process, that trains the same run there
                directory.mkdir()
                (directory / ".lock").touch()

    first, failure = run_ensemble([config, victim], notify, threads=1)
    assert isinstance(first, RunRecord)
    assert isinstance(failure, DiskError)
    assert "leave its folder where it is and try again" in str(failure)
    # What is there now is not this process's, and has nothing of it.
    assert (os.listdir(directory) if again else directory.exists()) == (
        [".lock"] if again else False
    )
    whole = silently(replace(victim, outputs=f"{config.outputs}-whole"))
    assert_failed_and_healed(victim, whole, lambda: None)


@pytest.fixture(scope="module")
def failing_calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which calls can be made to fail."""
    library = tmp_path_factory.mktemp("library") / "failing_calls.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = str(HERE / "failing_calls.c")
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"]
    subprocess.run(words, check=True, capture_output=True)
    return {"LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}


FILES = (
    "config.yaml",
    "status.json",
    "checkpoint",
    "history.csv",
    "samples",
    "pictures",
    "record.json",
)


@pytest.mark.soak
def test_any_write_that_fails_fails_the_run_and_the_next_attempt_heals_it(
    failing_calls: dict[str, str], tmp_path: Path
) -> None:
    calls = [("write", errno.EIO), ("fsync", errno.EIO), ("rename", errno.EIO)]
    calls += [("write", errno.EDQUOT), ("write", errno.ENOSPC)]
    faults = [f"{call}:{file}:{number}" for file in FILES for call, number in calls]
    # Of the everyday run: each call, and each file, at least once.
    faults = [fault for i, fault in enumerate(faults) if i % times(6, 1) == 0]
    faults += [f"flock:.lock:{errno.ENOLCK}"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.failing_runs", str(tmp_path), *faults],
        env={**os.environ, **failing_calls},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["fault"] for each in told] == faults
    for each in told:
        _, file, number = each["fault"].split(":")
        assert file in each["sentence"], each
        assert f"cannot be written: {os.strerror(int(number))}; " in each["sentence"]
        assert "\n" not in each["sentence"]
        assert not each["complete"], each
        assert each["half_written"] == [], each
        assert each["leftovers"] == [], each
        assert each["healed"], each


def test_a_failing_disk_fails_one_run_of_a_sweep_in_one_line(
    failing_calls: dict[str, str], vaeq: Run, tmp_path: Path
) -> None:
    words = ("sweep", *TINY, "latent_dim=2", "seed=0,1")
    # Of one of the two, and of its failure's record, too.
    faults = {"FAIL_CALL": "fsync", "FAIL_FILE": "seed=1", "FAIL_ERRNO": str(errno.EIO)}
    done = vaeq(*words, **failing_calls, **faults)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "cannot be written: Input/output error; check the disk and try again" in done.stdout
    assert done.stderr.startswith("vaeq: 1 of 2 runs failed: ")
    assert done.stderr.count("\n") == 1
    found = list(tmp_path.glob("outputs/smoke/*/record.json"))
    assert ["seed=0" in path.parent.name for path in found] == [True]
    assert leftovers([tmp_path / "outputs"]) == []
    again = vaeq(*words, check=True)
    assert again.stdout.startswith("1 of 2 runs are finished and skipped; 1 to do\n")


def test_where_there_is_no_flock_a_file_is_the_lock_and_it_is_said(
    failing_calls: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.failing_runs", str(tmp_path), f"flock:.lock:{errno.ENOSYS}"],
        env={**os.environ, **failing_calls},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["sentence"] == ""
    assert told["complete"]
    assert told["notes"] == ["its file system has no flock: do not run it on two machines at once"]


def test_output_onto_a_full_disk_is_one_line(tmp_path: Path) -> None:
    for words in (["--help"], ["train", *TINY]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "vaeq", *words],
                cwd=tmp_path,
                env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=300,
            )
        assert done.returncode == 1
        assert done.stderr == "vaeq: No space left on device.\n"


def test_a_disk_error_is_one_sentence_with_its_remedy() -> None:
    path = Path("outputs/a/record.json")
    for number, remedy in [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "make it writable"),
        (errno.EIO, "check the disk"),
        (errno.ESTALE, "put that right"),
    ]:
        error = DiskError(path, OSError(number, os.strerror(number)))
        assert error.errno == number
        expected = f"{path} cannot be written: {os.strerror(number)}; {remedy} and try again"
        assert str(error) == expected


def test_the_record_of_a_failure_names_the_disk(config: RunConfig) -> None:
    victim = run_directory(config)

    def notify(event: Event) -> None:
        # A folder of that name is in the way of the file.
        if event.kind == "stage":
            (victim / "samples.safetensors").mkdir()

    with pytest.raises(DiskError, match=r"samples\.safetensors cannot be written: Is a directory"):
        run(config, notify, threads=1)
    failure = read_record(victim / "record.json").failure
    assert failure is not None
    assert failure["type"] == "DiskError"
    assert "traceback" not in failure
    (victim / "samples.safetensors").rmdir()
    assert silently(config).state == "complete"
