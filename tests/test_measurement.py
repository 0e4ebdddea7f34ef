"""vaeq.measure and `vaeq measure`: one set of numbers, from memory and from files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vaeq as package
from tests.conftest import Run
from vaeq.errors import InputError
from vaeq.measurement import Measurement, estimate_names, measure
from vaeq.posterior.codes import CodesWarning

RNG = np.random.default_rng(1)
N, M, D = 400, 150, 2
MEAN = RNG.normal(size=(N + M, D)).astype(np.float32)
LOGVAR = RNG.uniform(-2, -1, size=(N + M, D)).astype(np.float32)
LABELS = RNG.integers(0, 3, N)
HELD_OUT: dict[str, Any] = {"test_mean": MEAN[N:], "test_logvar": LOGVAR[N:]}


@pytest.fixture(scope="module")
def full() -> Measurement:
    return measure(MEAN[:N], LOGVAR[:N], **HELD_OUT, labels=LABELS, n_samples=1000)


def test_the_package_offers_measure() -> None:
    found = package.measure(MEAN[:50], LOGVAR[:50], n_samples=100, panel="decomposition")
    assert isinstance(found, package.Measurement)


def test_the_full_panel_holds_every_reading(full: Measurement) -> None:
    expected = {
        "kl_per_image",
        "mutual_information",
        "mutual_information_fraction",
        "marginal_kl",
        "total_correlation",
        "dimension_kl_sum",
        "dimension_kl_mean",
        "dimension_kl_max",
        "dimension_kl_mean_active",
        "active_units",
        "moment_kl",
        "reverse_marginal_kl",
        "reverse_marginal_kl_ess",
        "population_kl_lower",
        "population_kl_upper",
    }
    for name in ("sliced_w2", "mmd", "energy_distance", "c2st_auc"):
        expected |= {name, f"{name}_null", f"{name}_null_sd", f"{name}_z"}
    assert expected <= full.estimates.keys()
    # A name of another estimate belongs into measurement.PANELS, where a search looks for it.
    assert full.estimates.keys() == set(estimate_names("full"))
    assert set(full.curves) == {"n_curve", "pit", "bracket", "by_class"}
    assert full.curves["by_class"]["label"] == [0, 1, 2]
    assert sum(full.curves["by_class"]["n"]) == N
    lower, upper = (full.estimates[f"population_kl_{end}"] for end in ("lower", "upper"))
    assert lower.value is not None
    assert upper.value is not None
    assert lower.std_error is not None
    assert upper.std_error is not None
    # 150 held-out images say little; but the ends may cross by their errors only.
    assert lower.value - upper.value < 2 * (lower.std_error + upper.std_error)
    for entry in full.estimates.values():
        assert entry.value is not None or entry.reason


def test_torch_and_numpy_give_the_same_numbers(full: Measurement) -> None:
    found = measure(
        torch.tensor(MEAN[:N]), torch.tensor(LOGVAR[:N]), n_samples=1000, panel="decomposition"
    )
    assert found.estimates.items() <= full.estimates.items()
    assert found.per_dimension.items() <= full.per_dimension.items()
    assert found.curves == {}


def test_another_seed_moves_the_numbers_within_their_errors(full: Measurement) -> None:
    other = measure(MEAN[:N], LOGVAR[:N], n_samples=1000, seed=5, panel="decomposition")
    a, b = full.estimates["marginal_kl"], other.estimates["marginal_kl"]
    assert a.value is not None
    assert b.value is not None
    assert a.std_error is not None
    assert 0 < abs(a.value - b.value) < 4 * 2**0.5 * a.std_error


def test_without_held_out_codes_the_bracket_says_so() -> None:
    found = measure(MEAN[:40], LOGVAR[:40], n_samples=100)
    for end in ("lower", "upper"):
        entry = found.estimates[f"population_kl_{end}"]
        assert entry.value is None
        assert entry.reason is not None
        assert "test_mean and test_logvar" in entry.reason
    assert "not available: needs held-out codes" in str(found)


def test_it_prints_and_converts(full: Measurement) -> None:
    text = str(full)
    assert "400 images, 2 dimensions, 150 held out" in text
    assert "marginal_kl" in text
    assert " nats" in text
    frame = full.to_frame()
    assert frame.loc["kl_per_image", "value"] == full.estimates["kl_per_image"].value
    assert list(frame.columns) == ["value", "std_error", "unit", "reason"]
    assert json.loads(json.dumps(full.to_dict()["estimates"]))
    figure = full.plot()
    assert len(figure.axes) == 4
    figure.canvas.draw()
    small = measure(MEAN[:3, :1], LOGVAR[:3, :1], n_samples=10, panel="decomposition")
    small.plot().canvas.draw()


def test_one_image_and_one_dimension() -> None:
    found = measure(np.array([[0.5]]), np.array([[0.0]]), n_samples=20)
    assert found.estimates["kl_per_image"].value == pytest.approx(0.125)
    assert found.estimates["mutual_information_fraction"].value is None


def test_wrong_arguments() -> None:
    with pytest.raises(
        InputError, match="panel must be one of decomposition, bracket, full, got 'all'"
    ):
        measure(MEAN, LOGVAR, panel="all")
    with pytest.raises(InputError, match="n_samples must be >= 1, got 0"):
        measure(MEAN, LOGVAR, n_samples=0)
    with pytest.warns(CodesWarning, match="as a variance or a standard deviation is"):
        measure(MEAN, np.exp(LOGVAR), n_samples=10, panel="decomposition")


def test_the_command_writes_what_the_function_returns(vaeq: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "codes.npz", mean=MEAN[:N], logvar=LOGVAR[:N], labels=LABELS, **HELD_OUT)
    words = ("n_samples=500", "panel=decomposition", "threads=1")
    done = vaeq("measure", "codes=codes.npz", "output=out.json", *words, check=True)
    assert "400 images, 2 dimensions" in done.stdout
    assert done.stderr == ""
    content = json.loads((tmp_path / "out.json").read_text())
    expected = measure(MEAN[:N], LOGVAR[:N], n_samples=500, panel="decomposition").to_dict()
    assert content["estimates"] == expected["estimates"]
    assert content["per_dimension"] == expected["per_dimension"]
    assert content["settings"]["n"] == N


def test_the_command_refuses_in_one_line_and_writes_nothing(vaeq: Run, tmp_path: Path) -> None:
    bad = MEAN.copy()
    bad[7, 1] = np.nan
    np.savez(tmp_path / "nan.npz", mean=bad, logvar=LOGVAR)
    np.savez(tmp_path / "short.npz", mean=MEAN, logvar=LOGVAR[:5])
    (tmp_path / "torn.npz").write_bytes((tmp_path / "nan.npz").read_bytes()[:300])
    before = sorted(os.listdir(tmp_path))
    for words, sentence in (
        ([], "codes is missing; give codes=FILE.npz"),
        (["codes=none.npz"], "codes=none.npz does not exist"),
        (["codes=torn.npz"], "codes=torn.npz cannot be read"),
        (["codes=nan.npz"], "mean must be finite, got 1 NaN or infinite"),
        (["codes=short.npz"], "mean and logvar must have the same shape"),
        (["codes=nan.npz", "n_samples=1"], "n_samples must be an integer between 2 and"),
    ):
        done = vaeq("measure", *words, "output=out.json")
        assert done.returncode == 2
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
        assert sorted(os.listdir(tmp_path)) == before


def test_a_suspicion_is_a_warning_and_the_numbers_come(vaeq: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "codes.npz", mean=MEAN, logvar=np.exp(LOGVAR))
    done = vaeq("measure", "codes=codes.npz", "panel=decomposition", "n_samples=50", check=True)
    assert done.stderr.startswith("vaeq: warning: logvar is positive everywhere")
    assert done.stderr.count("\n") == 1
    assert "kl_per_image" in done.stdout
