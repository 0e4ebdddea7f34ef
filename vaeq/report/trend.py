"""Does a quantity move with an ordered factor? Page's test (1963), else steps against errors.

A block is one run at every level of the factor with all other settings, the seed included, held
fixed. Page's statistic is L = Σ_j j·R_j with R_j the sum over blocks of the within-block ranks at
level j. Tests are two-sided: the smaller of the two one-sided p-values, doubled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

ALPHA = 0.05
# Steps between levels count as moves beyond this many Monte Carlo standard errors.
STEP_ERRORS = 2.0
# Up to 8! = 40,320 orders of a block are enumerated; beyond, the normal approximation is close.
_LARGEST_EXACT = 8

Direction = Literal["closer", "further", "no clear change"]
Table = npt.NDArray[np.float64]

PAGE = "Page"
PAGE_NORMAL = "Page~"
SIGNED_RANK = "ranks"
PAIRED_T = "t"
STEPS = "steps"
SIGNS = "signs"
UNTESTED = "none"

# Those whose p-value speaks of other blocks, and of other seeds where blocks are seeds.
BLOCK_TESTS = (PAGE, PAGE_NORMAL, SIGNED_RANK, PAIRED_T)

TESTS = {
    PAGE: "Page's trend test over blocks, exact permutation p-value, two-sided",
    PAGE_NORMAL: "Page's trend test over blocks, normal approximation, two-sided",
    SIGNED_RANK: "Wilcoxon's signed-rank test over blocks, exact, two-sided",
    PAIRED_T: "paired t-test over blocks, two-sided; it takes the differences for normal",
    STEPS: "a change only if every step between levels exceeds 2 Monte Carlo s.e., all one way; "
    "p is that of the least certain step, two-sided",
    SIGNS: "no Monte Carlo error to test against; a change only if every step has the same sign",
}

FALSE_DISCOVERY = (
    "the p-values of one comparison's metrics corrected for their number (Benjamini and "
    f"Hochberg); a change counts where q <= {ALPHA}"
)


@dataclass(frozen=True)
class Trend:
    """Which way a divergence moves over the levels of a factor, and how that was decided.

    ``p_value`` is None where the test has none. ``smallest_p`` is the smallest two-sided p-value
    that a rank test over so many blocks could reach; above ``ALPHA`` no rank test can decide.
    """

    direction: Direction
    test: str
    p_value: float | None
    n_blocks: int
    n_levels: int
    smallest_p: float
    note: str = ""


def trend(values: Sequence[Sequence[float]], errors: Sequence[Sequence[float | None]]) -> Trend:
    """The trend of a divergence over ordered levels: lower is closer to N(0, I).

    With three levels or more: Page's test if its smallest attainable p-value is at most ``ALPHA``.
    With two: the exact signed-rank test from six blocks on, a paired t-test from three on. With
    fewer blocks: every step against its Monte Carlo error, which says nothing of other seeds.

    Args:
        values: shape (blocks, levels), both at least one and two; levels in their natural order.
        errors: their Monte Carlo standard errors, same shape; None where unknown.
    """
    table = np.asarray(values, dtype=np.float64)  # (m, k)
    m, k = table.shape
    smallest_p = smallest_rank_p(m, k)
    mean_change = float(np.mean(table[:, -1] - table[:, 0]))
    if smallest_p > ALPHA and (k > 2 or m < 3):
        return _by_steps(table, errors, smallest_p)
    if k > 2:
        test = PAGE if k <= _LARGEST_EXACT else PAGE_NORMAL
        p_down, p_up = page(table)
        sign = p_up - p_down
    elif smallest_p <= ALPHA:
        test = SIGNED_RANK
        p_down, p_up = signed_rank(table[:, 1] - table[:, 0])
        sign = p_up - p_down
    else:
        test = PAIRED_T
        p_down, p_up = paired_t(table[:, 1] - table[:, 0])
        sign = -mean_change
    p_value = min(1.0, 2 * min(p_down, p_up))
    direction: Direction = "no clear change"
    if p_value <= ALPHA:
        direction = "closer" if sign > 0 else "further"
    return Trend(direction, test, p_value, m, k, smallest_p)


def smallest_rank_p(n_blocks: int, n_levels: int) -> float:
    """The smallest two-sided p-value of a rank test: all blocks in one order, (1/k!)^m, doubled."""
    return min(1.0, 2.0 * math.exp(-n_blocks * math.lgamma(n_levels + 1)))


def page(table: Table) -> tuple[float, float]:
    """One-sided p-values of Page's L for a falling and for a rising trend.

    Exact for up to eight levels, also with tied values: under the null hypothesis every order of a
    block's (mid)ranks is equally likely, and the distribution of L is the convolution of the
    blocks'. Unlike ``scipy.stats.page_trend_test`` that holds with ties and with a single block;
    without ties the two agree. Above eight levels: the normal approximation.

    Args:
        table: (m, k) values, k >= 3.

    References:
        Page, E. B. (1963). Ordered hypotheses for multiple treatments. JASA 58, 216-230.
    """
    m, k = table.shape
    # Twice the midranks are integers.
    ranks = np.stack([_double_ranks(row) for row in table])  # (m, k)
    weights = np.arange(1, k + 1)
    statistic = int((ranks * weights).sum())
    if k > _LARGEST_EXACT:
        mean = m * k * (k + 1) ** 2 / 4
        variance = m * k**2 * (k + 1) * (k**2 - 1) / 144
        z = (statistic / 2 - mean) / math.sqrt(variance)
        return _normal_cdf(z), _normal_cdf(-z)
    from itertools import permutations

    orders = np.array(list(permutations(range(k))))  # (k!, k)
    distribution, offset = np.ones(1), 0
    cache: dict[bytes, tuple[npt.NDArray[np.float64], int]] = {}
    for row in ranks:
        row = np.sort(row)
        if row.tobytes() not in cache:
            sums = row[orders] @ weights
            counts = np.bincount(sums - sums.min())
            cache[row.tobytes()] = counts / counts.sum(), int(sums.min())
        block, lowest = cache[row.tobytes()]
        distribution, offset = np.convolve(distribution, block), offset + lowest
    at = statistic - offset
    return float(distribution[: at + 1].sum()), float(distribution[at:].sum())


def signed_rank(differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """One-sided exact p-values of Wilcoxon's signed ranks for falling and for rising pairs.

    Zero differences are dropped and tied ones share their rank; the null distribution is that of
    random signs on the very ranks at hand.
    """
    d = differences[differences != 0]
    if d.size == 0:
        return 1.0, 1.0
    ranks = _double_ranks(np.abs(d))
    distribution = np.ones(1)
    for rank in ranks:
        step = np.zeros(rank + 1)
        step[[0, rank]] = 0.5
        distribution = np.convolve(distribution, step)
    at = int(ranks[d > 0].sum())
    return float(distribution[: at + 1].sum()), float(distribution[at:].sum())


def paired_t(differences: npt.NDArray[np.float64]) -> tuple[float, float]:
    """One-sided p-values of Student's paired t-test for falling and for rising pairs."""
    from scipy.special import stdtr

    m = differences.size
    mean, sd = float(differences.mean()), float(differences.std(ddof=1))
    if sd == 0:
        return (0.0, 1.0) if mean < 0 else (1.0, 0.0) if mean > 0 else (1.0, 1.0)
    t = mean / (sd / math.sqrt(m))
    return float(stdtr(m - 1, t)), float(stdtr(m - 1, -t))


def _by_steps(table: Table, errors: Sequence[Sequence[float | None]], smallest_p: float) -> Trend:
    """Every step between neighbouring levels against its Monte Carlo error, all blocks agreeing."""
    m, k = table.shape
    if any(error is None for row in errors for error in row):
        note = "the records have no standard error for it"
        return Trend("no clear change", UNTESTED, None, m, k, smallest_p, note)
    steps = np.diff(table, axis=1)  # (m, k - 1)
    step = steps.mean(axis=0)
    variance = np.asarray(errors, dtype=np.float64) ** 2
    error = np.sqrt((variance[:, 1:] + variance[:, :-1]).sum(axis=0)) / m  # (k - 1,)
    agree = bool((np.sign(steps) == np.sign(steps[:1])).all())
    note = "" if agree else "the blocks disagree"
    if (error == 0).all():
        down, up = bool((steps < 0).all()), bool((steps > 0).all())
        if agree and not (down or up):
            words = {-1: "down", 0: "level", 1: "up"}
            note = "steps: " + ", ".join(words[int(sign)] for sign in np.sign(step))
        direction: Direction = "closer" if down else "further" if up else "no clear change"
        return Trend(direction, SIGNS, None, m, k, smallest_p, note)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(step == 0, 0.0, step / error)  # infinite where a step has no error
    p_down, p_up = max(map(_normal_cdf, z)), max(map(_normal_cdf, -z))
    p_value = min(1.0, 2 * min(p_down, p_up))
    direction = "no clear change"
    if agree and (np.abs(z) > STEP_ERRORS).all() and len(set(np.sign(z))) == 1:
        direction = "closer" if z[0] < 0 else "further"
    return Trend(direction, STEPS, p_value, m, k, smallest_p, note)


def _double_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Twice the ranks from 1 on, ties sharing the mean of their ranks."""
    below = (values[:, None] > values).sum(axis=1)
    equal = (values[:, None] == values).sum(axis=1)
    return np.asarray(2 * below + equal + 1, dtype=np.int64)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
