"""A clock that jumps back, stands in the future, or in 1970 changes no result and no duration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.report_fixtures import default_sweep
from tests.soak import SOAK
from vaeq.config import RunConfig
from vaeq.errors import InputError
from vaeq.experiment import run
from vaeq.report import newest_experiment
from vaeq.runs import record
from vaeq.runs.record import run_directory

# Put before every module of a process: an hour is lost at every look at the clock.
SITE = """
import datetime, itertools, time
hours, began = itertools.count(), {began}
def lost():
    return began - 3600.0 * next(hours)
class Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(lost(), tz)
time.time = lost
time.time_ns = lambda: int(lost() * 1e9)
datetime.datetime = Datetime
"""


def test_a_run_is_the_same_under_a_clock_that_jumps_back(
    monkeypatch: pytest.MonkeyPatch, tiny: RunConfig, tmp_path: Path
) -> None:
    plain = run(tiny, lambda event: None, threads=1)
    steps = count()
    began = time.time()

    def lost() -> float:
        return began - 3600.0 * next(steps)

    class Backwards(datetime):
        @classmethod
        def now(cls, tz=None):  # type: ignore[no-untyped-def, override]
            return cls.fromtimestamp(lost(), tz)

    monkeypatch.setattr(time, "time", lost)
    monkeypatch.setattr(record, "datetime", Backwards)
    from dataclasses import replace

    again = replace(tiny, outputs=str(tmp_path / "again"))
    jumped = run(again, lambda event: None, threads=1)
    monkeypatch.undo()
    assert next(steps) > 3
    assert jumped.estimates == plain.estimates
    assert all(seconds > 0 for seconds in jumped.timing.values())
    assert all(seconds > 0 for seconds in jumped.history["seconds"])
    status = json.loads((run_directory(again) / "status.json").read_bytes())
    assert status["state"] == "complete"
    assert datetime.fromisoformat(status["updated_at"]).timestamp() < began


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="make soak")
@pytest.mark.parametrize("began", [1e9, 0.0, 2.0**33])
def test_a_sweep_and_its_report_under_a_clock_that_jumps_back(tmp_path: Path, began: float) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.format(began=began), encoding="utf-8")

    def vaeq(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "vaeq", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = vaeq("sweep", *TINY, "latent_dim=2", "seed=0", "generation.quality=false")
    assert "[1/1]" in said
    assert "-0:" not in said
    (file,) = tmp_path.glob("outputs/smoke/*/record.json")
    assert min(json.loads(file.read_bytes())["timing"].values()) > 0
    status = json.loads((file.parent / "status.json").read_bytes())
    assert datetime.fromisoformat(status["updated_at"]).timestamp() < began
    vaeq("sample", f"run={file.parent}", "n=4")
    assert "report.html" in vaeq("report", "runs=outputs/smoke")


def test_the_newest_experiment_is_not_guessed_from_the_future(tmp_path: Path) -> None:
    for name in ("a", "b"):
        default_sweep(tmp_path / name)
    past = time.time() - timedelta(days=1).total_seconds()
    future = time.time() + timedelta(days=1).total_seconds()
    for file in (tmp_path / "b").rglob("*.json"):
        os.utime(file, (past, past))
    assert newest_experiment(tmp_path) == tmp_path / "a"
    # Written before the clock was set back: older than what it has seen since, and dated later.
    for file in (tmp_path / "b").rglob("*.json"):
        os.utime(file, (future, future))
    with pytest.raises(InputError, match=r"clock was set back .* name one: runs=.*/b$"):
        newest_experiment(tmp_path)
    # Of one experiment there is nothing to choose.
    for file in (tmp_path / "a").rglob("*"):
        if file.is_file():
            file.unlink()
    assert newest_experiment(tmp_path) == tmp_path / "b"
