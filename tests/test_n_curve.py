"""The N-curve: flat where the population is known, falling by log 2 where it is not."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from vaeq.divergence.decomposition import marginal_kl
from vaeq.divergence.n_curve import n_curve
from vaeq.posterior.aggregated import AggregatedPosterior


def test_equal_posteriors_give_a_flat_curve_at_the_closed_form() -> None:
    mean = torch.full((3000, 2), 0.5, dtype=torch.float64)
    q = AggregatedPosterior(mean, torch.zeros_like(mean))
    slope, curve = n_curve(q, 500, torch.Generator().manual_seed(0))
    assert curve["n"] == [1000, 2000, 3000]
    # KL(N(m, I) ‖ N(0, I)) = |m|²/2 = 0.25 whatever n is.
    for value, error in zip(curve["marginal_kl"], curve["std_error"], strict=True):
        assert value == pytest.approx(0.25, abs=4 * error + 1e-9)
    assert curve["mutual_information_fraction"] == pytest.approx([0, 0, 0], abs=1e-6)
    assert slope.value == pytest.approx(0, abs=1e-6)


def test_far_apart_posteriors_fall_like_log_n() -> None:
    n, std = 8000, 1e-3
    mean = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None] * 50
    q = AggregatedPosterior(mean, torch.full_like(mean, 2 * math.log(std)))
    slope, curve = n_curve(q, 400, torch.Generator().manual_seed(0))
    assert curve["n"] == [1000, 2000, 4000, 8000]
    assert curve["mutual_information_fraction"] == pytest.approx([1] * 4, abs=1e-3)
    assert slope.unit == "nats/nat"


def test_a_saturated_curve_has_slope_minus_one() -> None:
    generator = torch.Generator().manual_seed(4)
    # Directions on a sphere: every image has the same KL, and no two posteriors overlap.
    mean = torch.randn(8000, 8, generator=generator, dtype=torch.float64)
    mean = 3 * mean / mean.norm(dim=1, keepdim=True)
    q = AggregatedPosterior(mean, torch.full_like(mean, 2 * math.log(1e-3)))
    slope, curve = n_curve(q, 400, torch.Generator().manual_seed(0))
    assert slope.value == pytest.approx(-1, abs=1e-3)
    falls = [b - a for a, b in pairwise(curve["marginal_kl"])]
    assert falls == pytest.approx([-math.log(2)] * 3, abs=1e-3)


def test_few_images_have_no_slope_and_say_so() -> None:
    q = AggregatedPosterior(torch.zeros(10, 1), torch.zeros(10, 1))
    slope, curve = n_curve(q, 50)
    assert slope.value is None
    assert slope.reason is not None
    assert "at least 2000 images, got 10" in slope.reason
    assert curve["n"] == [10]


def test_the_last_point_is_marginal_kl_of_all_images() -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(1500, 2, generator=generator, dtype=torch.float64)
    q = AggregatedPosterior(mean, torch.full_like(mean, -2.0))
    _, curve = n_curve(q, 4000, torch.Generator().manual_seed(2))
    whole = marginal_kl(q, 4000, torch.Generator().manual_seed(3))
    assert whole.value is not None
    assert whole.std_error is not None
    assert curve["n"] == [1000, 1500]
    error = math.hypot(curve["std_error"][-1], whole.std_error)
    assert abs(curve["marginal_kl"][-1] - whole.value) < 4 * error
