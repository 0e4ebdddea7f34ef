"""What each metric says about one factor: blocks of runs that differ in it alone, and their trend.

Over seeds the tests of all metrics are one family, and Benjamini and Hochberg's q-value decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from vaeq.report.effect import Effect, effect_of
from vaeq.report.false_discovery import q_values
from vaeq.report.runs import Run, Scalar
from vaeq.report.table import sort_key
from vaeq.report.trend import ALPHA, BLOCK_TESTS, Direction, Trend, trend
from vaeq.report.words import number

SATURATED_ABOVE = 0.95

VIEWS = {
    "per dimension": ("dimension_kl_mean", "dimension_kl_mean_active", "dimension_kl_max"),
    "joint": ("dimension_kl_sum", "total_correlation", "moment_kl", "marginal_kl"),
    "each image": ("kl_per_image",),
}
# Bounded by log N through the mutual information, so they saturate with it.
SATURATING = ("marginal_kl", "total_correlation")

# Where a column is narrow.
SHORT = {"no clear change": "unclear", "not measured": "n/a"} | {
    word: word for word in ("closer", "further", "saturated")
}

Answer = Literal["closer", "further", "no clear change", "saturated", "not measured"]
Block = Mapping[Scalar, Run]


@dataclass(frozen=True)
class Outcome:
    """What one metric says about one factor.

    ``direction`` is that of the trend, or ``no clear change`` where the false-discovery rate takes
    it back; ``answer`` is it too unless the metric is saturated at some level or could not be
    compared. ``first`` and ``last`` are means over the blocks at the lowest and the highest level.
    ``q_value`` is None where the test is not one over blocks.
    """

    metric: str
    view: str
    unit: str
    answer: Answer
    direction: Direction
    trend: Trend | None
    levels: tuple[Scalar, ...] = ()
    first: float | None = None
    last: float | None = None
    effect: Effect | None = None
    q_value: float | None = None

    def answer_text(self) -> str:
        """``closer``, or ``saturated, further``."""
        return f"saturated, {SHORT[self.direction]}" if self.answer == "saturated" else self.answer

    def effect_text(self) -> str:
        """``0.104 → 0.00412``: the mean at the first and at the last level."""
        if self.first is None or self.last is None:
            return "n/a"
        return f"{number(self.first)} → {number(self.last)}"

    def test_text(self) -> str:
        """``Page p=0.0093``; no p-value where the test has none."""
        if self.trend is None:
            return "none"
        p = self.trend.p_value
        return self.trend.test if p is None else f"{self.trend.test} {_probability('p', p)}"

    def q_text(self) -> str:
        """``q=0.025``: the false-discovery rate across the metrics, where tests over blocks ran."""
        return "" if self.q_value is None else _probability("q", self.q_value)


def _probability(name: str, value: float) -> str:
    return name + ("<0.001" if value < 1e-3 else f"={value:.2g}")


def is_reference(run: Run) -> bool:
    """Is this a model without an encoder of its own to judge?"""
    return run.settings.get("model") == "ppca"


def blocks_of(runs: Sequence[Run], factor: str) -> list[Block]:
    """Runs that differ in the factor alone, as one mapping level → run for each block.

    The claims are about VAEs: probabilistic PCA stands beside them for reference.
    """
    blocks: dict[tuple[object, ...], dict[Scalar, Run]] = {}
    for run in runs:
        if factor in run.settings and not is_reference(run):
            rest = sorted((k, v) for k, v in run.settings.items() if k != factor)
            blocks.setdefault((*rest, run.seed), {})[run.settings[factor]] = run
    return [block for block in blocks.values() if len(block) > 1]


def common_levels(levels: Sequence[Sequence[Scalar]]) -> tuple[Scalar, ...]:
    """The set of levels to compare, of those that occur as the levels of a block.

    It is the one with the most steps in all: (levels - 1) × blocks that have them all. A block that
    lost a level to a failed run then costs that block, not the level.
    """
    sets: list[frozenset[Scalar]] = [frozenset(each) for each in levels if len(each) > 1]
    if not sets:
        return ()
    steps = {each: (len(each) - 1) * sum(each <= other for other in sets) for each in sets}
    most = max(steps, key=lambda each: (steps[each], len(each)))
    return tuple(sorted(most, key=sort_key))


def outcomes_of(factor: str, blocks: Sequence[Block]) -> tuple[Outcome, ...]:
    """Every metric of every view on these blocks, with false discoveries controlled across them."""
    found = [
        _outcome(factor, metric, view, blocks)
        for view, metrics in VIEWS.items()
        for metric in metrics
    ]
    tested = {
        i: outcome.trend.p_value
        for i, outcome in enumerate(found)
        if outcome.trend is not None
        and outcome.trend.test in BLOCK_TESTS
        and outcome.trend.p_value is not None
    }
    for i, q in zip(tested, q_values(list(tested.values())), strict=True):
        outcome = replace(found[i], q_value=q)
        if q > ALPHA:
            kept = outcome.answer == "saturated"
            answer: Answer = "saturated" if kept else "no clear change"
            outcome = replace(outcome, direction="no clear change", answer=answer)
        found[i] = outcome
    return tuple(found)


def _outcome(factor: str, metric: str, view: str, blocks: Sequence[Block]) -> Outcome:
    """Compare a metric over the blocks that have a number for it at every level."""
    units = [
        run.estimates[metric].unit
        for block in blocks
        for run in block.values()
        if run.value(metric) is not None
    ]
    unit = units[0] if units else ""
    usable: list[Block] = [
        {
            level: run
            for level, run in block.items()
            if run.value(metric) is not None and run.estimates[metric].unit == unit
        }
        for block in blocks
    ]
    levels = common_levels([tuple(block) for block in usable])
    if not levels:
        return Outcome(metric, view, unit, "not measured", "no clear change", None)
    complete = [block for block in usable if set(levels) <= set(block)]
    table = [[v for level in levels if (v := b[level].value(metric)) is not None] for b in complete]
    errors = [[b[level].estimates[metric].std_error for level in levels] for b in complete]
    result = trend(table, errors)
    answer: Answer = result.direction
    if metric in SATURATING and any(is_saturated(b[level]) for b in complete for level in levels):
        answer = "saturated"
    first, last = fmean(row[0] for row in table), fmean(row[-1] for row in table)
    effect = effect_of(factor, levels, table, [b[levels[0]].seed for b in complete])
    return Outcome(
        metric, view, unit, answer, result.direction, result, levels, first, last, effect
    )


def is_saturated(run: Run) -> bool:
    """Is the mutual information at its ceiling log N, so that marginal_kl says nothing new?"""
    fraction = run.value("mutual_information_fraction")
    return fraction is not None and fraction > SATURATED_ABOVE
