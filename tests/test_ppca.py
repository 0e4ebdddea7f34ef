"""Probabilistic PCA against its closed form, and the whole engine against it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal

import vaeq
from vaeq.data.images import Images
from vaeq.errors import InputError
from vaeq.generation.likelihood import log_likelihood
from vaeq.models.elbo import gaussian_kl
from vaeq.models.ppca import PPCA, fit_ppca
from vaeq.posterior.aggregated import AggregatedPosterior


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def from_the_model(n: int, seed: int = 0) -> Tensor:
    """20 pixels, 3 latent dimensions, M_jj/s² = 20, 10 and 5."""
    basis = torch.linalg.qr(torch.randn(20, 3, generator=generator(99)).double()).Q
    weight = basis * torch.tensor([19.0, 9.0, 4.0]).double().sqrt() * 0.5
    source = generator(seed)
    z = torch.randn(n, 3, generator=source).double()
    return z @ weight.T + 0.5 * torch.randn(n, 20, generator=source).double() + 1


@pytest.fixture(scope="module")
def fitted() -> tuple[Tensor, PPCA]:
    x = from_the_model(20_000)
    return x, fit_ppca(x, 3, generator=generator(7))


def test_em_reaches_the_closed_form(fitted: tuple[Tensor, PPCA]) -> None:
    x, model = fitted
    # Independently: by singular values of the data (Tipping & Bishop 1999, eqs. 7 and 8).
    lengths, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)[1:]
    values = lengths.square() / len(x)
    s2 = float(values[3:].mean())
    covariance = directions.T[:, :3] * (values[:3] - s2) @ directions[:3]
    covariance.diagonal().add_(s2)
    found = model.weight @ model.weight.T
    found.diagonal().add_(model.noise_variance)
    torch.testing.assert_close(found, covariance, atol=1e-6, rtol=1e-6)
    assert model.noise_variance == pytest.approx(s2, rel=1e-6)
    best = float(MultivariateNormal(x.mean(0), covariance).log_prob(x).mean())
    assert model.log_likelihood[-1] == pytest.approx(best, rel=1e-6)
    assert abs(model.closed_form_gap) < 1e-6 * abs(best)
    assert model.covariance_gap < 1e-6
    assert model.converged
    assert model.iterations == len(model.log_likelihood) - 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), latent_dim=st.integers(1, 4))
def test_the_likelihood_never_falls(seed: int, latent_dim: int) -> None:
    x = torch.randn(40, 7, generator=generator(seed)).double() * torch.arange(1, 8)
    model = fit_ppca(x, latent_dim, max_iterations=60, generator=generator(seed + 1))
    trace = torch.tensor(model.log_likelihood, dtype=torch.float64)
    assert (trace.diff() >= -1e-9).all()
    assert model.closed_form_gap >= -1e-9
    gram = model.weight.T @ model.weight
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-8, rtol=0)


def test_the_density_the_posterior_and_the_bound_are_exact(fitted: tuple[Tensor, PPCA]) -> None:
    x, model = fitted[0][:50], fitted[1]
    covariance = model.weight @ model.weight.T
    covariance.diagonal().add_(model.noise_variance)
    joint = MultivariateNormal(model.mean, covariance)
    torch.testing.assert_close(model.log_prob(x), joint.log_prob(x))
    # p(z|x) by conditioning the joint Gaussian of (z, x).
    gain = model.weight.T @ torch.linalg.inv(covariance)
    mean, logvar = model.encode(x)
    torch.testing.assert_close(mean, (x - model.mean) @ gain.T)
    exact = torch.eye(3).double() - gain @ model.weight
    torch.testing.assert_close(torch.diag(logvar[0].exp()), exact, atol=1e-10, rtol=0)
    found = {name: entry.value for name, entry in model.evaluate(x).items()}
    assert found["elbo"] == pytest.approx(found["log_likelihood"], abs=1e-9)
    assert found["inference_gap"] == 0
    kl = float(gaussian_kl(mean, logvar).mean())
    assert found["elbo"] == pytest.approx(found["reconstruction"] - kl)  # type: ignore[operator]


def test_importance_sampling_has_nothing_to_do(fitted: tuple[Tensor, PPCA]) -> None:
    x, model = fitted[0][:20], fitted[1]
    found = log_likelihood(
        model.decode, *model.encode(x), x, generator(),
        n_importance=3, observation=model.observation,
    )  # fmt: skip
    assert found["log_likelihood"].value == pytest.approx(float(model.log_prob(x).mean()))
    assert found["inference_gap"].value == pytest.approx(0, abs=1e-9)


def test_samples_have_the_models_covariance(fitted: tuple[Tensor, PPCA]) -> None:
    model = fitted[1]
    x = model.sample_images(40_000, generator(3))
    covariance = model.weight @ model.weight.T
    covariance.diagonal().add_(model.noise_variance)
    largest = float(covariance.diagonal().max())
    torch.testing.assert_close(x.T.cov(), covariance, atol=6 * largest / 200, rtol=0)
    torch.testing.assert_close(x.mean(0), model.mean, atol=5 * math.sqrt(largest) / 200, rtol=0)


def test_the_whole_engine_finds_no_mismatch_where_there_is_none(
    fitted: tuple[Tensor, PPCA],
) -> None:
    """q(z) = p(z) but for the N images: every number of the panel has a known value.

    kl_per_image = ½ Σ_j log(M_jj/s²), as mean_i μ_ij² + v_j = 1 at the maximum, v_j = s²/M_jj. For
    KL(q_N ‖ p) = E_p[y log y], y = q_N/p at z is a mean of N independent terms of mean 1, with the
    relative variance

        ρ(z) = 1/N {E_x[q(z|x)²]/p(z)² − 1},  E_x[q(z|x)²] = Π_j N(z_j; 0, 1 − v_j/2)/(2√(πv_j))

    since N(z; m, v)² = N(z; m, v/2)/(2√(πv)), averaged over m ~ N(0, 1 − v). y is about Gamma of
    that variance: E[y log y] = ψ(1 + 1/ρ) + log ρ, which is ρ/2 where ρ is small. Far out ρ is
    not: the average of ρ/2 itself, (Π_j 1/v_j − 1)/2N = 0.025, comes from six standard deviations
    away, where no draw of z falls.
    """
    x, model = fitted
    training, held_out = model.encode(x), model.encode(from_the_model(4000, seed=5))
    found = vaeq.measure(*training, *held_out, panel="bracket", n_samples=40_000).estimates

    def value(name: str) -> float:
        number = found[name].value
        assert number is not None, found[name].reason
        return number

    def error(name: str) -> float:
        return found[name].std_error or 0.0

    mean, covariance = AggregatedPosterior(*training).moments()
    torch.testing.assert_close(mean, torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(covariance, torch.eye(3).double(), atol=1e-7, rtol=0)
    assert value("moment_kl") == pytest.approx(0, abs=1e-9)
    variance = training[1][0].exp()
    assert value("kl_per_image") == pytest.approx(-0.5 * float(variance.log().sum()), rel=1e-6)
    z = torch.randn(400_000, 3, generator=generator(11), dtype=torch.float64)
    pair = torch.distributions.Normal(0.0, (1 - variance / 2).sqrt()).log_prob(z)
    pair -= torch.log(2 * (math.pi * variance).sqrt()) - z.square() - math.log(2 * math.pi)
    rho = torch.expm1(pair.sum(1)) / len(x)
    expected = float((torch.digamma(1 + 1 / rho) + rho.log()).mean())
    assert expected == pytest.approx(0.0050, abs=3e-4)
    assert abs(value("marginal_kl") - expected) < 4 * error("marginal_kl") + 0.1 * expected
    assert value("marginal_kl") > 4 * error("marginal_kl") > 0  # the self-term is seen
    assert value("dimension_kl_max") < 1e-3
    assert value("active_units") == 3
    lower, upper = "population_kl_lower", "population_kl_upper"
    assert value(lower) - 3 * error(lower) <= 0 <= value(upper) + 3 * error(upper)
    assert abs(value(lower)) < 0.02
    assert value(upper) < 0.15


def test_pixels_that_never_vary_and_uint8_images(mnist: Images) -> None:
    model = fit_ppca(mnist.train[:2000], 2, generator=generator())
    assert model.converged
    assert model.covariance_gap < 1e-6
    floats = fit_ppca(mnist.train[:2000].double() / 255, 2, generator=generator())
    torch.testing.assert_close(model.weight, floats.weight)
    mean, logvar = model.encode(mnist.train[:2000])
    _, covariance = AggregatedPosterior(mean, logvar).moments()
    torch.testing.assert_close(covariance, torch.eye(2).double(), atol=1e-6, rtol=0)
    dead = mnist.train[:2000].max(0).values == 0
    assert dead.any()
    assert model.weight[dead].abs().max() < 1e-12


def test_more_dimensions_than_the_data_have_are_refused() -> None:
    x = torch.randn(50, 2, generator=generator()).double() @ torch.randn(2, 9).double()
    with pytest.raises(InputError, match="below the rank of the images, 2, got 2"):
        fit_ppca(x, 2, generator=generator())
    with pytest.raises(
        InputError, match="needs images that vary in two directions at least; these 5 have rank 0"
    ):
        fit_ppca(torch.ones(5, 3), 1, generator=generator())
