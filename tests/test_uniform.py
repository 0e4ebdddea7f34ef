"""The uniform view: exact bins against scipy, flat for the prior, a lower bound of the KL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vaeq.divergence import marginals
from vaeq.divergence.uniform import uniform_view
from vaeq.errors import InputError
from vaeq.posterior.aggregated import AggregatedPosterior


def random_posterior(n: int, dims: int, seed: int) -> AggregatedPosterior:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, dims, generator=generator, dtype=torch.float64)
    return AggregatedPosterior(mean, torch.randn(n, dims, generator=generator).double() - 1)


def test_the_prior_is_flat() -> None:
    view = uniform_view(AggregatedPosterior(torch.zeros(3, 2), torch.zeros(3, 2)), 10)
    np.testing.assert_allclose(view.mass, np.full((2, 10), 0.1), atol=1e-12)
    assert view.total_variation == pytest.approx([0, 0], abs=1e-12)
    assert view.edges == pytest.approx(np.linspace(0, 1, 11).tolist())


def test_bins_are_those_of_the_exact_mixture() -> None:
    q = random_posterior(5, 2, 0)
    view = uniform_view(q, 7)
    edges = stats.norm.ppf(np.linspace(0, 1, 8))
    for j in range(2):
        mean, std = q.mean[:, j].numpy(), np.exp(0.5 * q.logvar[:, j].numpy())
        cdf = stats.norm.cdf(edges[:, None], mean, std).mean(1)
        np.testing.assert_allclose(view.mass[j], np.diff(cdf), rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 2**31))
def test_the_view_loses_information_and_never_invents_it(n: int, dims: int, seed: int) -> None:
    q = random_posterior(n, dims, seed)
    coarse, fine = (np.array(uniform_view(q, bins).total_variation) for bins in (10, 20))
    exact = np.array(marginals(q)["kl"])
    # Merging bins can only lower the distance, and Pinsker bounds it by the KL.
    assert (fine >= coarse - 1e-12).all()
    assert (2 * fine**2 <= exact + 1e-9).all()
    np.testing.assert_allclose(np.sum(uniform_view(q, 10).mass, axis=1), 1)


def test_many_bins_approach_the_total_variation_of_the_dimension() -> None:
    q = AggregatedPosterior(torch.tensor([[0.5]]), torch.tensor([[0.0]]))
    # Two unit normals half apart: TV = 2Φ(1/4) − 1.
    truth = 2 * stats.norm.cdf(0.25) - 1
    assert uniform_view(q, 4000).total_variation[0] == pytest.approx(truth, abs=1e-3)


def test_one_bin_is_no_view() -> None:
    with pytest.raises(InputError, match="bins must be >= 2, got 1"):
        uniform_view(random_posterior(2, 1, 0), 1)
