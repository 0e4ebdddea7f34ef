"""Two-sample statistics against loops, scipy and closed forms; the nulls are what they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from vaeq.divergence.two_sample import c2st_auc, energy_distance, mmd, sliced_w2, two_sample
from vaeq.errors import InputError
from vaeq.posterior.aggregated import AggregatedPosterior

NAMES = ("sliced_w2", "mmd", "energy_distance", "c2st_auc")


def samples(n: int, dims: int, seed: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, generator=generator, dtype=torch.float64) + shift
    return x, torch.randn(n, dims, generator=generator, dtype=torch.float64)


def directions(dims: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dims, 128, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def test_mmd_and_energy_distance_are_their_double_sums() -> None:
    x, y = samples(7, 3, shift=0.5)
    kernel = distance = 0.0
    for a, b, sign in ((x, x, 1), (y, y, 1), (x, y, -2)):
        for i in range(7):
            for j in range(7):
                gap = math.dist(a[i].tolist(), b[j].tolist())
                kernel += sign / math.sqrt(1 + gap**2) / 49
                distance -= sign * gap / 49
    # The expanded square costs digits where two points are close.
    assert mmd(x, y) == pytest.approx(math.sqrt(kernel), rel=1e-6)
    assert energy_distance(x, y) == pytest.approx(math.sqrt(distance), rel=1e-6)


def test_energy_distance_agrees_with_scipy_in_one_dimension() -> None:
    x, y = samples(500, 1, shift=0.7)
    expected = stats.energy_distance(x[:, 0], y[:, 0])
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_sliced_w2_agrees_with_a_loop_over_directions() -> None:
    x, y = samples(200, 4, shift=0.3)
    chosen = directions(4, 5)
    total = 0.0
    for unit in chosen.T:
        a, b = np.sort((x @ unit).numpy()), np.sort((y @ unit).numpy())
        total += float(((a - b) ** 2).mean()) / 128
    assert sliced_w2(x, y, chosen) == pytest.approx(math.sqrt(total), rel=1e-9)


@pytest.mark.parametrize(("dims", "shift", "scale"), [(1, 2.0, 1.0), (5, 1.0, 1.0), (3, 0.0, 2.0)])
def test_sliced_w2_of_gaussians_in_closed_form(dims: int, shift: float, scale: float) -> None:
    x, y = samples(40_000, dims, seed=dims)
    x = scale * x
    x[:, 0] += shift
    truth = math.sqrt(shift**2 / dims + (scale - 1) ** 2)
    # 128 directions: (θ·m)² has mean |m|²/D and sd below √2 |m|²/D.
    tolerance = 4 * shift**2 / dims / math.sqrt(128) / truth + 0.02
    assert sliced_w2(x, y, directions(dims, 1)) == pytest.approx(truth, abs=tolerance)


def test_the_classifier_agrees_with_neighbours_counted_by_hand() -> None:
    x, y = samples(40, 2, seed=4, shift=0.8)
    known, asked = torch.cat([x[:20], y[:20]]), torch.cat([x[20:], y[20:]])
    neighbours = round(math.sqrt(40))
    votes = []
    for point in asked:
        nearest = (known - point).norm(dim=1).argsort()[:neighbours]
        votes.append(int((nearest < 20).sum()))
    # The area under the ROC curve is the Mann-Whitney statistic.
    expected = stats.mannwhitneyu(votes[:20], votes[20:]).statistic / (20 * 20)
    assert c2st_auc(x, y) == pytest.approx(expected)


def test_the_classifier_comes_near_what_the_best_one_could() -> None:
    x, y = samples(6000, 2, seed=4)
    x[:, 0] += 1.0
    # For N(m, I) against N(0, I) the best score is linear: AUC = Φ(|m|/√2).
    best = stats.norm.cdf(1 / math.sqrt(2))
    error = math.sqrt(best * (1 - best) / 3000)
    assert best - 0.03 < c2st_auc(x, y) < best + 4 * error
    assert c2st_auc(2 * samples(2000, 2, seed=5)[0], y[:2000]) > 0.65


def normal_order_means(n: int) -> np.ndarray:
    """Means of the order statistics of n draws of N(0, 1), by the trapezium rule."""
    x = np.linspace(-9, 9, 4001)
    rank = np.arange(1, n + 1)[:, None]
    log_density = (
        stats.norm.logpdf(x) + (rank - 1) * stats.norm.logcdf(x) + (n - rank) * stats.norm.logsf(x)
        - special.betaln(rank, n - rank + 1)
    )  # fmt: skip
    means: np.ndarray = np.trapezoid(x * np.exp(log_density), x, axis=1)
    return means


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_expectations_at_finite_n_are_those_of_gaussians(scale: float) -> None:
    """The squares of the three distances, and the AUC, for N(0, s² I) against N(0, I).

    A V-statistic has mean 2 E h(X, Y) − (1 − 1/n)(E h(X, X') + E h(Y, Y')) − (2/n) h(0), h(0) the
    value of equal points, with |X − Y|² = (s² + 1) χ²_D. In one dimension W2² matches the order
    statistics s x₍ᵢ₎ and y₍ᵢ₎, whose squares have mean sum n and whose products that of mᵢ².
    """
    n, dims, repeats = 40, 3, 500

    def mean_of(h: Callable[[np.ndarray], np.ndarray], variance: float) -> float:
        t = np.linspace(0, 80, 200_001)
        density = stats.chi2.pdf(t, dims)
        return float(np.trapezoid(h(variance * t) * density, t))

    def v_statistic(h: Callable[[np.ndarray], np.ndarray], at_zero: float) -> float:
        alike = mean_of(h, 2 * scale**2) + mean_of(h, 2)
        crossed = 2 * mean_of(h, scale**2 + 1)
        return alike * (1 - 1 / n) + 2 * at_zero / n - crossed

    matched = float(np.square(normal_order_means(n)).mean())
    truth = {
        "sliced_w2": scale**2 + 1 - 2 * scale * matched,
        "mmd": v_statistic(lambda square: 1 / np.sqrt(1 + square), 1.0),
        "energy_distance": -v_statistic(np.sqrt, 0.0),
    }
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for seed in range(repeats):
        x, y = samples(n, dims, seed)
        x = scale * x
        found["sliced_w2"].append(sliced_w2(x, y, directions(dims, seed)) ** 2)
        found["mmd"].append(mmd(x, y) ** 2)
        found["energy_distance"].append(energy_distance(x, y) ** 2)
        if scale == 1:
            found["c2st_auc"].append(c2st_auc(x, y))
    if scale == 1:
        truth["c2st_auc"] = 0.5  # by symmetry
    for name, expected in truth.items():
        error = np.std(found[name], ddof=1) / math.sqrt(repeats)
        assert abs(np.mean(found[name]) - expected) < 4 * error, name


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "width"), [(0.0, 1.0), (0.5, 0.6)])
def test_error_bars_cover_the_expectation(shift: float, width: float) -> None:
    """±2 s.e. of values, nulls and z-scores, for codes that are N(0, I) and for others.

    The expectation is the mean over the 60 measurements, whose own error takes 1/120 off the
    spread. With 19 degrees of freedom two standard errors cover 94.0%, with 38, for z, 94.7%: at
    least 49 of 60 but for a chance of 2e-4 or less, and there are 24 counts.
    """
    q = AggregatedPosterior(
        torch.full((10, 3), shift), torch.full((10, 3), 2 * math.log(width))
    )  # fmt: skip
    runs = [two_sample(q, 30, 20, torch.Generator().manual_seed(seed)) for seed in range(60)]
    for name in NAMES:
        for part in ("", "_null", "_z"):
            values = np.array([run[name + part].value for run in runs])
            errors = np.array([run[name + part].std_error for run in runs])
            alike = part == "_z" and not shift
            truth = 0.0 if alike else float(values.mean())
            hits = int((np.abs(values - truth) <= 2 * errors).sum())
            assert hits >= 49, (name + part, hits)
            # Nor is the error merely safe: the variance of 60 is known within √(2/59) of itself.
            ratio = np.mean(errors**2) / values.var(ddof=1)
            assert abs(ratio - 1) < 4 * math.sqrt(2 / 59), (name + part, ratio)


def test_the_same_distribution_gives_the_null() -> None:
    q = AggregatedPosterior(torch.zeros(10, 3), torch.zeros(10, 3))
    found = two_sample(q, 400, 20, torch.Generator().manual_seed(6))
    for name in NAMES:
        z = found[f"{name}_z"]
        assert z.value is not None
        # The difference of two means of 20 has sd √(2/20) null deviations, themselves ±16 %.
        assert abs(z.value) < 4 * math.sqrt(2 / 20) * 1.3, name
    assert found["c2st_auc_null"].value == pytest.approx(0.5, abs=0.02)


def test_a_shift_stands_out_of_the_null_in_every_statistic() -> None:
    q = AggregatedPosterior(torch.full((10, 3), 0.6), torch.zeros(10, 3))
    found = two_sample(q, 400, 5, torch.Generator().manual_seed(7))
    for name in NAMES:
        value, null = found[name].value, found[f"{name}_null"].value
        assert value is not None
        assert null is not None
        assert value > null
        z = found[f"{name}_z"].value
        assert z is not None
        assert z > 4
        sd = found[f"{name}_null_sd"].value
        assert z == pytest.approx((value - null) / sd)


def test_statistics_do_not_change_when_points_or_axes_are_reordered() -> None:
    x, y = samples(300, 4, shift=0.2)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(8))
    chosen = directions(4, 9)
    assert sliced_w2(x[order], y, chosen) == pytest.approx(sliced_w2(x, y, chosen), rel=1e-9)
    flipped = sliced_w2(x.flip(1), y.flip(1), chosen.flip(0))
    assert flipped == pytest.approx(sliced_w2(x, y, chosen), rel=1e-9)
    for statistic in (mmd, energy_distance):
        plain = statistic(x, y)
        assert statistic(x[order], y) == pytest.approx(plain, rel=1e-6)
        assert statistic(x.flip(1), y.flip(1)) == pytest.approx(plain, rel=1e-6)
        assert statistic(y, x) == pytest.approx(plain, rel=1e-6)


def test_one_image_in_one_dimension() -> None:
    q = AggregatedPosterior(torch.tensor([[3.0]]), torch.tensor([[-4.0]]))
    found = two_sample(q, 50, 2, torch.Generator().manual_seed(0))
    assert set(found) == {name + part for name in NAMES for part in ("", "_null", "_null_sd", "_z")}


def test_sizes_too_small_to_be_halved_or_to_vary_are_refused() -> None:
    q = AggregatedPosterior(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(InputError, match="n_samples must be >= 4, got 3"):
        two_sample(q, 3)
    with pytest.raises(InputError, match="repeats must be >= 2, got 1"):
        two_sample(q, repeats=1)
