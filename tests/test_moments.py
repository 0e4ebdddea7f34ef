"""moment_kl against the closed form of Gaussians and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch

from vaeq.divergence.moments import gaussian_kl, moment_kl
from vaeq.posterior.aggregated import AggregatedPosterior

F64 = torch.float64


def test_one_component_is_its_own_closed_form() -> None:
    mean = torch.tensor([[0.3, -1.2, 0.0]], dtype=F64)
    std = torch.tensor([[0.5, 1.7, 1.0]], dtype=F64)
    expected = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum()
    estimate = moment_kl(AggregatedPosterior(mean, 2 * std.log()))
    assert estimate.value == pytest.approx(float(expected), rel=1e-13)
    assert estimate.std_error == 0.0
    assert estimate.unit == "nats"


def test_prior_gives_zero() -> None:
    zeros = torch.zeros(7, 4)
    assert moment_kl(AggregatedPosterior(zeros, zeros)).value == 0.0


def test_against_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(500, 5, generator=generator, dtype=F64) @ torch.randn(
        5, 5, generator=generator, dtype=F64
    )
    logvar = torch.randn(500, 5, generator=generator, dtype=F64)
    covariance = torch.cov(mean.T, correction=0) + torch.diag(logvar.exp().mean(0))
    moments = torch.distributions.MultivariateNormal(mean.mean(0), covariance)
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(5, dtype=F64), torch.eye(5, dtype=F64)
    )
    expected = float(torch.distributions.kl_divergence(moments, prior))
    assert moment_kl(AggregatedPosterior(mean, logvar)).value == pytest.approx(expected, rel=1e-11)


def test_matched_moments_hide_the_holes() -> None:
    # N(±a, 1 − a²) mixed evenly has mean 0 and variance 1 whatever a is.
    a = 0.99
    mean = torch.tensor([[a], [-a]], dtype=F64)
    logvar = torch.full((2, 1), math.log(1 - a * a), dtype=F64)
    assert moment_kl(AggregatedPosterior(mean, logvar)).value == pytest.approx(0.0, abs=1e-15)


def test_no_cancellation_near_the_prior() -> None:
    # KL(N(0, (1 + e)²) ‖ N(0, 1)) = e² + O(e³) is far below the rounding of tr C − D − log det C.
    e = 1e-9
    covariance = torch.eye(3, dtype=F64) * (1 + e) ** 2
    assert gaussian_kl(torch.zeros(3, dtype=F64), covariance) == pytest.approx(3 * e * e, rel=1e-5)


def test_singular_as_far_as_float64_can_tell() -> None:
    mean = torch.linspace(-1, 1, 5, dtype=F64)[:, None] * torch.tensor(
        [[1.0, 2.0, -1.0]], dtype=F64
    )
    estimate = moment_kl(AggregatedPosterior(mean, torch.full_like(mean, -50.0)))
    assert estimate.value is None
    assert estimate.reason == "the covariance of q_N is singular in float64"
