"""The decomposition of the average KL, on mixtures whose terms are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from vaeq.divergence import decompose, kl_per_image, marginal_kl, marginals
from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior

F64 = torch.float64
NAMES = [
    "kl_per_image",
    "mutual_information",
    "mutual_information_fraction",
    "marginal_kl",
    "total_correlation",
    "dimension_kl_sum",
    "dimension_kl_mean",
    "dimension_kl_max",
    "dimension_kl_mean_active",
    "active_units",
    "moment_kl",
]


def posterior(mean: object, std: object) -> AggregatedPosterior:
    mean = torch.as_tensor(mean, dtype=F64)
    return AggregatedPosterior(mean, 2 * torch.as_tensor(std, dtype=F64).expand_as(mean).log())


def measure(codes: AggregatedPosterior, draws: int = 4000, seed: int = 0) -> dict[str, Estimate]:
    return decompose(codes, draws, torch.Generator().manual_seed(seed))


def value(estimate: Estimate) -> float:
    assert estimate.value is not None
    return estimate.value


def near(estimate: Estimate, truth: float) -> bool:
    """Within four standard errors, or to rounding where there is none."""
    assert estimate.std_error is not None
    return abs(value(estimate) - truth) < 4 * estimate.std_error + 1e-8


def random_codes(n: int, dims: int, seed: int = 0) -> AggregatedPosterior:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, dims, generator=generator, dtype=F64)
    return posterior(mean, 0.2 + torch.rand(n, dims, generator=generator, dtype=F64))


def test_one_gaussian_component() -> None:
    found = measure(posterior([[0.5, -1.0]], [[0.5, 2.0]]))
    terms = [0.5 * (m * m + s * s - 1) - math.log(s) for m, s in ((0.5, 0.5), (-1.0, 2.0))]
    assert list(found) == NAMES
    assert value(found["kl_per_image"]) == pytest.approx(sum(terms), abs=1e-12)
    assert value(found["marginal_kl"]) == pytest.approx(sum(terms), abs=1e-8)
    assert value(found["mutual_information"]) == pytest.approx(0.0, abs=1e-8)
    assert value(found["total_correlation"]) == pytest.approx(0.0, abs=1e-8)
    assert value(found["dimension_kl_sum"]) == pytest.approx(sum(terms), abs=1e-9)
    assert value(found["dimension_kl_mean"]) == pytest.approx(sum(terms) / 2, abs=1e-9)
    assert value(found["dimension_kl_max"]) == pytest.approx(max(terms), abs=1e-9)
    assert value(found["moment_kl"]) == pytest.approx(sum(terms), abs=1e-12)
    assert found["mutual_information_fraction"].reason == "log N is 0 for a single image"
    assert found["dimension_kl_mean_active"].reason == "no dimension is active"
    assert found["active_units"] == Estimate(0.0, 0.0, "dimensions")


def test_identical_components_carry_no_information() -> None:
    found = measure(posterior([[0.5, -1.0]] * 50, [[0.5, 2.0]]))
    assert value(found["mutual_information"]) == pytest.approx(0.0, abs=1e-8)
    assert value(found["mutual_information_fraction"]) == pytest.approx(0.0, abs=1e-8)
    assert value(found["marginal_kl"]) == pytest.approx(value(found["kl_per_image"]), abs=1e-8)
    assert found["marginal_kl"].std_error == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("n", [2, 10, 500])
def test_far_apart_components_carry_log_n(n: int) -> None:
    mean = torch.stack([torch.arange(n) * 3.0, torch.zeros(n)], 1)
    found = measure(posterior(mean, [[0.01, 0.5]]))
    assert value(found["mutual_information"]) == pytest.approx(math.log(n), abs=1e-6)
    assert value(found["mutual_information_fraction"]) == pytest.approx(1.0, abs=1e-6)
    assert found["mutual_information"].std_error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("draws", [1, 2, 50, 2000])
def test_encoder_at_the_prior_gives_zero(draws: int) -> None:
    found = measure(posterior(torch.zeros(40, 3), 1.0), draws)
    for name in ("kl_per_image", "mutual_information", "marginal_kl", "total_correlation",
                 "dimension_kl_sum", "dimension_kl_max", "moment_kl"):  # fmt: skip
        assert value(found[name]) == pytest.approx(0.0, abs=1e-8), name


def test_two_components_against_quadrature() -> None:
    mean, std = [(-0.8, 0.3), (0.9, -0.4)], [(0.5, 0.9), (0.7, 0.6)]

    def log_q(x: float, y: float) -> float:
        terms = [
            -0.5 * ((x - m[0]) / s[0]) ** 2 - 0.5 * ((y - m[1]) / s[1]) ** 2
            - math.log(s[0] * s[1]) - math.log(2 * math.pi)
            for m, s in zip(mean, std, strict=True)
        ]  # fmt: skip
        return float(np.logaddexp(*terms)) - math.log(2)

    def integrand(y: float, x: float) -> float:
        log_density = log_q(x, y)
        log_prior = -0.5 * (x * x + y * y) - math.log(2 * math.pi)
        return math.exp(log_density) * (log_density - log_prior)

    truth, _ = integrate.dblquad(integrand, -7, 7, -7, 7, epsabs=1e-9, epsrel=1e-9)
    codes = posterior(mean, std)
    found = measure(codes, 20_000)
    assert near(found["marginal_kl"], truth)
    assert value(found["marginal_kl"]) == pytest.approx(truth, abs=0.01)
    average = value(found["kl_per_image"])
    assert near(found["mutual_information"], average - truth)
    dimensions = sum(marginals(codes)["kl"])
    assert near(found["total_correlation"], truth - dimensions)


def test_correlated_codes_are_far_jointly_and_close_one_by_one() -> None:
    # Many narrow codes along N(0, C), C the correlation matrix [[1, r], [r, 1]]: every dimension is
    # N(0, 1) and the total correlation is −½ log(1 − r²). The codes lie at equally likely quantiles
    # of both independent axes of C, so q_N differs from N(0, C) by the grid alone.
    r, side = 0.9, 60
    std = 0.3
    quantiles = torch.special.ndtri((torch.arange(side, dtype=F64) + 0.5) / side)
    quantiles = quantiles / quantiles.square().mean().sqrt()
    grid = torch.cartesian_prod(quantiles, quantiles)
    shrunk = torch.tensor([[1, r], [r, 1]], dtype=F64) - std**2 * torch.eye(2, dtype=F64)
    # Cov(μ) + σ²I = C needs the smaller eigenvalue 1 − r of C to exceed σ².
    mean = grid @ torch.linalg.cholesky(shrunk).T
    found = measure(posterior(mean, std), 20_000)
    joint = -0.5 * math.log(1 - r * r)
    assert value(found["moment_kl"]) == pytest.approx(joint, abs=1e-9)
    assert value(found["dimension_kl_sum"]) < 5e-3
    assert (
        abs(value(found["total_correlation"]) - joint)
        < 4 * (found["total_correlation"].std_error or 0) + 0.02
    )
    assert value(found["marginal_kl"]) > 100 * value(found["dimension_kl_sum"])


def test_a_standard_deviation_is_not_a_variance() -> None:
    wide = measure(posterior([[0.0]] * 3, [[2.0]]))
    assert value(wide["marginal_kl"]) == pytest.approx(1.5 - math.log(2), abs=1e-8)
    assert value(wide["kl_per_image"]) == pytest.approx(1.5 - math.log(2), abs=1e-12)


@pytest.mark.parametrize("draws", [1, 2, 19, 20, 3000])
def test_the_identities_hold_exactly(draws: int) -> None:
    found = {name: e.value for name, e in measure(random_codes(200, 3), draws).items()}
    total = found["mutual_information"] + found["marginal_kl"]  # type: ignore[operator]
    assert total == pytest.approx(found["kl_per_image"], abs=1e-12)
    parts = found["total_correlation"] + found["dimension_kl_sum"]  # type: ignore[operator]
    assert parts == pytest.approx(found["marginal_kl"], abs=1e-12)


def test_one_draw_has_no_error_bar() -> None:
    found = measure(random_codes(20, 2), 1)
    assert found["marginal_kl"].value is not None
    assert found["marginal_kl"].std_error is None
    assert found["mutual_information"].std_error is None
    assert found["dimension_kl_sum"].std_error == 0.0


def test_no_draws_are_refused() -> None:
    with pytest.raises(InputError, match="n_samples must be >= 1, got 0"):
        decompose(random_codes(5, 2), 0)


def test_the_control_variates_leave_the_mean_alone_and_shrink_the_error() -> None:
    codes = random_codes(300, 4)
    generator = torch.Generator().manual_seed(1)
    z, index = codes.sample(400_000, generator)
    log_p = -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
    direct = codes.log_prob(z) - log_p
    by_images = kl_per_image(codes).mean() - (
        codes.log_prob_conditional(z, index) - codes.log_prob(z)
    )
    found = marginal_kl(codes, 10_000, torch.Generator().manual_seed(2))
    assert found.std_error is not None
    for draws in (direct, by_images):
        error = math.hypot(float(draws.std()) / math.sqrt(len(draws)), found.std_error)
        assert abs(value(found) - float(draws.mean())) < 4 * error
        assert found.std_error < 1.02 * float(draws.std()) / math.sqrt(10_000)


def test_float32_agrees_with_float64() -> None:
    exact = random_codes(500, 6)
    single = AggregatedPosterior(exact.mean.float(), exact.logvar.float())
    draws, _ = exact.sample(2000, torch.Generator().manual_seed(3))
    assert float((exact.log_prob(draws) - single.log_prob(draws.float())).abs().max()) < 1e-4
    for name, estimate in measure(single).items():
        other = measure(exact)[name]
        error = math.hypot(estimate.std_error or 0, other.std_error or 0)  # the draws differ
        assert abs(value(estimate) - value(other)) < 4 * error + 1e-5, name


@settings(deadline=None, max_examples=15, derandomize=True)
@given(n=st.integers(2, 30), dims=st.integers(1, 4), seed=st.integers(0, 99), data=st.data())
def test_properties(n: int, dims: int, seed: int, data: st.DataObject) -> None:
    codes = random_codes(n, dims, seed)
    found = measure(codes, 2000, seed)
    rows = torch.tensor(data.draw(st.permutations(range(n))))
    columns = torch.tensor(data.draw(st.permutations(range(dims))))
    turned = AggregatedPosterior(codes.mean[rows][:, columns], codes.logvar[rows][:, columns])
    doubled = codes.subset(torch.cat([rows, rows]))
    for other in (measure(turned, 2000, seed + 1), measure(doubled, 2000, seed + 2)):
        for name, estimate in found.items():
            if name == "mutual_information_fraction":  # log N itself differs
                continue
            if estimate.value is None:
                assert other[name] == estimate
                continue
            error = math.hypot(estimate.std_error or 0, other[name].std_error or 0)
            assert abs(value(other[name]) - estimate.value) < 5 * error + 1e-8, name
    slack = 4 * (found["marginal_kl"].std_error or 0) + 1e-8
    assert -slack < value(found["mutual_information"]) < math.log(n) + slack
    assert value(found["moment_kl"]) < value(found["marginal_kl"]) + slack
    assert value(found["total_correlation"]) > -slack
    if dims == 1:
        assert abs(value(found["total_correlation"])) < slack


def test_per_dimension_results_at_hand_are_used() -> None:
    codes = random_codes(20, 2)
    given_table = {"kl": [0.25, 0.5], "active": [True, False]}
    found = decompose(codes, 200, torch.Generator().manual_seed(0), per_dimension=given_table)
    assert value(found["dimension_kl_sum"]) == 0.75
    assert value(found["dimension_kl_mean_active"]) == 0.25
    assert value(found["active_units"]) == 1.0


def grid_mixture(means: list[list[float]], stds: list[list[float]]) -> AggregatedPosterior:
    """A product of one-dimensional mixtures: KL(q_N ‖ p) is the sum of theirs, TC is 0."""
    axes = [[torch.tensor(a, dtype=F64) for a in side] for side in (means, stds)]
    mean, std = (torch.cartesian_prod(*side).reshape(-1, len(means)) for side in axes)
    return posterior(mean, std)


TARGETS = {
    "one dimension": grid_mixture([[-1.2, 0.0, 0.9, 2.0]], [[0.5, 0.3, 0.8, 0.4]]),
    "narrow codes": grid_mixture(
        [np.linspace(-2, 2, 40).tolist()], [np.geomspace(0.02, 0.1, 40).tolist()]
    ),
    "three dimensions": grid_mixture([[-1.0, 0.2, 1.1]] * 3, [[0.5, 0.4, 0.3]] * 3),
    "eight dimensions": grid_mixture([[-0.9, 0.9]] * 8, [[0.4, 0.6]] * 8),
}


def test_error_bars_cover_the_truth() -> None:
    """±2 s.e. of marginal_kl (hence of MI and TC, which share it) covers in 95.4% of repeats.

    The truth is the quadrature of the exact product mixture. 4 × 250 repeats: the binomial sd of
    the coverage is 0.66%, so that 93 to 97.5% is more than three of them either way.
    """
    hits = 0
    for codes in TARGETS.values():
        truth = sum(marginals(codes)["kl"])
        for seed in range(250):
            found = marginal_kl(codes, 500, torch.Generator().manual_seed(seed))
            assert found.std_error is not None
            hits += abs(value(found) - truth) <= 2 * found.std_error
    assert 0.93 <= hits / (250 * len(TARGETS)) <= 0.975


def test_a_draw_that_alone_decides_a_slope_is_not_fitted() -> None:
    # Two distinct codes, one of them in 1 of 400 images: some seeds draw it once, and the control
    # KL(q(z|xᵢ) ‖ p) is then that one draw's own.
    codes = posterior([[0.0]] * 399 + [[5.0]], [[0.5]])
    once = [
        seed
        for seed in range(200)
        if int((codes.sample(100, torch.Generator().manual_seed(seed))[1] == 399).sum()) == 1
    ]
    truth = marginals(codes)["kl"][0]
    assert once
    for seed in once[:5]:
        found = marginal_kl(codes, 100, torch.Generator().manual_seed(seed))
        assert found.std_error is not None
        assert found.std_error > 0
        assert abs(value(found) - truth) < 5 * found.std_error


def test_a_singular_covariance_costs_a_control_variate_and_no_more() -> None:
    mean = torch.linspace(-1, 1, 5, dtype=F64)[:, None] * torch.tensor(
        [[1.0, 2.0, -1.0]], dtype=F64
    )
    found = measure(posterior(mean, 1e-11))
    assert found["moment_kl"].value is None
    assert value(found["mutual_information"]) == pytest.approx(math.log(5), abs=1e-6)
