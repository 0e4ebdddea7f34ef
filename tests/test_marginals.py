"""The one-dimensional quadrature against closed forms, adaptive quadrature and properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, optimize, special

from vaeq.divergence import marginals as marginals_function
from vaeq.divergence import tabulated
from vaeq.divergence.marginals import _TO_NODES, marginals
from vaeq.divergence.tabulated import NODES, WEIGHTS, tabulate
from vaeq.posterior.aggregated import AggregatedPosterior

Array = NDArray[np.float64]


def posterior(mean: Array, std: Array) -> AggregatedPosterior:
    """One dimension from vectors, or several from (N, D) arrays."""
    mean, std = np.asarray(mean, float), np.asarray(std, float)
    if mean.ndim == 1:
        mean, std = mean[:, None], std[:, None]
    return AggregatedPosterior(torch.from_numpy(mean), torch.from_numpy(2 * np.log(std)))


def mixture_pdf(x: Array, mean: Array, std: Array) -> Array:
    u = (np.asarray(x)[..., None] - mean) / std
    values: Array = (np.exp(-0.5 * u * u) / std).mean(-1) / math.sqrt(2 * math.pi)
    return values


def mixture_cdf(x: Array, mean: Array, std: Array) -> Array:
    values: Array = special.ndtr((np.asarray(x)[..., None] - mean) / std).mean(-1)
    return values


def quad_pieces(f: object, mean: Array, std: Array) -> float:
    """scipy's adaptive quadrature, told where the components are."""
    cuts = np.unique(np.concatenate([mean + k * std for k in (-12, -6, -3, 0, 3, 6, 12)]))
    pieces = itertools.pairwise(cuts)
    return math.fsum(
        integrate.quad(f, a, b, epsabs=1e-13, epsrel=1e-11, limit=200)[0] for a, b in pieces
    )


@pytest.mark.parametrize(
    ("mean", "std"),
    [(0.0, 1.0), (1.0, 0.5), (-2.0, 3.0), (50.0, 1e-4), (-0.3, 0.01), (0.2, 30.0), (0.5, 1e-4)],
)
def test_one_gaussian_in_closed_form(mean: float, std: float) -> None:
    found = marginals(posterior(np.array([mean]), np.array([std])))
    kl = 0.5 * (mean**2 + std**2 - 1) - math.log(std)
    assert found["kl"] == pytest.approx([kl], abs=1e-9, rel=1e-12)
    assert found["kl_per_image"] == pytest.approx([kl], abs=1e-9, rel=1e-12)
    assert found["w2"] == pytest.approx([math.hypot(mean, std - 1)], abs=1e-9)
    assert found["mean"] == [mean]
    assert found["std"] == pytest.approx([std])
    assert found["active"] == [False]  # one image: its code does not vary


@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.0), (-0.7, 0.2), (0.3, 0.01), (0.0, 40.0)])
def test_kolmogorov_smirnov_of_one_gaussian(mean: float, std: float) -> None:
    # |F − Φ| peaks where the densities cross: (x − μ)²/σ² + 2 log σ = x².
    a, b, c = 1 / std**2 - 1, -2 * mean / std**2, mean**2 / std**2 + 2 * math.log(std)
    crossings = np.array([-c / b]) if a == 0 else np.roots([a, b, c])
    expected = np.abs(special.ndtr((crossings - mean) / std) - special.ndtr(crossings)).max()
    found = marginals(posterior(np.array([mean]), np.array([std])))["ks"]
    assert found == pytest.approx([expected], abs=1e-8)


def test_kolmogorov_smirnov_in_the_gap_left_of_a_spike() -> None:
    # All of q lies at 5 ± 1e-3: F is 0 up to there, while Φ(5) is nearly 1.
    found = marginals(posterior(np.array([5.0]), np.array([1e-4])))["ks"]
    assert found == pytest.approx([special.ndtr(5.0 - 8e-4)], abs=1e-8)


def test_prior_gives_zero() -> None:
    found = marginals(posterior(np.zeros((9, 2)), np.ones((9, 2))))
    for name in ("kl", "ks", "w2", "kl_per_image", "mean"):
        assert found[name] == pytest.approx([0.0, 0.0], abs=1e-9), name


MIXTURES = {
    "two apart": ([-1.5, 2.0], [0.3, 0.3]),
    "two close": ([-0.2, 0.3], [0.9, 0.8]),
    "a spike on a hill": ([0.0, 0.0, 0.4], [1.0, 1.0, 1e-3]),
    "every scale": ([0.0, 0.5, -0.5, 1.0, -2.0], [1e-4, 1e-3, 0.01, 0.1, 1.0]),
    "far and narrow": ([-50.0, 50.0, 0.0], [1e-4, 1e-3, 1.0]),
    "overlapping tails": ([-4.0, 4.0, 0.0, 2.0], [1.0, 0.7, 0.5, 0.4]),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_against_adaptive_quadrature(name: str) -> None:
    mean, std = (np.array(values) for values in MIXTURES[name])
    found = marginals(posterior(mean, std))

    def kl(x: float) -> float:
        q = float(mixture_pdf(np.array(x), mean, std))
        return q * (math.log(q) + 0.5 * x * x + 0.5 * math.log(2 * math.pi)) if q > 0 else 0.0

    assert found["kl"] == pytest.approx([quad_pieces(kl, mean, std)], rel=1e-10, abs=1e-8)

    def square(x: float) -> float:
        cdf = float(mixture_cdf(np.array(x), mean, std))
        sf = float(mixture_cdf(np.array(-x), -mean, std))
        quantile = special.ndtri(cdf) if cdf < sf else -special.ndtri(sf)
        q = float(mixture_pdf(np.array(x), mean, std))
        return q * (x - quantile) ** 2 if q > 0 and math.isfinite(quantile) else 0.0

    assert found["w2"] == pytest.approx([math.sqrt(quad_pieces(square, mean, std))], abs=1e-7)

    grid = np.unique(
        np.concatenate([np.linspace(-9, 9, 20_001)] + [m + s * np.linspace(-9, 9, 4_001) for m, s in
                                                       zip(mean, std, strict=True)])
    )  # fmt: skip
    gap = np.abs(mixture_cdf(grid, mean, std) - special.ndtr(grid))
    top = int(gap.argmax())
    bracket = (grid[max(top - 1, 0)], grid[min(top + 1, len(grid) - 1)])
    peak = -optimize.minimize_scalar(
        lambda x: -abs(float(mixture_cdf(np.array(x), mean, std)) - special.ndtr(x)),
        bounds=bracket,
        method="bounded",
        options={"xatol": 1e-12},
    ).fun
    assert found["ks"] == pytest.approx([max(peak, gap[top])], abs=1e-8)


def test_wasserstein_by_quantiles() -> None:
    # W2² = ∫₀¹ (F⁻¹(u) − Φ⁻¹(u))² du, inverted point by point: another formula for the same number.
    mean, std = np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.6, 0.3])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    total = 0.0
    for a in np.linspace(-8, 8, 33)[:-1]:  # u = Φ(t), t on panels of width ½
        t = a + 0.25 * (nodes + 1)
        u = special.ndtr(t)
        quantile = np.array(
            [
                optimize.brentq(lambda x, p=p: float(mixture_cdf(x, mean, std)) - p, -20, 20,
                                xtol=1e-13)
                for p in u
            ]
        )  # fmt: skip
        density = np.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
        total += 0.25 * float(weights @ ((quantile - t) ** 2 * density))
    found = marginals(posterior(mean, std))["w2"]
    assert found == pytest.approx([math.sqrt(total)], abs=1e-7)


def test_the_tabulated_density_is_exact_at_every_scale() -> None:
    generator = np.random.default_rng(3)
    mean = generator.normal(size=400) * 3
    std = 10.0 ** generator.uniform(-4, 1, size=400)
    table = tabulate(mean, std)
    exact = mixture_pdf(table.nodes(), mean, std)
    # A component's polynomial is off by 1e-11 of that component's peak, 1/(N σ √2π).
    reach = np.abs(table.nodes()[..., None] - mean) < 20 * std
    peak = np.where(reach, 1 / std, 0).mean(-1) / math.sqrt(2 * math.pi)
    assert (np.abs(table.density - exact) <= 1e-10 * peak).all()
    mass = 0.5 * table.width * (table.density @ WEIGHTS)
    assert mass.sum() == pytest.approx(1.0, abs=1e-12)
    assert (table.left[1:] >= table.left[:-1] + table.width[:-1] - 1e-12).all()


@pytest.mark.parametrize("spread", [0.02, 0.5, 3.0, 40.0])
@pytest.mark.parametrize("octaves", [0.1, 1.0, 4.0])
def test_components_summed_together_are_those_summed_one_by_one(
    spread: float, octaves: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two programs for one density; the second is what the sum is by definition.
    generator = np.random.default_rng(5)
    mean = generator.normal(size=20_000) * spread + 0.3
    std = 0.2 * 2.0 ** (octaves * generator.uniform(-1, 1, size=20_000))
    together = tabulate(mean, std)
    monkeypatch.setattr(tabulated, "_CROWD", len(mean) + 1)
    one_by_one = tabulate(mean, std)
    np.testing.assert_array_equal(together.left, one_by_one.left)
    np.testing.assert_array_equal(together.width, one_by_one.width)
    # 1e-14 of a peak for each component; their errors have either sign.
    peak = (1 / std).mean() / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(together.density, one_by_one.density, rtol=0, atol=1e-14 * peak)
    rows = generator.integers(len(together.left), size=3)
    exact = mixture_pdf(together.nodes()[rows], mean, std)
    np.testing.assert_allclose(together.density[rows], exact, rtol=0, atol=1e-11 * peak)


@pytest.mark.parametrize("std", [0.2500001, 0.3, 0.4999999])
@pytest.mark.parametrize("place", [0.0, 1e-9, 0.5, 1 - 1e-9])
def test_a_crowd_at_the_edges_of_its_panel_and_octave(place: float, std: float) -> None:
    # Equal components: the mixture is one Gaussian. Its σ fills its panels of width 1 from end to
    # end of the octave, at every size.
    for size in (2.0**-13, 1.0, 2.0**5):
        mean, width = (
            np.full(tabulated._CROWD, size * (3 + place)),
            np.full(tabulated._CROWD, size * std),
        )
        table = tabulate(mean, width)
        assert set(table.width) == {size}
        exact = mixture_pdf(table.nodes(), mean[:1], width[:1])
        np.testing.assert_allclose(table.density, exact, rtol=0, atol=3e-14 * exact.max())


def test_partial_integrals_of_a_polynomial() -> None:
    powers = np.arange(24)
    values = NODES[:, None] ** powers
    expected = (NODES[:, None] ** (powers + 1) - (-1.0) ** (powers + 1)) / (powers + 1)
    np.testing.assert_allclose(_TO_NODES @ values, expected, atol=1e-14)


def test_many_components_in_every_dimension() -> None:
    # If μ ~ N(0, 1 − σ²), q_N,j tends to N(0, 1): the KL of N draws is of order 1/N in expectation.
    generator = np.random.default_rng(0)
    n = 20_000
    std = np.broadcast_to(np.array([0.3, 0.6, 0.9]), (n, 3))
    mean = generator.normal(size=(n, 3)) * np.sqrt(1 - std**2)
    found = marginals(posterior(mean, std))
    # About 1/(2σ) independent features are fitted by N codes, each costing 1/(2N).
    assert all(0 < kl < 20 / (2 * n) for kl in found["kl"])
    assert all(0 < ks < 3 / math.sqrt(n) for ks in found["ks"])
    assert found["active"] == [True, True, True]


def test_active_is_the_variance_of_the_means_over_images() -> None:
    mean = np.array([[0.0, 0.0], [0.21, 0.19]])  # variances 0.011 and 0.009
    assert marginals(posterior(mean, np.ones((2, 2))))["active"] == [True, False]


def test_a_standard_deviation_is_not_a_variance() -> None:
    # N(0, 4) and N(0, ½²) mistaken for one another, or σ for σ², would change these.
    wide = marginals(posterior(np.zeros(1), np.array([2.0])))["kl"][0]
    narrow = marginals(posterior(np.zeros(1), np.array([0.5])))["kl"][0]
    assert wide == pytest.approx(1.5 - math.log(2), abs=1e-12)
    assert narrow == pytest.approx(-0.375 + math.log(2), abs=1e-12)


CODES = st.lists(
    st.tuples(st.floats(-50, 50), st.floats(math.log(1e-4), math.log(10))), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(codes=CODES, data=st.data())
def test_properties(codes: list[tuple[float, float]], data: st.DataObject) -> None:
    mean = np.array([m for m, _ in codes])
    std = np.exp([s for _, s in codes])
    found = marginals(posterior(mean, std))
    order = data.draw(st.permutations(range(len(codes))))
    permuted = marginals(posterior(mean[order], std[order]))
    doubled = marginals(posterior(np.tile(mean, 2), np.tile(std, 2)))
    mirrored = marginals(posterior(-mean, std))
    for name in ("kl", "ks", "w2"):
        assert permuted[name] == pytest.approx(found[name], rel=1e-9, abs=1e-9), name
        assert doubled[name] == pytest.approx(found[name], rel=1e-9, abs=1e-9), name
        assert mirrored[name] == pytest.approx(found[name], rel=1e-8, abs=1e-8), name
    (kl,), (ks,), (image_kl,) = found["kl"], found["ks"], found["kl_per_image"]
    assert -1e-9 <= kl <= image_kl + 1e-9  # KL(q_N ‖ p) >= 0, and MI >= 0
    assert image_kl - kl <= math.log(len(codes)) + 1e-9  # MI <= log N
    assert 0 <= ks <= 1 + 1e-12
    # Pinsker: the total variation distance is at least the Kolmogorov-Smirnov one.
    assert 2 * ks**2 <= kl + 1e-9
    # Talagrand: W2(q, N(0,1))² <= 2 KL(q ‖ N(0,1)).
    assert found["w2"][0] ** 2 <= 2 * kl + 1e-9


def test_dimensions_are_treated_alike() -> None:
    generator = np.random.default_rng(5)
    mean, std = generator.normal(size=(50, 4)), generator.uniform(0.1, 1, size=(50, 4))
    together = marginals(posterior(mean, std))
    order = [2, 0, 3, 1]
    shuffled = marginals_function(posterior(mean[:, order], std[:, order]))
    for name, values in together.items():
        assert shuffled[name] == pytest.approx([values[j] for j in order], rel=1e-12), name
