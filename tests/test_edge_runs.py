"""Whole runs on data and settings at the edge: a record of numbers and reasons, or one sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.report_fixtures import write_status
from vaeq.config import GenerationConfig, MeasureConfig, RunConfig
from vaeq.data.images import Images
from vaeq.errors import InputError, NeverTrained, TrainingDiverged, VaeqError
from vaeq.experiment import measuring, preparation, run
from vaeq.report.runs import read_runs
from vaeq.runs.record import (
    RECORD,
    RunRecord,
    complete_record,
    read_record,
    run_directory,
    write_record,
)


def images_of(train: torch.Tensor, test: torch.Tensor, like: Images) -> Images:
    labels = [torch.zeros(len(part), dtype=torch.uint8) for part in (train, test)]
    return replace(like, train=train, train_labels=labels[0], test=test, test_labels=labels[1])


def everything(config: RunConfig, **changes: Any) -> RunConfig:
    """Every measure and everything that is asked of a decoder, a few draws each."""
    return replace(
        config,
        measure=MeasureConfig(panel="full", n_samples=100),
        generation=GenerationConfig(n_importance=5, likelihood_images=20, ais_images=2),
        **changes,
    )


def outcome(config: RunConfig, images: Images | None, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    """The record of a run through the whole pipeline; every number in it is one or says why not."""
    if images is not None:
        monkeypatch.setattr(preparation, "_images", lambda data, device: images)
    monkeypatch.setattr("vaeq.measurement.N_SAMPLES", 60)
    record = run(config, lambda event: None, threads=1)
    assert complete_record(run_directory(config), config) == record
    for name, entry in record.estimates.items():
        if entry["value"] is None:
            assert entry["reason"], name
        else:
            assert math.isfinite(entry["value"]), name
    return record


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_train", "n_test", "latent_dim"), [(1, 1, 2), (2, 2, 3), (30, 1, 2), (6, 5, 40)]
)
def test_few_images(
    tiny: RunConfig, mnist: Images, monkeypatch: pytest.MonkeyPatch,
    n_train: int, n_test: int, latent_dim: int,
) -> None:  # fmt: skip
    """One image, two that are the same, one held out, more dimensions than images."""
    train = mnist.train[:n_train].clone()
    if n_train == 2:
        train[1] = train[0]
    images = images_of(train, mnist.test[:n_test], mnist)
    found = outcome(everything(tiny, latent_dim=latent_dim), images, monkeypatch).estimates
    information = found["mutual_information"]
    if n_train == 1:
        assert found["mutual_information_fraction"]["reason"] == "log N is 0 for a single image"
    if n_train <= 2:
        assert abs(information["value"]) <= 4 * information["std_error"]
    if n_test == 1:
        reason = "needs at least two held-out images, got one"
        assert found["population_kl_upper"]["reason"] == reason


@pytest.mark.slow
def test_constant_images(tiny: RunConfig, mnist: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """One code for all: KL(q_N ‖ p) is kl_per_image, and the index of an image tells nothing."""
    images = images_of(
        torch.full((70, 784), 255, dtype=torch.uint8), torch.zeros(20, 784, dtype=torch.uint8),
        mnist,
    )  # fmt: skip
    found = outcome(everything(tiny), images, monkeypatch).estimates
    marginal, average = found["marginal_kl"], found["kl_per_image"]["value"]
    assert abs(marginal["value"] - average) <= 4 * marginal["std_error"]
    assert found["active_units"]["value"] == 0
    assert found["dimension_kl_mean_active"]["reason"] == "no dimension is active"
    with pytest.raises(InputError, match="vary in two directions at least; these 70 have rank 0"):
        outcome(replace(tiny, model="ppca"), images, monkeypatch)


@pytest.mark.slow
def test_a_collapse_of_all_dimensions(tiny: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny, beta=1e6, epochs=30, learning_rate=3e-3, latent_dim=3)
    found = outcome(config, None, monkeypatch).estimates
    assert found["active_units"]["value"] == 0
    marginal = found["marginal_kl"]
    assert abs(marginal["value"] - found["moment_kl"]["value"]) < 1e-3
    assert marginal["value"] < 0.05


def test_a_run_whose_elbo_is_missing_still_ends_in_one_line(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vaeq.estimate import Estimate

    missing = Estimate.missing("nats", "not finite")
    monkeypatch.setattr(
        measuring, "held_out_elbo", lambda *rest: {"elbo": missing, "reconstruction": missing}
    )
    said = []
    run(tiny, said.append, threads=1)
    assert said[-1].kind == "complete"
    assert "ELBO not available nats" in said[-1].message


@pytest.mark.parametrize("changes", [{"learning_rate": 10.0, "beta": 1e6}])
def test_a_training_that_explodes_is_a_failure_with_its_epoch(
    tiny: RunConfig, changes: dict[str, Any]
) -> None:
    config = replace(tiny, **changes)
    with pytest.raises(TrainingDiverged, match="not finite in epoch 1"):
        run(config, lambda event: None, threads=1)
    assert read_record(run_directory(config) / RECORD).state == "failed"


def test_codes_that_explode_after_training_are_a_failure_with_its_reason(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measuring.encode_all

    def exploded(vaes: Any, images: Any) -> Any:
        shift = 100 if len(images) == tiny.data.n_train else 0
        return [(mean, logvar + shift) for mean, logvar in real(vaes, images)]

    monkeypatch.setattr(measuring, "encode_all", exploded)
    with pytest.raises(VaeqError, match=r"logvar must be in \[-80, 80\]"):
        run(tiny, lambda event: None, threads=1)
    failure = read_record(run_directory(tiny) / RECORD).failure
    assert failure is not None
    assert "traceback" not in failure


def test_a_training_that_moves_no_weight_is_no_result(tiny: RunConfig) -> None:
    config = replace(tiny, learning_rate=1e-30)
    for _ in range(2):  # and is not taken up as one that is over
        with pytest.raises(
            NeverTrained, match=r"no weight moved in 2 epochs: .*learning_rate=1e-30"
        ):
            run(config, lambda event: None, threads=1)
        assert read_record(run_directory(config) / RECORD).state == "failed"
    runs, (excluded,) = read_runs([Path(config.outputs)])
    assert not runs
    assert excluded.kind == "failed"
    assert "no weight moved" in excluded.reason


@pytest.mark.parametrize("history", [{}, {"epoch": []}, {"epoch": [0]}, {"test_elbo": [-100.0]}])
def test_a_complete_record_without_epochs_is_neither_reported_nor_skipped(
    tiny: RunConfig, tmp_path: Path, history: dict[str, list[float]]
) -> None:
    record = run(tiny, lambda event: None, threads=1)
    directory = run_directory(tiny)
    write_record(directory, replace(record, history=history))
    assert complete_record(directory, tiny) is None
    runs, (excluded,) = read_runs([Path(tiny.outputs)])
    assert not runs
    assert "has no epochs in its history: it never trained" in excluded.reason
    again = run(tiny, lambda event: None, threads=1)
    assert again.estimates == record.estimates


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_run_at_epoch_0_is_no_result(tmp_path: Path, state: str) -> None:
    directory = tmp_path / "latent_dim=2,seed=0-0123abcd"
    directory.mkdir()
    write_status(directory, state, 0)
    runs, (excluded,) = read_runs([tmp_path])
    assert not runs
    assert excluded.kind in ("unfinished", "failed")
