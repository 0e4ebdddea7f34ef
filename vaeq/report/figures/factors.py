"""A metric against a factor of the sweep: the axis, the lines, and what stands for their error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vaeq.report.figures.drawing import FigureError
from vaeq.report.figures.palette import PAPER, literal, sequence
from vaeq.report.outcomes import SATURATED_ABOVE
from vaeq.report.table import Row, Table, setting_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 6


@dataclass(frozen=True)
class FactorAxis:
    """The x axis: a tick at every level; logarithmic where levels span more than a factor of 4."""

    factor: str
    ticks: tuple[float, ...]
    shift: float = 0.0

    @property
    def logarithmic(self) -> bool:
        return self.ticks[0] > 0 and self.ticks[-1] / self.ticks[0] > 4

    def position(self, level: float) -> float:
        """Where a level is drawn; ``shift`` from -0.5 to 0.5 moves it by a sliver of the axis."""
        sliver = 0.05 * self.shift
        if self.logarithmic:
            return float(level * (self.ticks[-1] / self.ticks[0]) ** sliver)
        return level + (self.ticks[-1] - self.ticks[0]) * sliver

    def draw(self, axes: Axes) -> None:
        """Scale, ticks and label."""
        from matplotlib.ticker import NullLocator

        if self.logarithmic:
            axes.set_xscale("log", base=2)
        # More labels than this run into one another.
        step = -(-len(self.ticks) // 10)
        shown = self.ticks[::step]
        axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(self.factor)
        axes.grid(axis="y")


@dataclass(frozen=True)
class Line:
    """The configurations that differ in the factor alone, in its order."""

    label: str
    rows: tuple[Row, ...]
    colour: str
    axis: FactorAxis

    def points(self, metric: str) -> tuple[list[float], list[float], list[float], list[Row]]:
        """x, y, error and row where there is a number: sd over seeds, else 2 Monte Carlo s.e."""
        x, y, error, used = [], [], [], []
        for row in self.rows:
            a, level = row.metrics.get(metric), row.settings.get(self.axis.factor)
            if a is None or a.mean is None or not isinstance(level, int | float):
                continue
            x.append(self.axis.position(float(level)))
            y.append(a.mean)
            error.append(a.sd if a.sd is not None else 2 * (a.mc_error or 0.0))
            used.append(row)
        return x, y, error, used

    def draw(self, axes: Axes, metric: str, style: str = "-", hollow: bool = False) -> None:
        """Line, error bars and markers; hollow where saturated, if that matters for the metric."""
        x, y, error, used = self.points(metric)
        if not x:
            return
        size = 5.5 if style == "-" else 3.5
        axes.plot(x, y, style, marker="o", ms=size, color=self.colour, lw=1.6, zorder=3)
        # Plain lines cost a tenth of errorbar(), and a report draws hundreds.
        ends = [(v - e, v + e) for v, e in zip(y, error, strict=True)]
        axes.vlines(x, *zip(*ends, strict=True), color=self.colour, lw=1.3, zorder=3)
        open_ones = [i for i, row in enumerate(used) if hollow and is_saturated_row(row)]
        if not open_ones:
            return
        axes.plot(
            [x[i] for i in open_ones], [y[i] for i in open_ones], "o", ms=size, color=self.colour,
            markerfacecolor=PAPER, zorder=4,
        )  # fmt: skip


def is_saturated_row(row: Row) -> bool:
    """Whether a configuration's mutual information is at its ceiling on average over seeds."""
    a = row.metrics.get("mutual_information_fraction")
    return a is not None and a.mean is not None and a.mean > SATURATED_ABOVE


def lines_along(table: Table, factor: str) -> tuple[list[Line], int]:
    """One line for each set of other settings, at most six evenly chosen, and how many there are.

    Lines stand a little apart, so that equal values do not hide one another.
    """
    others = [name for name in table.varying if name != factor]
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        if isinstance(row.settings.get(factor), int | float):
            label = ", ".join(f"{name}={setting_text(row.settings.get(name))}" for name in others)
            groups.setdefault(literal(label), []).append(row)
    groups = {label: rows for label, rows in groups.items() if len(rows) > 1}
    if not groups:
        raise FigureError(f"no two configurations differ in {factor} alone")
    labels = list(groups)
    if len(labels) > MOST_LINES:
        picks = [round(i * (len(labels) - 1) / (MOST_LINES - 1)) for i in range(MOST_LINES)]
        labels = [labels[i] for i in picks]
    levels = {
        float(level)
        for label in labels
        for row in groups[label]
        if isinstance(level := row.settings[factor], int | float)
    }
    axis = FactorAxis(factor, tuple(sorted(levels)))
    lines = [
        Line(
            label,
            tuple(groups[label]),
            colour,
            replace(axis, shift=(i - (len(labels) - 1) / 2) / max(len(labels) - 1, 1)),
        )
        for i, (label, colour) in enumerate(zip(labels, sequence(len(labels)), strict=True))
    ]
    return lines, len(groups)


def error_words(table: Table) -> str:
    """What the error bars are."""
    return "sd over seeds" if table.replicated else "2 Monte Carlo s.e. (one seed)"


def more_words(lines: Sequence[Line], n: int) -> str:
    """Which lines are shown, where not all are."""
    return "" if len(lines) == n else f" {len(lines)} of {n} lines are shown, evenly chosen."


def near_zero_axis(axes: Axes, smallest: float) -> None:
    """A logarithmic y axis that ends in a zero line, and reads 0.01 where others read 10⁻²."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    high = axes.get_ylim()[1]
    axes.set_yscale("symlog", linthresh=smallest / 1.5, linscale=0.4)
    ticks = [
        base * 10.0**power
        for power in range(-6, 5)
        for base in (1, 2, 5)
        if smallest / 1.5 <= base * 10.0**power <= high * 1.05
    ]
    ticks = ticks if len(ticks) <= 7 else [t for t in ticks if f"{t:e}"[0] == "1"]
    axes.yaxis.set_major_locator(FixedLocator([0.0, *ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(-smallest / 6, high * 1.3)
