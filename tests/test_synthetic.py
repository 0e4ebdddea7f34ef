"""Images from a probabilistic PCA model: its truth is found again, from drawing to record."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vaeq.config import DataConfig, GenerationConfig, MeasureConfig, RunConfig
from vaeq.data.synthetic import draw_images, true_model
from vaeq.experiment import run


@pytest.mark.parametrize("signal", [4.0, 100.0])
def test_the_images_have_the_moments_of_the_model_rounding_included(signal: float) -> None:
    model = true_model(3, 6, signal, seed=1)
    train, test = draw_images(3, 6, signal, seed=1)
    assert train.shape == (60_000, 36)
    assert test.shape == (10_000, 36)
    assert not torch.equal(train[:10], test[:10])
    x = train.double() / 255
    covariance = model.weight @ model.weight.T
    covariance.diagonal().add_(model.noise_variance)
    variance = covariance.diagonal()
    n = len(x)
    assert ((x.mean(0) - 0.5).abs() < 5 * (variance / n).sqrt()).all()
    # Var(sample covariance) = (c_jk² + c_jj c_kk)/N of a Gaussian; 666 entries, hence five errors.
    error = ((covariance.square() + variance[:, None] * variance) / n).sqrt()
    assert ((x.T.cov() - covariance).abs() < 5 * error).all()
    # s² is what is left in the 33 other directions; a mean of 33 N squares tells it to this:
    error_of_noise = model.noise_variance * (2 / (33 * n)) ** 0.5
    noise = float(torch.linalg.eigvalsh(x.T.cov())[:33].mean())
    assert noise == pytest.approx(model.noise_variance, abs=5 * error_of_noise)
    if signal == 100:
        # Sharp enough to see the rounding in it.
        assert 5 * error_of_noise < 1 / (12 * 255**2)


def test_ppca_on_its_own_images_finds_its_truth_from_end_to_end(tmp_path: Path) -> None:
    config = RunConfig(
        model="ppca",
        latent_dim=4,
        outputs=str(tmp_path),
        device="cpu",
        data=DataConfig(name="synthetic_ppca"),
        measure=MeasureConfig(panel="decomposition", n_samples=5000),
        generation=GenerationConfig(n_importance=None, quality=False),
    )
    record = run(config, lambda event: None, threads=1)
    value = {name: entry["value"] for name, entry in record.estimates.items()}
    error = {name: entry["std_error"] for name, entry in record.estimates.items()}
    model = true_model(4, 8, 4.0, seed=0)

    # KL(q ‖ p) = 0; of N images' mixture E KL(q_N ‖ p) <= (Π (1 + signal) − 1)/2N = 0.0052 nats.
    assert value["moment_kl"] == pytest.approx(0, abs=1e-9)
    assert -4 * error["marginal_kl"] < value["marginal_kl"] < 0.0052 + 4 * error["marginal_kl"]
    assert value["dimension_kl_max"] < 1e-4
    assert value["active_units"] == 4
    assert value["inference_gap"] == 0

    # E KL(q(z|x) ‖ p) = ½ Σ log(λ_j/s²), and each log λ_j has a variance of 2/N.
    kl = 0.5 * 4 * math.log(1 + 4.0)
    assert value["kl_per_image"] == pytest.approx(kl, abs=5 * 0.5 * (4 * 2 / 60_000) ** 0.5)

    # Held-out: −½ (pixels log 2πe + log|C|), the log density of an image having variance pixels/2.
    covariance = model.weight @ model.weight.T
    covariance.diagonal().add_(model.noise_variance)
    entropy = 0.5 * (64 * math.log(2 * math.pi * math.e) + float(covariance.logdet()))
    assert value["log_likelihood"] == pytest.approx(-entropy, abs=4 * (64 / 2 / 10_000) ** 0.5)
    assert value["elbo"] == pytest.approx(value["log_likelihood"], abs=1e-9)
    assert record.provenance["data"]["name"] == "synthetic_ppca"


def test_fewer_images_leave_a_larger_mixture_error(tmp_path: Path) -> None:
    found = {}
    for n in (1000, 10_000):
        config = RunConfig(
            model="ppca",
            latent_dim=4,
            outputs=str(tmp_path),
            device="cpu",
            data=DataConfig(name="synthetic_ppca", n_train=n),
            measure=MeasureConfig(panel="decomposition", n_samples=5000),
            generation=GenerationConfig(n_importance=None, quality=False),
        )
        record = run(config, lambda event: None, threads=1)
        found[n] = record.estimates["marginal_kl"]
    # About 624/2N nats: 0.31 and 0.03.
    gap = found[1000]["value"] - found[10_000]["value"]
    assert gap > 4 * math.hypot(found[1000]["std_error"], found[10_000]["std_error"])
