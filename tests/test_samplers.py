"""Where codes come from, and the paths between them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from vaeq.divergence.densities import Chart, Charted, Gaussian, GaussianMixture
from vaeq.divergence.ex_post import fit_ex_post
from vaeq.errors import InputError
from vaeq.generation.samplers import (
    SOURCES,
    as_uint8,
    decode_means,
    interpolations,
    latent_plane,
    samplers,
    spherical,
)
from vaeq.posterior.aggregated import AggregatedPosterior


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_clusters(n: int = 3000) -> AggregatedPosterior:
    """Means at ±2 on the first axis, a second axis that carries nothing but N(0, 1)."""
    side = 4.0 * torch.randint(2, (n,), generator=generator(1)) - 2
    mean = torch.stack([side + 0.3 * torch.randn(n, generator=generator(2)), torch.zeros(n)], 1)
    logvar = torch.tensor([[math.log(0.04), 0.0]]).expand(n, -1)
    return AggregatedPosterior(mean, logvar.contiguous())


def kolmogorov(values: Tensor, posterior: AggregatedPosterior, dimension: int) -> float:
    """p-value of draws against the exact mixture's distribution function."""
    mean = posterior.mean[:, dimension].double().numpy()
    std = (0.5 * posterior.logvar[:, dimension]).exp().double().numpy()
    line = torch.linspace(-6, 6, 2001).double().numpy()
    cdf = stats.norm.cdf((line[:, None] - mean) / std).mean(1)
    return float(stats.kstest(values.double().numpy(), lambda v: np.interp(v, line, cdf)).pvalue)


def test_each_source_has_its_distribution() -> None:
    posterior = two_clusters()
    found = fit_ex_post(posterior, generator())
    sources = samplers(posterior, found, scale=0.5)
    assert tuple(sources) == SOURCES
    codes = {name: draw(4000, generator(i)) for i, (name, draw) in enumerate(sources.items())}
    assert all(z.shape == (4000, 2) and z.dtype == torch.float32 for z in codes.values())
    for j in range(2):
        assert stats.kstest(codes["prior"][:, j].numpy(), "norm").pvalue > 1e-3
        assert stats.kstest(codes["scaled"][:, j].numpy() / 0.5, "norm").pvalue > 1e-3
        assert kolmogorov(codes["aggregated"][:, j], posterior, j) > 1e-3
        assert kolmogorov(codes["gmm"][:, j], posterior, j) > 1e-3
    assert found.components > 1  # two clusters are no Gaussian


def test_the_same_generator_gives_the_same_codes() -> None:
    posterior = two_clusters(300)
    sources = samplers(posterior, fit_ex_post(posterior, generator()))
    for draw in sources.values():
        assert torch.equal(draw(5, generator(3)), draw(5, generator(3)))


def test_a_gaussian_population_gets_a_good_density_and_validation_says_which() -> None:
    mean = 0.8 * torch.randn(4000, 3, generator=generator())
    posterior = AggregatedPosterior(mean, torch.full_like(mean, math.log(0.36)))
    found = fit_ex_post(posterior, generator(1))
    assert found.validation[found.components] == max(found.validation.values())
    assert set(found.validation) == {1, 10, 30, 100}
    # −E log N(0, I) = D/2 (1 + log 2π), the entropy: no density does better in the mean.
    entropy = 1.5 * (1 + math.log(2 * math.pi))
    assert found.validation[1] == pytest.approx(-entropy, abs=4 * math.sqrt(1.5 / 666))


def test_codes_without_structure_and_single_images_get_the_gaussian() -> None:
    collapsed = AggregatedPosterior(torch.zeros(100, 2), torch.zeros(100, 2))
    assert fit_ex_post(collapsed, generator()).components == 1
    single = AggregatedPosterior(torch.zeros(1, 2), torch.zeros(1, 2))
    found = fit_ex_post(single, generator())
    assert found.components == 1
    assert found.density.sample(3, generator()).shape == (3, 2)


@pytest.mark.parametrize("diagonal", [False, True])
def test_samples_of_a_mixture_have_its_moments(diagonal: bool) -> None:
    weight = torch.tensor([0.3, 0.7]).double()
    mean = torch.tensor([[1.0, -1.0], [-0.5, 2.0]]).double()
    covariance = torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[1.0, -0.6], [-0.6, 0.8]]]).double()
    if diagonal:
        covariance = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    short = covariance.diagonal(dim1=1, dim2=2).contiguous() if diagonal else covariance
    z = GaussianMixture("m", weight, mean, short).sample(60_000, generator())
    centre = weight @ mean
    offset = mean - centre
    total = (weight[:, None, None] * (covariance + offset[:, :, None] * offset[:, None, :])).sum(0)
    error = 5 * math.sqrt(float(total.max()) / 60_000)
    torch.testing.assert_close(z.mean(0), centre, atol=error, rtol=0)
    torch.testing.assert_close(z.T.cov(), total, atol=4 * error, rtol=0)


def test_samples_of_a_density_are_as_likely_as_its_entropy_says() -> None:
    # E log r(z) of its own draws is minus its entropy: for a Gaussian known in closed form.
    covariance = torch.tensor([[2.0, 0.5], [0.5, 0.3]]).double()
    gaussian = Gaussian("g", torch.tensor([3.0, -1.0]).double(), covariance)
    log_r = gaussian.log_prob(gaussian.sample(20_000, generator()))
    entropy = 1 + math.log(2 * math.pi) + 0.5 * float(covariance.logdet())
    assert float(log_r.mean()) == pytest.approx(-entropy, abs=4 / math.sqrt(20_000))
    # In a chart the passive dimension and the Jacobian belong to it.
    chart = Chart(two_clusters(500))
    inner = GaussianMixture("i", torch.ones(1).double(), torch.zeros(1, 1).double(),
                            torch.ones(1, 1).double())  # fmt: skip
    charted = Charted("c", chart, inner)
    log_r = charted.log_prob(charted.sample(20_000, generator(1)))
    std = two_clusters(500).moments()[1].diagonal().sqrt()
    entropy = 1 + math.log(2 * math.pi) + float(std.log().sum())
    assert float(log_r.mean()) == pytest.approx(-entropy, abs=4 / math.sqrt(20_000))


def test_the_plane_has_equal_mass_in_every_cell_and_points_up() -> None:
    means = latent_plane(lambda z: z, 2, 4)
    z = torch.logit(means.double())
    first = torch.from_numpy(stats.norm.ppf([0.125, 0.375, 0.625, 0.875]))
    torch.testing.assert_close(z[:4, 0], first, atol=1e-5, rtol=0)  # a row goes right
    torch.testing.assert_close(z[::4, 1], first.flip(0), atol=1e-5, rtol=0)  # a column goes down
    with pytest.raises(InputError, match="latent_plane needs latent_dim = 2, got 8"):
        latent_plane(lambda z: z, 8)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), dims=st.integers(1, 6), steps=st.integers(2, 7))
def test_a_path_joins_its_ends_and_never_leaves_their_range_of_lengths(
    seed: int, dims: int, steps: int
) -> None:
    start, end = torch.randn(2, 3, dims, generator=generator(seed), dtype=torch.float64)
    path = spherical(start, end, steps)
    torch.testing.assert_close(path[:, 0], start)
    torch.testing.assert_close(path[:, -1], end)
    lengths = path.norm(dim=2)
    assert (lengths <= torch.maximum(start.norm(dim=1), end.norm(dim=1))[:, None] + 1e-9).all()
    if dims > 1:
        shortest = torch.minimum(start.norm(dim=1), end.norm(dim=1))[:, None]
        assert (lengths >= shortest - 1e-6).all()


def test_a_quarter_turn_has_its_middle_on_the_circle() -> None:
    middle = spherical(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 3)[0, 1]
    torch.testing.assert_close(middle, torch.full((2,), math.sqrt(0.5)))


@pytest.mark.parametrize("end", [[-1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
def test_without_a_turn_the_path_is_straight(end: list[float]) -> None:
    path = spherical(torch.tensor([[1.0, 0.0]]), torch.tensor([end]), 5)[0]
    expected = torch.linspace(1, end[0], 5)
    torch.testing.assert_close(path, torch.stack([expected, torch.zeros(5)], 1))


def test_pictures_are_means_in_grey() -> None:
    pairs = torch.randn(2, 2, 3, generator=generator())
    means = interpolations(lambda z: z.repeat(1, 2), pairs, 4)
    assert means.shape == (8, 6)
    torch.testing.assert_close(means[0], decode_means(lambda z: z.repeat(1, 2), pairs[:1, 0])[0])
    assert as_uint8(torch.tensor([0.0, 0.5, 1.0, 0.001])).tolist() == [0, 128, 255, 0]
    with pytest.raises(InputError, match="mean_pairs must have shape"):
        interpolations(lambda z: z, pairs[0], 4)


def test_a_scale_must_be_positive() -> None:
    posterior = two_clusters(30)
    with pytest.raises(InputError, match="scale must be > 0, got 0"):
        samplers(posterior, fit_ex_post(posterior, generator()), scale=0)
