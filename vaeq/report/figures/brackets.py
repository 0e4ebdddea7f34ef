"""The population's KL(q‖p) of every configuration as the interval that is certified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vaeq.report.figures.drawing import Drawing, FigureError, Panel
from vaeq.report.figures.factors import is_saturated_row
from vaeq.report.figures.palette import CODES, INK, PAPER, literal
from vaeq.report.orderings import BRACKET_ERRORS
from vaeq.report.table import Row, Table, setting_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 20


def brackets(table: Table) -> Drawing:
    """One line a configuration, at most twenty evenly chosen."""
    rows = [row for row in table.rows if _ends(row) is not None]
    if not rows:
        raise FigureError("no run has both ends of a population bracket")
    n = len(rows)
    if n > MOST_ROWS:
        rows = [rows[round(i * (n - 1) / (MOST_ROWS - 1))] for i in range(MOST_ROWS)]
    labels = [_label(table, row) for row in rows]
    alt = "; ".join(
        f"{label}: {ends[1]:.3g} to {ends[2]:.3g}"
        for label, row in zip(labels, rows, strict=True)
        if (ends := _ends(row)) is not None
    )
    left = 0.35 + 0.072 * max(map(len, labels))
    return Drawing(
        "brackets",
        "KL(q ‖ p) of the population: certified brackets",
        "thin: over all seeds, 2 s.e. included",
        "Each bar is where KL(q‖p) of the population of images must lie. Two configurations are "
        "ordered where their thin lines do not overlap. Circles: marginal_kl, KL(q_N‖p) of the "
        "training images; triangles: moment_kl, its Gaussian part."
        + ("" if len(rows) == n else f" {len(rows)} of {n} configurations, evenly chosen."),
        "A wide bar means that these data do not identify the divergence, not that it is large. "
        "Hollow circles are saturated and may lie outside the bar.",
        (
            (
                Panel(
                    "nats",
                    f"Certified brackets in nats. {alt}.",
                    lambda axes: _intervals(axes, rows, labels),
                    width=5.2 + max(0.0, left - 1.6),
                    height=1.0 + 0.27 * len(rows),
                    left=left,
                ),
            ),
        ),
    )


def _label(table: Table, row: Row) -> str:
    short = {"latent_dim": "dim", "encoder_depth": "depth", "encoder_width": "width"}
    words = [
        f"{short.get(name, name)} {setting_text(row.settings.get(name))}" for name in table.varying
    ]
    return literal(", ".join(words)) or "all runs"


def _ends(row: Row) -> tuple[float, float, float, float] | None:
    """Widened lower, mean lower, mean upper, widened upper end; None where one is missing."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for name, sign in (("population_kl_lower", -1), ("population_kl_upper", 1)):
        known = [run.estimates[name] for run in row.runs if name in run.estimates]
        values = [e.value for e in known if e.value is not None]
        if not values:
            return None
        wide = [
            e.value + sign * BRACKET_ERRORS * (e.std_error or 0.0)
            for e in known
            if e.value is not None
        ]
        found[name] = values, wide
    (lower, wide_lower), (upper, wide_upper) = found.values()
    return min(wide_lower), sum(lower) / len(lower), sum(upper) / len(upper), max(wide_upper)


def _intervals(axes: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    ends = [found for row in rows if (found := _ends(row)) is not None]
    y = range(len(ends))
    axes.hlines(y, [e[0] for e in ends], [e[3] for e in ends], color=CODES, lw=1.4)
    axes.hlines(y, [e[1] for e in ends], [e[2] for e in ends], color=CODES, lw=7, alpha=0.65)
    positive = min(e[0] for e in ends) > 0
    for metric, marker, hollow in (
        ("marginal_kl", "o", False),
        ("marginal_kl", "o", True),
        ("moment_kl", "^", False),
    ):
        points = [
            (mean, i)
            for i, row in enumerate(rows)
            if (a := row.metrics.get(metric)) is not None
            and (mean := a.mean) is not None
            and (metric != "marginal_kl" or is_saturated_row(row) == hollow)
        ]
        axes.plot([x for x, _ in points], [i for _, i in points], marker, ms=5, color=INK, zorder=4,
                  markerfacecolor=PAPER if hollow else INK)  # fmt: skip
        positive = positive and all(x > 0 for x, _ in points)
    if positive:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.axvline(0, color=INK, lw=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("nats")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
