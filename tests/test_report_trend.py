"""Trend tests against exact permutation counts, scipy and their own symmetries."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vaeq.report.effect import effect_of
from vaeq.report.false_discovery import q_values
from vaeq.report.trend import (
    PAGE,
    PAGE_NORMAL,
    PAIRED_T,
    SIGNED_RANK,
    SIGNS,
    STEPS,
    UNTESTED,
    page,
    paired_t,
    signed_rank,
    smallest_rank_p,
    trend,
)


def zeros(values: list[list[float]]) -> list[list[float | None]]:
    return [[0.0] * len(row) for row in values]


def page_by_counting(table: np.ndarray) -> tuple[float, float]:
    """The definition: every order of the (mid)ranks in every block, one by one."""
    ranks = [stats.rankdata(row) for row in table]
    weights = np.arange(1, table.shape[1] + 1)
    observed = sum(float(weights @ row) for row in ranks)
    totals = np.array(
        [
            sum(float(weights @ np.array(order)) for order in orders)
            for orders in product(*(list(permutations(row)) for row in ranks))
        ]
    )
    return float((totals <= observed + 1e-9).mean()), float((totals >= observed - 1e-9).mean())


@pytest.mark.parametrize(
    "table",
    [
        [[1.0, 2, 3], [1, 2, 3]],
        [[3.0, 2, 1], [3, 1, 2], [2, 3, 1]],
        [[1.0, 1, 2], [2, 1, 3], [5, 5, 5]],
        [[1.0, 2, 2, 0], [0, 0, 1, 1]],
        [[1.0, 2, 3, 4, 5]],
    ],
)
def test_page_is_the_permutation_count(table: list[list[float]]) -> None:
    assert page(np.array(table)) == pytest.approx(page_by_counting(np.array(table)), abs=1e-12)


@pytest.mark.parametrize(("m", "k"), [(2, 3), (3, 3), (3, 5), (6, 4), (9, 5), (4, 8)])
def test_page_is_scipys_exact_test_without_ties(m: int, k: int) -> None:
    rng = np.random.default_rng(10 * m + k)
    table = rng.normal(size=(m, k)) + 0.2 * np.arange(k)
    up = stats.page_trend_test(table, method="exact").pvalue
    down = stats.page_trend_test(table, predicted_ranks=np.arange(k, 0, -1), method="exact").pvalue
    assert page(table) == pytest.approx((down, up), rel=1e-9)


def test_page_is_scipys_normal_approximation_above_eight_levels() -> None:
    table = np.random.default_rng(1).normal(size=(4, 9))
    up = stats.page_trend_test(table, method="asymptotic").pvalue
    assert page(table)[1] == pytest.approx(up, rel=1e-9)
    assert trend(table.tolist(), zeros(table.tolist())).test == PAGE_NORMAL


@given(
    st.lists(st.lists(st.integers(0, 4).map(float), min_size=4, max_size=4), min_size=1, max_size=4)
)
def test_page_is_symmetric_and_sees_only_ranks(rows: list[list[float]]) -> None:
    table = np.array(rows)
    down, up = page(table)
    assert page(table[:, ::-1]) == pytest.approx((up, down), abs=1e-12)
    assert page(np.exp(table)) == pytest.approx((down, up), abs=1e-12)
    assert page(table[::-1]) == pytest.approx((down, up), abs=1e-12)
    # Both tails hold the observed value.
    assert down + up >= 1 - 1e-12


@pytest.mark.parametrize("m", [6, 9])
def test_signed_rank_is_scipys_exact_test_without_ties(m: int) -> None:
    d = np.random.default_rng(m).normal(size=m) + 0.4
    down = stats.wilcoxon(d, alternative="less", method="exact").pvalue
    up = stats.wilcoxon(d, alternative="greater", method="exact").pvalue
    assert signed_rank(d) == pytest.approx((down, up), rel=1e-9)


def test_signed_rank_with_ties_is_the_count_of_signs() -> None:
    d = np.array([1.0, -1, 2, 2, 0, 3])
    ranks = np.array([1.5, 1.5, 3.5, 3.5, 5])
    observed = 1.5 + 3.5 + 3.5 + 5
    totals = [float(ranks @ np.array(signs)) for signs in product((0, 1), repeat=5)]
    expected = (np.mean(np.array(totals) <= observed), np.mean(np.array(totals) >= observed))
    assert signed_rank(d) == pytest.approx(expected)
    assert signed_rank(np.zeros(6)) == (1.0, 1.0)


def test_paired_t_is_scipys() -> None:
    d = np.array([0.3, 0.1, 0.5, -0.1])
    down = stats.ttest_1samp(d, 0, alternative="less").pvalue
    up = stats.ttest_1samp(d, 0, alternative="greater").pvalue
    assert paired_t(d) == pytest.approx((down, up), rel=1e-9)
    assert paired_t(np.array([-0.25, -0.25, -0.25])) == (0.0, 1.0)


def test_smallest_attainable_p() -> None:
    assert smallest_rank_p(3, 3) == pytest.approx(2 / 6**3)
    assert smallest_rank_p(1, 3) == pytest.approx(1 / 3)
    assert smallest_rank_p(1, 2) == 1.0
    rows = [[3.0, 2.0, 1.0]] * 3
    assert trend(rows, zeros(rows)).p_value == pytest.approx(smallest_rank_p(3, 3))


@pytest.mark.parametrize(
    ("rows", "direction", "test"),
    [
        ([[3.0, 2, 1]] * 3, "closer", PAGE),
        ([[1.0, 2, 3]] * 3, "further", PAGE),
        ([[1.0, 2, 3], [3, 2, 1], [2, 1, 3]], "no clear change", PAGE),
        # One block of five levels can reach p = 2/120.
        ([[5.0, 4, 3, 2, 1]], "closer", PAGE),
        ([[5.0, 4, 3, 1, 2]], "no clear change", PAGE),
        # Two levels: ranks from six blocks on, a paired t-test from three.
        ([[2.0, 1.0 + 0.1 * i] for i in range(6)], "closer", SIGNED_RANK),
        ([[1.0, 2.0 + 0.1 * i] for i in range(3)], "further", PAIRED_T),
        ([[1.0, 2.0], [2.0, 1.0], [1.0, 1.1]], "no clear change", PAIRED_T),
    ],
)
def test_the_test_follows_levels_and_blocks(
    rows: list[list[float]], direction: str, test: str
) -> None:
    result = trend(rows, zeros(rows))
    assert (result.direction, result.test) == (direction, test)
    assert (result.n_blocks, result.n_levels) == (len(rows), len(rows[0]))
    assert result.p_value is not None
    assert (result.p_value <= 0.05) == (direction != "no clear change")


@pytest.mark.parametrize(
    ("row", "errors", "direction"),
    [
        ([3.0, 2.0, 1.0], [0.1, 0.1, 0.1], "closer"),
        ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], "further"),
        ([1.0, 2.0, 2.2], [0.1, 0.1, 0.1], "no clear change"),  # 0.2 < 2·0.1·sqrt(2)
        ([1.0, 2.0, 1.5], [0.1, 0.1, 0.1], "no clear change"),
        ([1.0, 2.0, 3.0], [0.0, 0.1, 0.0], "further"),
        ([1.0, 1.0, 3.0], [0.0, 0.0, 0.1], "no clear change"),
    ],
)
def test_one_block_is_judged_by_its_monte_carlo_error(
    row: list[float], errors: list[float | None], direction: str
) -> None:
    result = trend([row], [errors])
    assert (result.direction, result.test) == (direction, STEPS)


def test_p_of_the_steps_is_that_of_the_least_certain_one() -> None:
    result = trend([[1.0, 2.0, 2.3]], [[0.1, 0.1, 0.1]])
    assert result.p_value == pytest.approx(2 * stats.norm.sf(0.3 / np.hypot(0.1, 0.1)))


def test_steps_pool_blocks_and_want_them_to_agree() -> None:
    # Two blocks of three levels cannot reach p = 0.05 by ranks; the mean of two halves variances.
    result = trend([[1.0, 2.0, 2.4], [1.0, 2.0, 2.4]], [[0.15] * 3] * 2)
    z = 0.4 / (np.sqrt(4 * 0.15**2) / 2)
    assert result.p_value == pytest.approx(2 * stats.norm.sf(z))
    assert result.direction == "further"
    split = trend([[1.0, 2.0, 4.0], [1.0, 2.0, 1.9]], [[0.01] * 3] * 2)
    assert (split.direction, split.note) == ("no clear change", "the blocks disagree")


def test_exact_quantities_are_judged_by_the_sign_of_every_step() -> None:
    assert trend([[3.0, 2.0, 1.0]], [[0.0] * 3]).direction == "closer"
    assert trend([[1.0, 2.0, 3.0]], [[0.0] * 3]).direction == "further"
    bent = trend([[0.2, 0.1, 0.1]], [[0.0] * 3])
    assert (bent.direction, bent.test, bent.p_value) == ("no clear change", SIGNS, None)
    assert bent.note == "steps: down, level"


def test_without_standard_errors_a_single_block_is_not_judged() -> None:
    result = trend([[3.0, 2.0, 1.0]], [[0.1, None, 0.1]])
    assert (result.direction, result.test) == ("no clear change", UNTESTED)
    assert "standard error" in result.note


def test_q_values_are_those_of_scipy_in_any_order() -> None:
    from scipy.stats import false_discovery_control

    rng = np.random.default_rng(0)
    for n in (1, 2, 8, 30):
        p = rng.uniform(size=n) ** 3
        assert q_values(list(p)) == pytest.approx(false_discovery_control(p).tolist())
    assert q_values([]) == []


def test_q_values_bound_false_discoveries() -> None:
    """Of uniform p-values, sets with any q <= 0.05 are at most that share of all sets."""
    rng = np.random.default_rng(1)
    sets = 4_000
    found = sum(min(q_values(list(rng.uniform(size=8)))) <= 0.05 for _ in range(sets))
    assert found / sets < 0.05 + 4 * (0.05 * 0.95 / sets) ** 0.5


def test_an_effect_is_the_slope_per_doubling_with_students_interval() -> None:
    # Slopes 1, 2 and 3 per doubling: mean 2, sd 1, t(2; 0.975) = 4.3027.
    table = [[5 + slope * x for x in (1, 3, 5)] for slope in (1, 2, 3)]
    effect = effect_of("latent_dim", (2, 8, 32), table, (0, 1, 2))
    assert effect is not None
    assert (effect.per, effect.n_seeds) == ("doubling", 3)
    assert effect.change == pytest.approx(2)
    assert effect.high == pytest.approx(2 + 4.30265 / 3**0.5, abs=1e-4)
    assert effect.low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4)


def test_blocks_of_one_seed_are_no_replicates() -> None:
    effect = effect_of("encoder_depth", (1, 2), [[1.0, 2.0], [1.0, 4.0]], (0, 0))
    assert effect is not None
    assert (effect.per, effect.change, effect.low, effect.n_seeds) == ("layer", 2.0, None, 1)
    assert effect.change_text() == "+2.0"


def test_a_ratio_is_geometric_and_needs_positive_numbers() -> None:
    halved = effect_of("latent_dim", (2, 4, 8), [[0.8, 0.4, 0.2]], (0,))
    assert halved is not None
    assert halved.ratio == pytest.approx(0.5)
    assert halved.ratio_text() == "× 0.50"
    crossing = effect_of("latent_dim", (2, 4), [[0.1, -0.1]], (0,))
    assert crossing is not None
    assert crossing.ratio is None
    assert effect_of("latent_dim", (2, "x"), [[1.0, 2.0]], (0,)) is None
