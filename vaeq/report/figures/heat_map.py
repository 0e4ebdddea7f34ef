"""The grid of the sweep, a cell for each latent_dim and depth (or width), by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from vaeq.report.figures.drawing import Drawing, FigureError, Panel
from vaeq.report.runs import Scalar
from vaeq.report.table import AXES, Table, setting_text, sort_key
from vaeq.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {
    "dimension_kl_mean": "Mean KL per dimension [nats]",
    "marginal_kl": "marginal_kl [nats]",
    "population_kl_lower": "Population KL, at least [nats]",
}
MOST_LEVELS = 12

Cells = Mapping[tuple[Scalar, Scalar], float]


def heat_map(table: Table) -> Drawing:
    """Two factors against one another; the mean over everything else."""
    varying = [name for name in AXES if name in table.varying]
    if len(varying) < 2:
        raise FigureError("fewer than two of latent_dim, encoder_depth and encoder_width vary")
    across, up = varying[:2]
    grids = {metric: cells for metric in METRICS if (cells := _cells(table, across, up, metric))}
    if not grids:
        raise FigureError("the records lack dimension_kl_mean and marginal_kl")
    columns = sorted({x for cells in grids.values() for x, _ in cells}, key=sort_key)[:MOST_LEVELS]
    rows = sorted({y for cells in grids.values() for _, y in cells}, key=sort_key)[:MOST_LEVELS]
    others = [name for name in table.varying if name not in (across, up)]
    over = f"mean over seeds{' and ' + ', '.join(others) if others else ''}"
    panels = tuple(
        Panel(
            METRICS[metric],
            _alt(METRICS[metric], cells, columns, rows, across, up),
            partial(_grid, cells=cells, columns=columns, rows=rows, across=across, up=up),
            width=max(3.2, 1.2 + 0.52 * len(columns)),
            height=max(2.2, 0.9 + 0.4 * len(rows)),
            left=0.8,
        )
        for metric, cells in grids.items()
    )
    return Drawing(
        "heat_map",
        f"Distance from N(0, I) over {across} and {up}",
        over,
        "Dark is far from N(0, I), light is close; every panel has its own logarithmic scale. "
        "Along a row latent_dim grows, and up a column the encoder."
        if across == "latent_dim"
        else "Dark is far from N(0, I), light is close; every panel has its own scale.",
        "The panels disagree where the answer depends on the reading: compare the first, one "
        "dimension at a time, with the others, all of them together. Saturated cells of "
        "marginal_kl show kl_per_image − log N.",
        (panels,),
    )


def _cells(table: Table, across: str, up: str, metric: str) -> Cells:
    values: dict[tuple[Scalar, Scalar], list[float]] = {}
    for row in table.rows:
        a = row.metrics.get(metric)
        if a is not None and a.mean is not None:
            key = row.settings.get(across), row.settings.get(up)
            values.setdefault(key, []).append(a.mean)
    return {key: fmean(each) for key, each in values.items()}


def _alt(
    title: str,
    cells: Cells,
    columns: Sequence[Scalar],
    rows: Sequence[Scalar],
    across: str,
    up: str,
) -> str:
    lines = [
        f"{up}={setting_text(y)}: "
        + ", ".join(
            f"{number(cells[x, y])} at {setting_text(x)}" for x in columns if (x, y) in cells
        )
        for y in rows
    ]
    return f"{title} by {across}. {'; '.join(lines)}."


def _grid(
    axes: Axes,
    cells: Cells,
    columns: Sequence[Scalar],
    rows: Sequence[Scalar],
    across: str,
    up: str,
) -> None:
    from matplotlib import colormaps
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    values = list(cells.values())
    low, high = min(values), max(values)
    norm = LogNorm(low, high) if 0 < low < high else Normalize(low, high if high > low else low + 1)
    # One call for all cells: a call each would be most of the drawing's time.
    shade_of = dict(zip(cells, np.asarray(norm(np.asarray(values))), strict=True))
    rectangles, shades = [], []
    for i, x in enumerate(columns):
        for j, y in enumerate(rows):
            value = cells.get((x, y))
            if value is None:
                axes.text(i, j, "n/a", ha="center", va="center", size=8.5)
                continue
            shade = float(shade_of[x, y])
            rectangles.append(Rectangle((i - 0.48, j - 0.46), 0.96, 0.92))
            shades.append(0.08 + 0.84 * shade)
            # Not the ink of the page: it stands on the cell, whatever the theme.
            text = "#fdfdfd" if shade > 0.55 else "#111111"
            axes.text(i, j, number(value, 2), ha="center", va="center", size=8.5, color=text)
    colours = colormaps["YlGnBu"](shades)
    axes.add_collection(PatchCollection(rectangles, facecolors=colours, edgecolors="none"))
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_xticks(range(len(columns)), [setting_text(x) for x in columns])
    axes.set_yticks(range(len(rows)), [setting_text(y) for y in rows])
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
