"""The decoder's side of a run: what is asked of it arrives in the record, and fits together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from vaeq.config import DataConfig, GenerationConfig, RunConfig
from vaeq.experiment import run
from vaeq.runs.record import CACHE, PICTURES, RunRecord, run_directory


def finished(config: RunConfig) -> tuple[RunRecord, dict[str, float]]:
    record = run(config, lambda event: None, threads=1)
    return record, {name: entry["value"] for name, entry in record.estimates.items()}


def test_the_likelihood_and_what_a_better_prior_would_gain(tiny: RunConfig) -> None:
    asked = GenerationConfig(n_importance=50, likelihood_images=200, ais_images=4, quality=False)
    record, value = finished(replace(tiny, epochs=4, generation=asked))
    # All over the 200 held-out images; elbo has draws of its own.
    names = ("log_likelihood", "elbo", "inference_gap")
    error = sum(record.estimates[name]["std_error"] ** 2 for name in names) ** 0.5
    gap = value["log_likelihood"] - value["elbo"]
    assert gap == pytest.approx(value["inference_gap"], abs=4 * error)
    assert value["inference_gap"] > 0
    cost = value["log_likelihood_ex_post"] - value["log_likelihood"]
    assert cost == pytest.approx(value["prior_cost"], abs=1e-9)
    difference = value["ais_log_likelihood"] - value["importance_log_likelihood"]
    assert difference == pytest.approx(value["ais_gap"], abs=1e-9)
    assert 1 <= value["importance_ess"] <= 50


def test_quality_needs_a_classifier_worth_the_name(tiny: RunConfig) -> None:
    record, value = finished(
        replace(tiny, generation=GenerationConfig(n_importance=None, quality=True))
    )
    # 600 images do not make one.
    assert value["fid_prior"] is None
    assert "its features need 99%" in record.estimates["fid_prior"]["reason"]
    assert record.settings["generation"]["classifier"]["accuracy"] < 0.99
    assert "log_likelihood" not in value
    cache = Path(tiny.outputs) / CACHE
    assert len(list(cache.glob("classifier-*.safetensors"))) == 1


@pytest.mark.slow
def test_samples_of_the_aggregated_posterior_are_the_better_ones(tmp_path: Path) -> None:
    config = RunConfig(
        latent_dim=8, encoder_width=200, decoder_width=200, epochs=1, outputs=str(tmp_path)
    )
    config = replace(config, measure=replace(config.measure, panel="decomposition"))
    record, value = finished(replace(config, generation=GenerationConfig(n_importance=None)))
    mismatch = record.estimates["quality_mismatch"]
    assert mismatch["value"] == pytest.approx(value["fid_prior"] - value["fid_aggregated"])
    assert mismatch["value"] > 4 * mismatch["std_error"] > 0
    # The floor is far below anything a decoder reaches after an epoch.
    assert 0 < value["fid_train"] < 0.1 * value["fid_aggregated"]
    assert record.settings["generation"]["classifier"]["accuracy"] >= 0.99


def test_pictures_are_kept_for_the_report(tiny: RunConfig) -> None:
    finished(tiny)
    shapes = {n: v.shape for n, v in load_file(run_directory(tiny) / PICTURES).items()}
    sources = dict.fromkeys(("prior", "aggregated", "gmm", "scaled"), (64, 28, 28))
    others = {"originals": (20, 28, 28), "reconstructions": (20, 28, 28)}
    others |= {"interpolations": (60, 28, 28), "plane": (400, 28, 28)}
    assert shapes == sources | others
    wide = replace(tiny, latent_dim=3)
    finished(wide)
    assert "plane" not in load_file(run_directory(wide) / PICTURES)


def test_probabilistic_pca_is_a_run_like_others(tiny: RunConfig) -> None:
    config = replace(tiny, model="ppca", latent_dim=3, data=DataConfig(n_train=3000, n_test=500))
    record, value = finished(config)
    assert record.state == "complete"
    assert value["inference_gap"] == 0
    assert value["log_likelihood"] == pytest.approx(value["elbo"], rel=1e-9)
    # At the maximum of the likelihood q_N has the moments of N(0, I), exactly.
    assert value["moment_kl"] == pytest.approx(0, abs=1e-6)
    assert value["marginal_kl"] > 0
    em = record.settings["em"]
    assert em["converged"]
    assert em["closed_form_gap_nats"] == pytest.approx(0, abs=1e-6)
    assert em["covariance_gap"] < 1e-6
    trace = torch.tensor(record.history["train_elbo"])
    assert bool((trace.diff() > -1e-9 * trace.abs().max()).all())
    again, _ = finished(config)
    assert again == record
