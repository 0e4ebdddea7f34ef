"""KL(p ‖ q_N) and its effective number of components, against closed forms and quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from vaeq.divergence.reverse import reverse_marginal_kl
from vaeq.errors import InputError
from vaeq.posterior.aggregated import AggregatedPosterior


def posterior(mean: object, std: object) -> AggregatedPosterior:
    means = torch.as_tensor(mean, dtype=torch.float64)
    stds = torch.as_tensor(std, dtype=torch.float64).expand_as(means)
    return AggregatedPosterior(means.clone(), 2 * stds.log())


def estimate(q: AggregatedPosterior, n: int = 20_000, seed: int = 0) -> tuple[float, float, float]:
    found = reverse_marginal_kl(q, n, torch.Generator().manual_seed(seed))
    kl, ess = found["reverse_marginal_kl"], found["reverse_marginal_kl_ess"]
    assert kl.value is not None
    assert kl.std_error is not None
    assert ess.value is not None
    return kl.value, kl.std_error, ess.value


def test_one_gaussian_in_closed_form() -> None:
    mean, std = torch.tensor([[0.5, -1.0, 0.0]]), torch.tensor([[0.7, 1.3, 1.0]])
    # KL(N(0, 1) ‖ N(m, s²)) = log s + (1 + m²)/(2s²) − ½, summed over dimensions.
    truth = (std.log() + (1 + mean**2) / (2 * std**2) - 0.5).sum().item()
    value, error, ess = estimate(posterior(mean, std))
    assert error < 1e-9
    assert value == pytest.approx(truth, abs=1e-6)
    assert ess == pytest.approx(1)


def test_the_prior_itself_is_at_no_distance() -> None:
    value, error, ess = estimate(posterior(torch.zeros(7, 4), 1.0))
    assert value == pytest.approx(0, abs=1e-9)
    assert error == pytest.approx(0, abs=1e-9)
    # Seven components that are the same share every draw equally.
    assert ess == pytest.approx(7)


def test_two_components_against_quadrature() -> None:
    means, stds = np.array([-1.0, 1.5]), np.array([0.6, 0.9])

    def density(t: float) -> float:
        return float(stats.norm.pdf(t, means, stds).mean())

    def squares(t: float) -> float:
        parts = stats.norm.pdf(t, means, stds)
        return float(parts.sum() ** 2 / (parts**2).sum())

    def prior(t: float) -> float:
        return float(stats.norm.pdf(t))

    kl = integrate.quad(lambda t: prior(t) * math.log(prior(t) / density(t)), -9, 9)[0]
    mean_ess = integrate.quad(lambda t: prior(t) * squares(t), -9, 9)[0]
    q = posterior(means[:, None], torch.tensor(stds)[:, None])
    value, error, ess = estimate(q)
    assert abs(value - kl) < 4 * error
    assert ess == pytest.approx(mean_ess, abs=0.02)


@pytest.mark.parametrize("draws", [80, 2000])
def test_the_interval_covers_the_truth(draws: int) -> None:
    """On a product of two mixtures, so that quadrature gives the truth; plain and regressed."""
    means, stds = torch.tensor([-0.9, 0.2, 1.1]), torch.tensor([0.7, 0.5, 0.6])
    mean, std = (torch.cartesian_prod(side, side) for side in (means, stds))
    parts = stats.norm(means.double().numpy(), stds.double().numpy())

    def integrand(t: float) -> float:
        return float(stats.norm.pdf(t) * (stats.norm.logpdf(t) - np.log(parts.pdf(t).mean())))

    truth = 2 * integrate.quad(integrand, -9, 9)[0]
    hits = 0
    for seed in range(200):
        value, error, _ = estimate(posterior(mean, std), draws, seed)
        hits += abs(value - truth) <= 2 * error
    # Binomial(200, 0.954) lies within these bounds with probability 0.998.
    assert 181 <= hits <= 199


def test_one_gaussian_is_found_without_noise() -> None:
    """log p − log q is a polynomial that the controls hold: nothing is left to chance."""
    q = posterior([[0.4, -0.2]], 0.8)
    truth = 2 * math.log(0.8) + (2 + 0.4**2 + 0.2**2) / (2 * 0.64) - 1
    value, error, _ = estimate(q, 400)
    assert value == pytest.approx(truth, abs=1e-9)
    assert error < 1e-9


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31))
def test_duplicating_or_permuting_images_changes_nothing(n: int, dims: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, dims, generator=generator, dtype=torch.float64)
    std = torch.rand(n, dims, generator=generator, dtype=torch.float64) + 0.2
    plain = estimate(posterior(mean, std), 50, seed)
    order = torch.randperm(2 * n, generator=generator)
    doubled = estimate(posterior(mean.repeat(2, 1)[order], std.repeat(2, 1)[order]), 50, seed)
    assert doubled[:2] == pytest.approx(plain[:2], rel=1e-9, abs=1e-9)
    assert doubled[2] == pytest.approx(2 * plain[2], rel=1e-9)


def test_one_draw_has_no_error_and_none_is_refused() -> None:
    q = posterior([[0.0]], 1.0)
    assert reverse_marginal_kl(q, 1)["reverse_marginal_kl"].std_error is None
    with pytest.raises(InputError, match="n_samples must be >= 1, got 0"):
        reverse_marginal_kl(q, 0)
