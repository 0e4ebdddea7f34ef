"""Mean KL per dimension and joint KL(q_N‖p) against a factor of the sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vaeq.report.figures.drawing import (
    Drawing,
    FigureError,
    Panel,
    legend_above,
    legend_room,
)
from vaeq.report.figures.factors import (
    Line,
    error_words,
    is_saturated_row,
    lines_along,
    more_words,
    near_zero_axis,
)
from vaeq.report.figures.palette import CODES, INK, PAPER
from vaeq.report.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BRACKETS = 3


def divergence(table: Table, factor: str) -> Drawing:
    """Both views side by side: a metric falls in one and may rise in the other."""
    if factor not in table.varying:
        raise FigureError(f"{factor} does not vary")
    if not {"dimension_kl_mean", "marginal_kl"} <= set(table.metrics):
        raise FigureError("the records lack dimension_kl_mean or marginal_kl")
    lines, n = lines_along(table, factor)
    saturated = any(is_saturated_row(row) for line in lines for row in line.rows)
    return Drawing(
        f"divergence_by_{factor}",
        f"Distance from N(0, I) as {factor} grows",
        f"error bars: {error_words(table)}",
        "First, the mean over dimensions of KL from N(0, 1), dotted over the active dimensions "
        "alone: 0 is a perfect match. Then KL of all dimensions together: marginal_kl, over the "
        "dashed floor kl_per_image − log N."
        + (" Pale bars: the population's certified bracket." if _bracketed(table, lines) else "")
        + more_words(lines, n),
        "A low first panel says nothing of the second: single dimensions may match while all of "
        "them together do not. "
        + (
            "Hollow points are saturated: there marginal_kl follows its floor and would fall by "
            "log 2 with twice the images; read the bracket instead."
            if saturated
            else "Collapsed dimensions flatter the solid line of the first panel."
        ),
        (
            (
                Panel("One dimension at a time", _alt(table, lines, "dimension_kl_mean"),
                      lambda axes: _each(axes, lines),
                      top=legend_room(max(len(lines) + 1, 4))),
                Panel("Jointly", _alt(table, lines, "marginal_kl"),
                      lambda axes: _joint(axes, table, lines, saturated),
                      top=legend_room(max(len(lines) + 1, 4))),
            ),
        ),
    )  # fmt: skip


def _alt(table: Table, lines: Sequence[Line], metric: str) -> str:
    """The ends of every line as text."""
    ends = []
    for line in lines:
        _, y, _, rows = line.points(metric)
        if y:
            factor = line.axis.factor
            low, high = (rows[i].settings.get(factor) for i in (0, -1))
            label = f"{line.label}: " if line.label else ""
            ends.append(f"{label}{y[0]:.3g} at {factor}={low}, {y[-1]:.3g} at {high}")
    return f"{table.heading(metric)}. {'; '.join(ends)}."


def _each(axes: Axes, lines: Sequence[Line]) -> None:
    from matplotlib.lines import Line2D

    for line in lines:
        line.draw(axes, "dimension_kl_mean")
        line.draw(axes, "dimension_kl_mean_active", ":")
    axes.set_ylabel("nats per dimension")
    values = [y for line in lines for y in line.points("dimension_kl_mean")[1]]
    if values and min(values) > 0:
        near_zero_axis(axes, min(values))
    axes.axhline(0, color=INK, lw=1)
    lines[0].axis.draw(axes)
    dotted = Line2D([], [], color=CODES, ls=":", marker="o", ms=3.5, label="active dimensions only")
    keys = [Line2D([], [], color=line.colour, marker="o", label=line.label)
            for line in lines if line.label]  # fmt: skip
    legend_above(axes, handles=[*keys, dotted])


def _joint(axes: Axes, table: Table, lines: Sequence[Line], saturated: bool) -> None:
    from matplotlib.lines import Line2D

    bracketed = _bracketed(table, lines)
    for line in lines:
        line.draw(axes, "marginal_kl", hollow=True)
        _floor(axes, line)
        if bracketed:
            _brackets(axes, line)
    axes.set_ylabel("nats")
    axes.set_ylim(bottom=0)
    axes.axhline(0, color=INK, lw=1.6)
    lines[0].axis.draw(axes)
    colour = lines[0].colour
    keys = [
        Line2D([], [], color=colour, marker="o", label="marginal_kl"),
        Line2D([], [], color=colour, ls="--", label="floor: kl_per_image − log N"),
    ]
    if saturated:
        keys.append(Line2D([], [], color=colour, marker="o", markerfacecolor=PAPER, ls="",
                           label="saturated"))  # fmt: skip
    if bracketed:
        keys.append(Line2D([], [], color=colour, lw=8, alpha=0.25, label="population bracket"))
    legend_above(axes, handles=keys)


def _bracketed(table: Table, lines: Sequence[Line]) -> bool:
    return len(lines) <= MOST_BRACKETS and "population_kl_lower" in table.metrics


def _floor(axes: Axes, line: Line) -> None:
    """The line KL(q_N‖p) cannot fall below: kl_per_image − log N."""
    x, y, _, used = line.points("kl_per_image")
    points = [
        (px, py - math.log(n))
        for px, py, row in zip(x, y, used, strict=True)
        if (n := row.runs[0].n_images) is not None
    ]
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, "--", color=line.colour, lw=1.2, zorder=2)


def _brackets(axes: Axes, line: Line) -> None:
    """The population bracket of each row as a broad, pale interval."""
    lower = dict(zip(*line.points("population_kl_lower")[:2], strict=True))
    upper = dict(zip(*line.points("population_kl_upper")[:2], strict=True))
    for level in lower.keys() & upper.keys():
        axes.plot([level] * 2, [lower[level], upper[level]], color=line.colour, lw=8, alpha=0.25,
                  solid_capstyle="butt", zorder=1)  # fmt: skip
