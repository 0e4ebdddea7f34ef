"""How large a change is: nats per doubling of a size or per layer of depth, with an interval.

The slope of least squares of the metric on log2(level), or on the level itself for a depth, is
taken in every block; blocks of one seed are averaged, and the interval is Student's over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from vaeq.report.runs import Scalar
from vaeq.report.words import number

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Effect:
    """Change of a metric per doubling, or per layer.

    ``low`` and ``high`` are the ends of the 95% confidence interval over seeds; None with one seed,
    which says nothing of the next. ``ratio`` is the factor by which the metric is multiplied, None
    where it is not positive throughout.
    """

    per: str
    change: float
    low: float | None
    high: float | None
    ratio: float | None
    n_seeds: int

    def change_text(self) -> str:
        """``-0.031 [-0.034, -0.028]``; with one seed the change alone."""
        text = _signed(self.change)
        if self.low is None or self.high is None:
            return text
        return f"{text} [{_signed(self.low)}, {_signed(self.high)}]"

    def ratio_text(self) -> str:
        """``× 0.46``."""
        return "n/a" if self.ratio is None else f"× {number(self.ratio, 2)}"


def effect_of(
    factor: str,
    levels: Sequence[Scalar],
    table: Sequence[Sequence[float]],
    seeds: Sequence[int],
) -> Effect | None:
    """The effect of a factor on one metric; None where a level is no number.

    Args:
        factor: a depth is taken as it is, anything else on the scale of doublings.
        levels: the k levels in order.
        table: the metric, a row of k values for each block.
        seeds: the seed of each block.
    """
    numeric = [float(x) for x in levels if isinstance(x, int | float) and not isinstance(x, bool)]
    doubling = not factor.endswith("depth")
    if len(numeric) != len(levels) or (doubling and min(numeric) <= 0):
        return None
    x = [math.log2(level) for level in numeric] if doubling else numeric
    by_seed: dict[int, list[float]] = {}
    for row, seed in zip(table, seeds, strict=True):
        by_seed.setdefault(seed, []).append(_slope(x, row))
    slopes = [fmean(each) for each in by_seed.values()]
    change = fmean(slopes)
    low = high = None
    if len(slopes) > 1:
        from scipy.special import stdtrit

        reach = float(stdtrit(len(slopes) - 1, 0.5 + CONFIDENCE / 2))
        half = reach * stdev(slopes) / math.sqrt(len(slopes))
        low, high = change - half, change + half
    ratio = None
    if all(value > 0 for row in table for value in row):
        ratio = math.exp(fmean(_slope(x, [math.log(value) for value in row]) for row in table))
    return Effect("doubling" if doubling else "layer", change, low, high, ratio, len(slopes))


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    centre = fmean(x)
    scale = math.fsum((a - centre) ** 2 for a in x)
    return math.fsum((a - centre) * b for a, b in zip(x, y, strict=True)) / scale


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value), 2)
