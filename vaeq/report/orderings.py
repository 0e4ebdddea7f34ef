"""Which levels of a factor the certified population brackets put in order.

Two configurations are ordered when their brackets, widened by two standard errors, stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vaeq.report.outcomes import Block
from vaeq.report.runs import Run, Scalar
from vaeq.report.table import setting_text
from vaeq.report.words import number

# An end of a bracket is widened by so many standard errors before two brackets are compared.
BRACKET_ERRORS = 2.0
MOST_ORDERINGS = 4


@dataclass(frozen=True)
class Ordering:
    """``high`` is certified ``order`` than ``low`` in all blocks; empty where it is not."""

    low: Scalar
    high: Scalar
    order: Literal["further", "closer", ""]
    low_bracket: str
    high_bracket: str
    n_blocks: int

    def text(self) -> str:
        """``8 is further than 2 ([1.60, 6.60] against [0.330, 0.470] nats)``."""
        blocks = f", in all {self.n_blocks} blocks" if self.n_blocks > 1 else ""
        return (
            f"{setting_text(self.high)} is {self.order} than {setting_text(self.low)} "
            f"({self.high_bracket} against {self.low_bracket} nats{blocks})"
        )


def orderings_of(levels: Sequence[Scalar], blocks: Sequence[Block]) -> tuple[Ordering, ...]:
    """Every pair of levels with its order; empty where no run has a bracket."""
    if not any(
        _bound(run, "population_kl_lower") is not None for b in blocks for run in b.values()
    ):
        return ()
    found = []
    for i, low in enumerate(levels):
        for high in levels[i + 1 :]:
            pairs = [(block[low], block[high]) for block in blocks if {low, high} <= set(block)]
            orders = {_order(a, b) for a, b in pairs}
            found.append(
                Ordering(
                    low,
                    high,
                    orders.pop() if len(orders) == 1 else "",
                    _span([a for a, _ in pairs]),
                    _span([b for _, b in pairs]),
                    len(pairs),
                )
            )
    return tuple(found)


def ordering_notes(factor: str, orderings: Sequence[Ordering]) -> list[str]:
    """The certified pairs in one sentence."""
    if not orderings:
        return []
    certified = [each.text() for each in orderings if each.order]
    head = "Population KL(q‖p), where brackets widened by 2 s.e. stay apart"
    if not certified:
        return [f"{head}: no two levels of {factor} are ordered."]
    more = len(certified) - MOST_ORDERINGS
    tail = f"; and {more} pairs more" if more > 0 else ""
    return [
        f"{head}, certified in {len(certified)} of {len(orderings)} pairs of {factor}: "
        f"{'; '.join(certified[:MOST_ORDERINGS])}{tail}."
    ]


def _bound(run: Run, name: str) -> tuple[float, float] | None:
    """An end of the bracket with its error; None where either is missing."""
    estimate = run.estimates.get(name)
    if estimate is None or estimate.value is None or estimate.std_error is None:
        return None
    return estimate.value, estimate.std_error


def _order(a: Run, b: Run) -> Literal["further", "closer", ""]:
    """Whether b is certified further or closer than a."""
    if _apart(a, b):
        return "further"
    return "closer" if _apart(b, a) else ""


def _apart(near: Run, far: Run) -> bool:
    upper, lower = _bound(near, "population_kl_upper"), _bound(far, "population_kl_lower")
    return (
        upper is not None
        and lower is not None
        and lower[0] - BRACKET_ERRORS * lower[1] > upper[0] + BRACKET_ERRORS * upper[1]
    )


def _span(runs: Sequence[Run]) -> str:
    """The widest bracket over some runs: ``[1.60, 6.60]``."""
    lowers = [run.value("population_kl_lower") for run in runs]
    uppers = [run.value("population_kl_upper") for run in runs]
    low = min((x for x in lowers if x is not None), default=None)
    high = max((x for x in uppers if x is not None), default=None)
    return "[" + ", ".join("n/a" if x is None else number(x) for x in (low, high)) + "]"
