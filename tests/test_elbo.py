"""The ELBO's two terms against closed forms, independent code and quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import distributions

from vaeq.models.elbo import gaussian_kl, held_out_elbo, reconstruction


def test_reconstruction_is_the_bernoulli_log_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3
    x = torch.bernoulli(torch.full((5, 7), 0.4, dtype=torch.float64), generator=generator)
    expected = distributions.Bernoulli(logits=logits).log_prob(x).sum(1)
    torch.testing.assert_close(reconstruction(logits, x), expected)


def test_reconstruction_of_grey_levels_is_the_expected_log_likelihood() -> None:
    logits = torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    x = torch.tensor([[0.25, 0.8]], dtype=torch.float64)
    expected = 0.0
    for level, logit in zip(x[0].tolist(), logits[0].tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        expected += level * math.log(p) + (1 - level) * math.log(1 - p)
    assert reconstruction(logits, x).item() == pytest.approx(expected, rel=1e-12)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-8, 3)), min_size=1, max_size=6),
)
def test_gaussian_kl_is_torchs_and_never_negative(pairs: list[tuple[float, float]]) -> None:
    mean, logvar = torch.tensor(pairs, dtype=torch.float64).T
    kl = gaussian_kl(mean[None], logvar[None])
    q = distributions.Normal(mean, (0.5 * logvar).exp())
    p = distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = distributions.kl_divergence(q, p).sum()
    torch.testing.assert_close(kl[0], expected, rtol=1e-10, atol=1e-10)
    assert kl.item() >= 0


def test_gaussian_kl_of_the_prior_is_zero_also_in_float32() -> None:
    zeros = torch.zeros(4, 3)
    assert gaussian_kl(zeros, zeros).eq(0).all()
    # Near the prior e^s − 1 − s cancels; expm1 keeps the digits that float32 has.
    tiny = torch.full((1, 1), 1e-3)
    assert gaussian_kl(torch.zeros(1, 1), tiny).item() == pytest.approx(2.5e-7, rel=2e-3)


def test_logvar_is_the_log_of_the_variance_not_of_the_standard_deviation() -> None:
    std = 0.3
    kl = gaussian_kl(torch.zeros(1, 1), torch.full((1, 1), 2 * math.log(std)))
    assert kl.item() == pytest.approx(0.5 * (std**2 - 1) - math.log(std), rel=1e-5)


def test_held_out_elbo_agrees_with_quadrature() -> None:
    # One pixel, one latent dimension: E_q log p(x|z) is an integral that scipy can do.
    weight, bias = 1.7, -0.4
    mean = torch.tensor([[0.5], [-1.0], [0.1]])
    logvar = torch.tensor([[-1.0], [0.2], [-3.0]])
    images = torch.tensor([[255], [0], [51]], dtype=torch.uint8)
    found = held_out_elbo(
        lambda z: weight * z + bias,
        mean,
        logvar,
        images,
        torch.Generator().manual_seed(3),
        n_draws=20_000,
        batch_size=2,
    )
    truth = 0.0
    for m, s, pixel in zip(mean[:, 0], logvar[:, 0], images[:, 0], strict=True):
        level = pixel.item() / 255
        normal = stats.norm(m.item(), math.exp(s.item() / 2))

        def integrand(z: float, level: float = level, normal: object = normal) -> float:
            logit = weight * z + bias
            density = normal.pdf(z)  # type: ignore[attr-defined]
            return float(density * (level * logit - np.logaddexp(0, logit)))

        truth += integrate.quad(integrand, -12, 12, points=[m.item()])[0] / 3
    estimate = found["reconstruction"]
    assert estimate.value is not None
    assert estimate.std_error is not None
    assert 0 < estimate.std_error < 0.01
    assert abs(estimate.value - truth) < 4 * estimate.std_error
    kl = gaussian_kl(mean.double(), logvar.double()).mean().item()
    assert found["elbo"].value == pytest.approx(estimate.value - kl, rel=1e-9)
    assert found["elbo"].std_error == estimate.std_error
