"""AggregatedPosterior against torch.distributions, float64 loops, and what a density must do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vaeq.errors import InputError
from vaeq.posterior.aggregated import AggregatedPosterior

F64 = torch.float64


def codes(n: int, dims: int, seed: int = 0, dtype: torch.dtype = F64) -> AggregatedPosterior:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, dims, generator=generator, dtype=F64)
    logvar = torch.randn(n, dims, generator=generator, dtype=F64) - 1
    return AggregatedPosterior(mean.to(dtype), logvar.to(dtype))


def reference(posterior: AggregatedPosterior, z: torch.Tensor) -> torch.Tensor:
    """log q_N by torch.distributions, every component and dimension by itself, float64."""
    std = torch.exp(0.5 * posterior.logvar.double())
    mixture = MixtureSameFamily(
        Categorical(logits=torch.zeros(posterior.n, dtype=F64)),
        Independent(Normal(posterior.mean.double(), std), 1),
    )
    return mixture.log_prob(z.double())


@pytest.mark.parametrize(("n", "dims"), [(1, 1), (1, 5), (7, 1), (64, 2), (1000, 8), (333, 40)])
def test_log_prob_is_the_formula(n: int, dims: int) -> None:
    posterior = codes(n, dims)
    z, _ = posterior.sample(101, torch.Generator().manual_seed(1))
    expected = reference(posterior, z)
    torch.testing.assert_close(posterior.log_prob(z), expected, rtol=1e-12, atol=1e-11)


def test_log_prob_by_plain_loops() -> None:
    posterior = codes(5, 3)
    z, _ = posterior.sample(4, torch.Generator().manual_seed(1))
    for s in range(4):
        density = 0.0
        for i in range(5):
            product = 1.0
            for j in range(3):
                mean, variance = float(posterior.mean[i, j]), math.exp(posterior.logvar[i, j])
                distance = float(z[s, j]) - mean
                product *= math.exp(-0.5 * distance**2 / variance) / math.sqrt(
                    2 * math.pi * variance
                )
            density += product / 5
        assert float(posterior.log_prob(z)[s]) == pytest.approx(math.log(density), rel=1e-12)


def test_the_density_integrates_to_one() -> None:
    posterior = codes(6, 2)
    axis = torch.linspace(-16, 16, 641, dtype=F64)  # step 0.05, the narrowest σ is about 0.2
    grid = torch.cartesian_prod(axis, axis)
    assert float(posterior.log_prob(grid).exp().sum()) * 0.05**2 == pytest.approx(1.0, abs=1e-10)


def test_logvar_is_the_logarithm_of_the_variance() -> None:
    posterior = AggregatedPosterior(
        torch.zeros(1, 1, dtype=F64), torch.tensor([[math.log(4.0)]], dtype=F64)
    )
    z = torch.tensor([[0.0], [2.0]], dtype=F64)
    expected = torch.from_numpy(stats.norm(0, 2).logpdf(z[:, 0].numpy()))
    torch.testing.assert_close(posterior.log_prob(z), expected)


def test_float32_agrees_with_float64() -> None:
    exact = codes(2000, 8)
    single = AggregatedPosterior(exact.mean.float(), exact.logvar.float())
    z, _ = single.sample(500, torch.Generator().manual_seed(2))
    found = single.log_prob(z)
    assert found.dtype == torch.float32
    assert float((found - reference(single, z)).abs().max()) < 1e-4


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    n=st.integers(1, 40), dims=st.integers(1, 6), draws=st.integers(1, 30), seed=st.integers(0, 99)
)
def test_properties(n: int, dims: int, draws: int, seed: int) -> None:
    posterior = codes(n, dims, seed)
    generator = torch.Generator().manual_seed(seed)
    z, index = posterior.sample(draws, generator)
    found = posterior.log_prob(z)
    rows = torch.randperm(n, generator=generator)
    columns = torch.randperm(dims, generator=generator)

    def same(other: torch.Tensor) -> None:
        torch.testing.assert_close(other, found, rtol=1e-12, atol=1e-11)

    same(posterior.subset(rows).log_prob(z))  # the order of the images
    same(posterior.subset(torch.cat([rows, rows])).log_prob(z))  # every image twice
    turned = AggregatedPosterior(posterior.mean[:, columns], posterior.logvar[:, columns])
    same(turned.log_prob(z[:, columns]))  # the order of the dimensions
    same(torch.cat([posterior.log_prob(part) for part in z.split(7)]))  # the chunks of z
    shifted = AggregatedPosterior(posterior.mean + 3, posterior.logvar)
    same(shifted.log_prob(z + 3))
    # q_N >= q(·|xᵢ)/N for the component a draw came from.
    conditional = posterior.log_prob_conditional(z, index)
    assert bool((found >= conditional - math.log(n) - 1e-10).all())


def test_conditional_is_the_draws_own_component() -> None:
    posterior = codes(30, 4)
    z, index = posterior.sample(200, torch.Generator().manual_seed(3))
    std = torch.exp(0.5 * posterior.logvar[index])
    expected = Normal(posterior.mean[index], std).log_prob(z).sum(1)
    torch.testing.assert_close(posterior.log_prob_conditional(z, index), expected)


def test_marginal_is_the_one_dimensional_mixture() -> None:
    posterior = codes(50, 3)
    z, _ = posterior.sample(20, torch.Generator().manual_seed(4))
    found = posterior.log_prob_marginal(z)
    for j in range(3):
        one = AggregatedPosterior(posterior.mean[:, j : j + 1], posterior.logvar[:, j : j + 1])
        torch.testing.assert_close(found[:, j], reference(one, z[:, j : j + 1]))


def test_sample_draws_images_evenly_and_codes_from_their_gaussians() -> None:
    posterior = codes(10, 3)
    z, index = posterior.sample(50_000, torch.Generator().manual_seed(5))
    counts = torch.bincount(index, minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    noise = (z - posterior.mean[index]) * torch.exp(-0.5 * posterior.logvar[index])
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3


def test_sample_is_reproducible() -> None:
    posterior = codes(10, 3)
    first = posterior.sample(20, torch.Generator().manual_seed(6))
    again = posterior.sample(20, torch.Generator().manual_seed(6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    other = posterior.sample(20, torch.Generator().manual_seed(7))
    assert not torch.equal(first[0], other[0])


def test_moments_are_those_of_a_large_sample() -> None:
    posterior = codes(20, 3)
    mean, covariance = posterior.moments()
    z, _ = posterior.sample(400_000, torch.Generator().manual_seed(8))
    error = z.std(0) / math.sqrt(len(z))
    assert bool(((z.mean(0) - mean).abs() < 4 * error).all())
    products = (z - mean)[:, :, None] * (z - mean)[:, None, :]
    error = products.std(0) / math.sqrt(len(z))
    assert bool(((products.mean(0) - covariance).abs() < 4 * error).all())


def test_moments_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = codes(101, 3)
    whole = posterior.moments()
    for module in ("aggregated", "log_density"):  # the last chunk has one row
        monkeypatch.setattr(f"vaeq.posterior.{module}.chunk_rows", lambda dims: 10)
    for found, expected in zip(posterior.moments(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_subset_takes_indices_or_a_mask() -> None:
    posterior = codes(10, 2)
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[1, 4]] = True
    assert torch.equal(posterior.subset(mask).mean, posterior.subset(torch.tensor([1, 4])).mean)
    assert posterior.subset(mask).n == 2


@pytest.mark.parametrize(
    ("mean", "logvar", "message"),
    [
        (torch.zeros(3), torch.zeros(3), r"mean must have shape \(N, D\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "N >= 1"),
        (torch.zeros(3, 0), torch.zeros(3, 0), "D >= 1"),
        (torch.zeros(3, 2), torch.zeros(3, 1), r"same shape, got \(3, 2\) and \(3, 1\)"),
        (torch.zeros(3, 2).double(), torch.zeros(3, 2), "same dtype and device"),
        (torch.zeros(3, 2).int(), torch.zeros(3, 2), "mean must be float32 or float64"),
        ([[0.0]], torch.zeros(1, 1), "mean must be a torch.Tensor, got list"),
    ],
)
def test_bad_shapes_and_types_are_refused(mean: object, logvar: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AggregatedPosterior(mean, logvar)  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_are_counted_and_placed() -> None:
    logvar = torch.zeros(4, 2)
    logvar[2, 1] = math.nan
    logvar[3, 0] = math.inf
    with pytest.raises(InputError, match=r"logvar .* 2 NaN or infinite of 8 .* first at \[2, 1\]"):
        AggregatedPosterior(torch.zeros(4, 2), logvar)


def test_bad_points_and_counts_are_refused() -> None:
    posterior = codes(3, 2)
    with pytest.raises(InputError, match=r"z must have shape \(S, 2\), got \(5, 3\)"):
        posterior.log_prob(torch.zeros(5, 3))
    with pytest.raises(InputError, match="n_samples must be >= 1, got 0"):
        posterior.sample(0)
