"""Two-sample distances against a factor, each over what N(0, I) against itself would give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from vaeq.report.figures.drawing import Drawing, FigureError, Panel
from vaeq.report.figures.factors import Line, error_words, lines_along, more_words
from vaeq.report.table import AXES, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATISTICS = ("sliced_w2", "mmd", "energy_distance", "c2st_auc")


def null_bands(table: Table) -> Drawing:
    """The first factor that varies against the four statistics."""
    factor = next((name for name in AXES if name in table.varying), None)
    if factor is None:
        raise FigureError("neither latent_dim nor the encoder's depth or width varies")
    lines, n = lines_along(table, factor)
    measured = [name for name in STATISTICS if any(line.points(name)[0] for line in lines)]
    if not measured:
        raise FigureError("no run has two-sample statistics (measure.panel=full)")
    panels = [
        Panel(
            name,
            f"{name} against {factor}, with the null band of N(0, I) against itself.",
            partial(_statistic, name=name, lines=lines),
            height=2.7,
        )
        for name in measured
    ]
    return Drawing(
        "two_sample",
        "Two-sample distances, and what N(0, I) against itself gives",
        f"error bars: {error_words(table)}",
        "Each statistic between codes and N(0, I). The band is the same statistic between two "
        "N(0, I) samples of the same size, mean ± 2 sd: inside it the codes cannot be told apart."
        + more_words(lines, n),
        "The statistics lose power as dimensions are added, and their own null shrinks: a falling "
        "line is no approach to N(0, I) unless its distance from the band falls too.",
        tuple(tuple(panels[i : i + 2]) for i in range(0, len(panels), 2)),
    )


def _statistic(axes: Axes, name: str, lines: Sequence[Line]) -> None:
    for line in lines:
        line.draw(axes, name)
    line = lines[0]
    x, centre, _, rows = line.points(f"{name}_null")
    sd = [row.metrics[f"{name}_null_sd"].mean if f"{name}_null_sd" in row.metrics else None
          for row in rows]  # fmt: skip
    known = [(a, b, c) for a, b, c in zip(x, centre, sd, strict=True) if c is not None]
    if known:
        xs = [a for a, _, _ in known]
        axes.fill_between(
            xs, [b - 2 * c for _, b, c in known], [b + 2 * c for _, b, c in known],
            color="#888888", alpha=0.4, lw=0.8, label="N(0, I) against itself",
        )  # fmt: skip
        axes.legend(loc="upper right")
    axes.margins(y=0.22)
    axes.axhline(0.5 if name == "c2st_auc" else 0, color="#888888", lw=1)
    line.axis.draw(axes)
