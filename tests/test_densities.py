"""Densities fitted to codes: their formulas, that they integrate to one and find the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from vaeq.divergence.densities import (
    Chart,
    Charted,
    Density,
    Gaussian,
    GaussianMixture,
    SmoothedMixture,
    Stack,
    draw,
    stack_weights,
)
from vaeq.divergence.stepwise_em import fit_gaussian_mixture
from vaeq.errors import InputError
from vaeq.posterior.aggregated import AggregatedPosterior


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def covariances(count: int, dims: int, seed: int = 0) -> Tensor:
    root = normal(count, dims, dims, seed=seed)
    return root @ root.mT / dims + 0.1 * torch.eye(dims, dtype=torch.float64)


def codes(n: int, dims: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(n, dims, seed=seed).float(), (normal(n, dims, seed=seed + 1) - 2).float()


def test_a_gaussian_agrees_with_torch() -> None:
    mean, covariance, z = normal(4), covariances(1, 4)[0], normal(9, 4, seed=1)
    expected = MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(Gaussian("g", mean, covariance).log_prob(z), expected)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_mixture_agrees_with_torch(diagonal: bool) -> None:
    weight, mean, z = (
        torch.tensor([0.2, 0.5, 0.3]).double(),
        normal(3, 4),
        3 * normal(50, 4, seed=1),
    )
    covariance = covariances(3, 4)
    if diagonal:
        covariance = covariance.diagonal(dim1=1, dim2=2).contiguous()
    full = torch.diag_embed(covariance) if diagonal else covariance
    expected = MixtureSameFamily(Categorical(weight), MultivariateNormal(mean, full)).log_prob(z)
    mixture = GaussianMixture("m", weight, mean, covariance)
    torch.testing.assert_close(mixture.log_prob(z), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("diagonal", [False, True])
def test_the_smoothed_mixture_agrees_with_a_loop_over_images(
    smoothing: float, diagonal: bool
) -> None:
    mean, logvar = (part.double() for part in codes(12, 3))
    covariance = covariances(2, 3)
    if diagonal:
        covariance = covariance.diagonal(dim1=1, dim2=2).contiguous()
    clusters = GaussianMixture("c", torch.tensor([0.4, 0.6]).double(), normal(2, 3, seed=5),
                               covariance)  # fmt: skip
    spread = covariance if diagonal else covariance.diagonal(dim1=1, dim2=2)
    z = normal(6, 3, seed=7)
    density = torch.zeros(6, dtype=torch.float64)
    for centre, variance, k in zip(mean, logvar.exp(), clusters.assign(mean), strict=True):
        moved = clusters.mean[k] + math.sqrt(1 - smoothing) * (centre - clusters.mean[k])
        widened = torch.diag(variance + smoothing * spread[k])
        density += MultivariateNormal(moved, widened).log_prob(z).exp() / 12
    found = SmoothedMixture(smoothing, clusters, mean, logvar)
    torch.testing.assert_close(found.log_prob(z), density.log(), rtol=1e-6, atol=1e-6)


def test_smoothing_keeps_the_variance_of_a_cluster() -> None:
    mean, logvar = (part.double() for part in codes(4000, 2))
    mean = mean * torch.tensor([0.5, 2.0]).double()
    within = (mean - mean.mean(0)).T @ (mean - mean.mean(0)) / 4000
    one = torch.ones(1, dtype=torch.float64)
    cluster = GaussianMixture("c", one, mean.mean(0)[None], within[None])
    # Var = (1 − h²) Var μ + mean σ² + h² C, C = Var μ.
    x = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    for smoothing in (0.0, 0.5):
        found = SmoothedMixture(smoothing, cluster, mean, logvar)
        line = torch.stack([torch.zeros_like(x), x], 1)
        # The second coordinate's marginal: a one-dimensional mixture of the same form.
        column = GaussianMixture("c", one, mean.mean(0)[None, 1:], within[None, 1:, 1:])
        marginal = SmoothedMixture(smoothing, column, mean[:, 1:], logvar[:, 1:])
        density = marginal.log_prob(line[:, 1:]).exp()
        centre = float(torch.trapezoid(density * x, x))
        variance = float(torch.trapezoid(density * (x - centre) ** 2, x))
        expected = float(within[1, 1] + logvar[:, 1].exp().mean())
        assert variance == pytest.approx(expected, rel=1e-5)
        assert found.log_prob(line).isfinite().all()


def fitted(mean: Tensor, logvar: Tensor) -> list[Density]:
    posterior = AggregatedPosterior(mean, logvar)
    chart = Chart(posterior)
    x, spread = chart.codes(posterior)
    full = fit_gaussian_mixture(x, spread, 3, diagonal=False, generator=generator())
    diagonal = fit_gaussian_mixture(x, spread, 3, diagonal=True, generator=generator())
    parts: list[Density] = [full, diagonal, SmoothedMixture(0.2, full, x, spread)]
    charted: list[Density] = [Charted(part.name, chart, part) for part in parts]
    return [*charted, Stack("s", charted, torch.tensor([0.2, 0.3, 0.5]).double())]


def test_every_density_integrates_to_one_in_one_dimension() -> None:
    mean, logvar = codes(200, 1)
    line = torch.linspace(-60, 60, 40_001, dtype=torch.float64)[:, None]
    for density in fitted(3 * mean + 1, logvar):
        mass = torch.trapezoid(density.log_prob(line).exp(), line[:, 0])
        assert float(mass) == pytest.approx(1, abs=1e-5), density.name


def test_every_density_integrates_to_one_with_a_passive_dimension() -> None:
    mean, logvar = codes(200, 2)
    mean[:, 1], logvar[:, 1] = 0.5, math.log(0.49)  # carries nothing: left to N(0.5, 0.7²)
    axis = torch.linspace(-14, 14, 701, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for density in fitted(mean, logvar):
        mass = float(density.log_prob(grid).exp().sum()) * float(axis[1] - axis[0]) ** 2
        assert mass == pytest.approx(1, abs=1e-4), density.name


def test_the_passive_dimensions_are_those_that_the_means_do_not_use() -> None:
    mean, logvar = codes(500, 3)
    mean[:, 1], logvar[:, 1] = 4.0, -3.0
    chart = Chart(AggregatedPosterior(mean, logvar))
    assert chart.active.tolist() == [0, 2]
    x, _ = chart.codes(AggregatedPosterior(mean, logvar))
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=1e-5, rtol=0)


def test_em_finds_a_mixture_that_is_there() -> None:
    # Three clusters of means; q is the mixture of N(m_k, (0.2² + 0.1²) I), known.
    centres = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.0]])
    which = torch.randint(3, (6000,), generator=generator(1))
    mean = centres[which] + 0.2 * torch.randn(6000, 2, generator=generator(2))
    logvar = torch.full((6000, 2), 2 * math.log(0.1))
    found = fit_gaussian_mixture(mean, logvar, 3, diagonal=False, generator=generator(3))
    variance = torch.full((3, 2), 0.05, dtype=torch.float64)
    truth = GaussianMixture("t", torch.full((3,), 1 / 3).double(), centres.double(), variance)
    fresh = centres[torch.randint(3, (5000,), generator=generator(4))].double()
    z = fresh + math.sqrt(0.05) * normal(5000, 2, seed=5)
    gap = truth.log_prob(z) - found.log_prob(z)
    # KL(truth ‖ found): 17 parameters cost 17/(2·6000), the prior on covariances a little more.
    assert -4 * float(gap.std()) / math.sqrt(5000) < float(gap.mean()) < 0.02


def test_the_same_generator_gives_the_same_fit() -> None:
    mean, logvar = codes(300, 2)
    z = normal(10, 2, seed=3)
    first, second = (
        fit_gaussian_mixture(mean, logvar, 4, diagonal=True, generator=generator(9)).log_prob(z)
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_more_components_than_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"components must be in \[1, 3\], got 4"):
        fit_gaussian_mixture(*codes(3, 2), 4, diagonal=True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_stack_weights_are_the_best_convex_combination(seed: int) -> None:
    table = 2 * normal(200, 3, seed=seed)
    weight = stack_weights(table, 5000)
    assert float(weight.sum()) == pytest.approx(1)

    def loss(free: np.ndarray) -> float:
        share = torch.softmax(torch.tensor(free), 0)
        return -float((table + share.log()).logsumexp(1).mean())

    best = min(minimize(loss, start, method="Nelder-Mead", options={"maxiter": 4000}).fun
               for start in (np.zeros(3), np.array([3.0, 0, 0])))  # fmt: skip
    assert -float((table + weight.log()).logsumexp(1).mean()) <= best + 1e-4


def test_draws_have_the_moments_of_their_codes() -> None:
    mean, logvar = torch.full((40_000, 1), 2.0), torch.full((40_000, 1), math.log(0.25))
    z = draw(mean, logvar, generator())
    assert float(z.mean()) == pytest.approx(2, abs=4 * 0.5 / 200)
    assert float(z.var()) == pytest.approx(0.25, abs=4 * 0.25 * math.sqrt(2 / 40_000))
