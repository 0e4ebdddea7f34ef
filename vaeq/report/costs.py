"""What the mismatch costs at generator time: samples by source, and the bound on the generator.

For the joint distributions q(x, z) = p_data(x) q(z|x) and p_θ(x, z) = p(z) p_θ(x|z) the chain rule
splits KL(q(x, z) ‖ p_θ(x, z)) both ways:

    KL(q(z) ‖ p(z)) <= KL(p_data ‖ p_θ) + E KL(q(z|x) ‖ p_θ(z|x))

The last term is the inference gap, so KL(p_data ‖ p_θ) >= KL(q(z) ‖ p(z)) − inference gap: a
mismatch that inference does not account for is one that the generator's samples must show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vaeq.report.table import Row, Table, settings_text
from vaeq.report.words import MISSING, number

SOURCES = {
    "train": "training images (floor)",
    "prior": "prior N(0, I)",
    "aggregated": "aggregated posterior",
    "gmm": "Gaussian mixture",
    "scaled": "scaled N(0, s²I)",
}
MEASURES = ("fid", "precision", "recall", "class_balance", "entropy", "no_digit")
LIKELIHOOD = ("log_likelihood", "inference_gap", "ais_gap", "prior_cost", "quality_mismatch",
              "quality_recovered")  # fmt: skip
MOST_CONFIGURATIONS = 8


@dataclass(frozen=True)
class Cost:
    """One configuration: a row of measures for each source, and the bound in words."""

    label: str
    sources: tuple[tuple[str, tuple[str, ...]], ...]
    likelihood: tuple[tuple[str, str], ...]
    bound: str


@dataclass(frozen=True)
class Costs:
    """The configurations shown, of how many, and the measures that any of them has."""

    measures: tuple[str, ...]
    costs: tuple[Cost, ...]
    n: int


def costs_of(table: Table) -> Costs | None:
    """At most eight configurations, evenly chosen; None where no run has any of the numbers."""
    named = {f"{measure}_{source}" for measure in MEASURES for source in SOURCES} | {*LIKELIHOOD}
    rows = [
        row
        for row in table.rows
        if any(name in named and a.mean is not None for name, a in row.metrics.items())
    ]
    if not rows:
        return None
    n = len(rows)
    if n > MOST_CONFIGURATIONS:
        last = MOST_CONFIGURATIONS - 1
        rows = [rows[round(i * (n - 1) / last)] for i in range(MOST_CONFIGURATIONS)]
    measures = tuple(
        measure
        for measure in MEASURES
        if any(f"{measure}_{source}" in table.metrics for source in SOURCES)
    )
    return Costs(measures, tuple(_cost(table, row, measures) for row in rows), n)


def _cost(table: Table, row: Row, measures: Sequence[str]) -> Cost:
    label = settings_text({name: row.settings.get(name) for name in table.varying})
    sources = tuple(
        (words, tuple(_cell(table, row, f"{measure}_{source}") for measure in measures))
        for source, words in SOURCES.items()
        if any(f"{measure}_{source}" in table.metrics for measure in measures)
    )
    likelihood = tuple(
        (table.heading(name), _cell(table, row, name))
        for name in LIKELIHOOD
        if name in table.metrics
    )
    return Cost(label or "all runs", sources, likelihood, _bound(row))


def _cell(table: Table, row: Row, metric: str) -> str:
    return table.cell(row, metric) if metric in row.metrics else MISSING


def _bound(row: Row) -> str:
    """KL(p_data ‖ p_θ) >= population_kl_lower − inference_gap, with the numbers."""
    lower, gap = row.metrics.get("population_kl_lower"), row.metrics.get("inference_gap")
    if lower is None or lower.mean is None or gap is None or gap.mean is None:
        absent = "population_kl_lower" if lower is None or lower.mean is None else "inference_gap"
        return f"No bound: {absent} was not measured."
    rest = lower.mean - gap.mean
    text = (
        f"KL(p_data‖p_θ) ≥ {number(lower.mean)} − {number(gap.mean)} = "
        f"{'−' if rest < 0 else ''}{number(abs(rest))} nats"
    )
    if rest <= 0:
        return f"{text}: inference alone could account for the mismatch, so nothing follows."
    return f"{text}: the generator misses the data by at least that much."
