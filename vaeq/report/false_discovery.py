"""The false-discovery rate over several tests: Benjamini & Hochberg's q-values.

q_(i) = min_{j >= i} p_(j) · m / j over the p-values in rising order: calling every test with
q <= 0.05 a discovery keeps the expected share of false ones at 0.05, for independent tests and for
positively dependent ones, as metrics of the same runs are.
"""

from __future__ import annotations

from collections.abc import Sequence


def q_values(p_values: Sequence[float]) -> list[float]:
    """The q-value of each p-value, in the order given.

    References:
        Benjamini & Hochberg (1995), JRSS B 57, 289-300; for dependence Benjamini & Yekutieli
        (2001), Annals of Statistics 29, 1165-1188.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__, reverse=True)
    result = [1.0] * len(p_values)
    smallest = 1.0
    for place, index in enumerate(order):
        rank = len(p_values) - place
        smallest = min(smallest, p_values[index] * len(p_values) / rank)
        result[index] = smallest
    return result
