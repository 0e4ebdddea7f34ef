"""The pictures: digits in the latent plane over N(0, I), marginals, and divergence by factor."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vaeq.errors import one_line
from vaeq.report.outcomes import SATURATED_ABOVE
from vaeq.report.runs import Run
from vaeq.report.table import AXES, Row, Table, setting_text
from vaeq.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float32]

# Petroff (2021), "Accessible color sequences for data visualization", the ten-colour sequence.
TEN_COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
CODES, PRIOR, FLOOR = "#3f90da", "#222222", "#717581"
# More points than this only thicken the ink.
LARGEST_SCATTER = 12_000
MOST_PANELS = 5
MOST_LINES = 8
MOST_BRACKETS = 3


class FigureError(Exception):
    """These runs do not hold what a figure needs."""


@dataclass(frozen=True)
class Samples:
    """Samples of q(z|x) of training images, one an image, with the images' labels if known."""

    z: Array  # (n, D)
    label: npt.NDArray[np.int64] | None  # (n,)


def read_samples(run: Run) -> Samples:
    """The samples a run left behind; FigureError if there are none that can be used."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = run.directory / "samples.safetensors"
    where = f"samples.safetensors of {one_line(run.name)}"
    try:
        arrays = load_file(path)
    except FileNotFoundError:
        raise FigureError(f"there is no {where}") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FigureError(f"{where} cannot be read ({one_line(str(error), 80)})") from None
    z, label = arrays.get("z"), arrays.get("label")
    if z is None or z.ndim != 2 or z.shape[0] < 2 or z.shape[1] != run.settings["latent_dim"]:
        raise FigureError(f"{where} holds no array z of shape (n, latent_dim)")
    if not np.issubdtype(z.dtype, np.floating) or not np.isfinite(z).all():
        raise FigureError(f"z in {where} holds numbers that are not finite")
    if label is not None and (label.shape != z.shape[:1] or label.dtype.kind not in "iu"):
        raise FigureError(f"label in {where} is not one integer for each z")
    return Samples(z.astype(np.float32), None if label is None else label.astype(np.int64))


def latent_plane(runs: Sequence[Run], table: Table) -> bytes:
    """The classes in the plane of the codes over the contours of N(0, I), and both marginals."""
    run, samples = _first_with_samples(table, 2, "no run has latent_dim=2")
    from matplotlib.patches import Circle

    with _style():
        figure = _figure(9.6, 6.2)
        grid = figure.add_gridspec(
            2, 2, width_ratios=(1.72, 1), left=0.06, right=0.985, bottom=0.085, top=0.85,
            wspace=0.14, hspace=0.32,
        )  # fmt: skip
        _titles(
            figure,
            "Where the training images' codes lie, and where N(0, I) expects them",
            ("samples of q(z|x)", *_run_words(run)),
        )
        plane = figure.add_subplot(grid[:, 0])
        reach = max(3.35, float(np.quantile(np.abs(samples.z), 0.999)))
        for radius, shade in ((3, "#f4f4f4"), (2, "#ebebeb"), (1, "#dfdfdf")):
            plane.add_patch(Circle((0, 0), radius, facecolor=shade, edgecolor="none", zorder=0))
        _scatter(plane, samples)
        for radius in (1, 2, 3):
            plane.add_patch(
                Circle((0, 0), radius, facecolor="none", edgecolor=PRIOR, lw=1.1, zorder=3)
            )
            at = radius / math.sqrt(2)
            _label(plane, at, at, f"{radius}σ", PRIOR, 9)
        plane.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        plane.set(xlabel="$z_1$", ylabel="$z_2$")
        if samples.label is not None:
            _label_classes(plane, samples, reach)
        for j in range(2):
            axes = figure.add_subplot(grid[j, 1])
            _marginal(axes, samples.z[:, j], reach)
            axes.set_title(f"$z_{j + 1}$" + _kl_text(run, j), loc="left")
            if j == 0:
                axes.legend(loc="upper right", handlelength=1.2, borderaxespad=0)
        return _png(figure)


def marginals(runs: Sequence[Run], table: Table) -> bytes:
    """Best and worst dimension by KL for each latent_dim, against the normal density."""
    dims = sorted({dim for row in table.rows if isinstance(dim := row.settings["latent_dim"], int)})
    if len(dims) < 2:
        raise FigureError("latent_dim does not vary")
    usable: list[tuple[Run, Samples, list[float]]] = []
    reason = ""
    for dim in dims:
        try:
            run, samples = _first_with_samples(table, dim, "")
            usable.append((run, samples, _kl_by_dimension(run)))
        except FigureError as error:
            reason = reason or str(error)
    if not usable:
        raise FigureError(reason)
    if len(usable) > MOST_PANELS:
        picks = np.linspace(0, len(usable) - 1, MOST_PANELS).round().astype(int)
        usable = [usable[i] for i in picks]
    with _style():
        figure = _figure(1.2 + 2.6 * max(len(usable), 3), 5.3)
        axes = figure.subplots(2, len(usable), squeeze=False, sharex=True, sharey="row")
        figure.subplots_adjust(
            left=0.075, right=0.985, bottom=0.08, top=0.77, wspace=0.12, hspace=0.34
        )
        _titles(
            figure,
            "The codes one dimension at a time, against N(0, 1)",
            ("worst and best dimension by KL, in nats", *_run_words(usable[0][0])[1:]),
        )
        for column, (run, samples, kl) in enumerate(usable):
            order = np.argsort(kl)
            for row, (word, j) in enumerate((("worst", int(order[-1])), ("best", int(order[0])))):
                ax = axes[row, column]
                _marginal(ax, samples.z[:, j], 4.0)
                ax.set_title(f"{word}: $z_{{{j + 1}}}$, KL {number(kl[j], 2)}", loc="left")
            axes[0, column].annotate(
                f"latent_dim={run.settings['latent_dim']}", (0, 1), xytext=(0, 22),
                xycoords="axes fraction", textcoords="offset points", weight="bold",
            )  # fmt: skip
        for row in range(2):
            axes[row, 0].set_ylabel("density")
        axes[0, -1].legend(loc="upper right", handlelength=1.2, borderaxespad=0)
        return _png(figure)


def divergence(runs: Sequence[Run], table: Table) -> bytes:
    """Mean KL per dimension and joint KL(q_N‖p) against the first factor that varies."""
    factor = next((name for name in AXES if name in table.varying), None)
    if factor is None:
        raise FigureError("neither latent_dim nor the encoder's depth or width varies")
    if not {"dimension_kl_mean", "marginal_kl"} <= set(table.metrics):
        raise FigureError("the records lack dimension_kl_mean or marginal_kl")
    lines = _lines(table, factor)
    with _style():
        figure = _figure(10.4, 4.6)
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.075, right=0.985, bottom=0.13, top=0.80, wspace=0.18)
        bars = "sd over seeds" if table.replicated else "2 Monte Carlo s.e. (one seed)"
        _titles(
            figure,
            f"Distance from N(0, I) as {factor} grows",
            (_data_words(table.rows[0].runs[0]), f"error bars: {bars}"),
        )
        colours = _line_colours(len(lines))
        axis = _factor_axis(factor, table)
        for i, ((label, rows), colour) in enumerate(zip(lines, colours, strict=True)):
            # Lines stand a little apart, so that equal values do not hide one another.
            at = replace(axis, shift=(i - (len(lines) - 1) / 2) / max(len(lines) - 1, 1))
            _line(left, rows, at, "dimension_kl_mean", colour, label, "-")
            _line(left, rows, at, "dimension_kl_mean_active", colour, "", ":")
            _line(right, rows, at, "marginal_kl", colour, label, "-")
            _floor(right, rows, at, colour if len(lines) > 1 else FLOOR)
            if len(lines) <= MOST_BRACKETS:
                _brackets(right, rows, at, colour)
        left.set_title("One dimension at a time: mean KL($q_{N,j}$ ‖ N(0, 1))", loc="left")
        right.set_title("Jointly: KL($q_N$ ‖ N(0, I))", loc="left")
        left.set_ylabel("nats per dimension")
        right.set_ylabel("nats")
        if all(
            (row.metrics["dimension_kl_mean"].mean or 0) > 0 for _, rows in lines for row in rows
        ):
            _log_axis(left)
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axis.draw(axes)
        _divergence_legends(left, right, lines, table)
        return _png(figure)


FIGURES: dict[str, Callable[[Sequence[Run], Table], bytes]] = {
    "latent_plane.png": latent_plane,
    "marginals.png": marginals,
    "divergence.png": divergence,
}


def _style() -> AbstractContextManager[None]:
    """Settings of our own, whatever the user's matplotlibrc says."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "text.usetex": False,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 10,
            "mathtext.fontset": "dejavusans",
            "axes.titlesize": 10,
            "axes.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#888888",
            "axes.unicode_minus": True,
            "figure.facecolor": "white",
            "legend.frameon": False,
            "legend.fontsize": 9,
            "xtick.color": "#444444",
            "ytick.color": "#444444",
            "axes.labelcolor": "#222222",
        }
    )


def _figure(width: float, height: float) -> Figure:
    """A figure with no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160)


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _literal(text: str) -> str:
    """Text from a file without what matplotlib would typeset, or has no glyph for."""
    return one_line(text, 120).encode("ascii", "replace").decode().replace("$", r"\$")


def _titles(figure: Figure, title: str, words: Sequence[str]) -> None:
    """A title, and under it what is shown."""
    figure.text(0.012, 0.975, title, size=13.5, weight="bold", va="top")
    text = ", ".join(word for word in words if word)
    height = figure.get_size_inches()[1]
    figure.text(0.012, 0.975 - 0.34 / height, text, size=10, color="#555555", va="top")


def _data_words(run: Run) -> str:
    name = run.settings.get("data.name")
    return _literal(name.upper() if name == "mnist" else str(name)) if name else ""


def _run_words(run: Run) -> list[str]:
    """latent_dim, data, encoder, seed and epochs of a run."""
    depth, width = run.settings.get("encoder_depth"), run.settings.get("encoder_width")
    words = [f"latent_dim={run.settings['latent_dim']}", _data_words(run)]
    if isinstance(depth, int) and isinstance(width, int):
        words.append(f"encoder {depth} × {width}")
    words.append(f"seed {run.seed}")
    if isinstance(epochs := run.settings.get("epochs"), int):
        words.append(f"{epochs} epochs")
    return words


def _first_with_samples(table: Table, latent_dim: int, none: str) -> tuple[Run, Samples]:
    """The first run of that latent_dim, in the table's order and by seed, with usable samples."""
    reason = none
    for row in table.rows:
        if row.settings["latent_dim"] != latent_dim:
            continue
        for run in row.runs:
            try:
                return run, read_samples(run)
            except FigureError as error:
                reason = reason if reason != none else str(error)
    raise FigureError(reason)


def _kl_by_dimension(run: Run) -> list[float]:
    """KL(q_N,j ‖ N(0, 1)) for every dimension j."""
    kl = run.per_dimension.get("kl", ())
    numbers = [float(x) for x in kl if isinstance(x, int | float) and math.isfinite(x)]
    if len(numbers) != run.settings["latent_dim"]:
        raise FigureError(f"the record of {one_line(run.name)} lacks per_dimension.kl")
    return numbers


def _kl_text(run: Run, j: int) -> str:
    try:
        return f": KL from N(0, 1) {number(_kl_by_dimension(run)[j], 2)} nats"
    except FigureError:
        return ""


def _scatter(axes: Axes, samples: Samples) -> None:
    n = len(samples.z)
    # A fixed random order, so that no class hides the others.
    order = np.random.default_rng(0).permutation(n)[:LARGEST_SCATTER]
    z = samples.z[order]
    colours: Any = CODES
    if samples.label is not None:
        palette = _class_colours(samples.label)
        colours = [palette[int(k)] for k in samples.label[order]]
    axes.scatter(z[:, 0], z[:, 1], s=3.2, c=colours, alpha=0.65, linewidths=0, zorder=2)


def _class_colours(label: npt.NDArray[np.int64]) -> dict[int, Any]:
    classes = np.unique(label)
    if len(classes) <= len(TEN_COLOURS):
        return {int(k): TEN_COLOURS[i] for i, k in enumerate(classes)}
    from matplotlib import colormaps

    return {int(k): colormaps["turbo"](i / len(classes)) for i, k in enumerate(classes)}


def _label_classes(axes: Axes, samples: Samples, reach: float) -> None:
    """Each class's name where the class is densest and most alone."""
    if samples.label is None:
        return
    edges = np.linspace(-reach, reach, 37)
    middle = (edges[1:] + edges[:-1]) / 2
    counts = {}
    for k in np.unique(samples.label):
        z = samples.z[samples.label == k]
        count = np.histogram2d(z[:, 0], z[:, 1], bins=(edges, edges))[0]
        for _ in range(2):
            count = _smoothed(count)
        counts[int(k)] = count
    total = np.sum(list(counts.values()), axis=0) + 1e-9
    colours = _class_colours(samples.label)
    for k, count in counts.items():
        i, j = np.unravel_index(np.argmax(count**2 / total), count.shape)
        _label(axes, float(middle[i]), float(middle[j]), str(k), colours[k], 17)


def _smoothed(count: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    padded = np.pad(count, 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9)


def _label(axes: Axes, x: float, y: float, text: str, colour: Any, size: float) -> None:
    """Text with a white outline, readable on any background."""
    from matplotlib.patheffects import withStroke

    axes.text(
        x, y, text, size=size, color=colour, weight="bold", ha="center", va="center", zorder=4,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


def _marginal(axes: Axes, z: Array, reach: float) -> None:
    """A histogram over all samples, in units of density, and the normal density."""
    edges = np.linspace(-reach, reach, 61)
    weight = np.full(len(z), 1 / (len(z) * (edges[1] - edges[0])))
    axes.hist(
        z, bins=edges.tolist(), weights=weight, color=CODES, alpha=0.75, label="samples of q(z|x)"
    )
    x = np.linspace(-reach, reach, 241)
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    axes.plot(x, density, color=PRIOR, lw=1.6, label="N(0, 1)")
    axes.set(xlim=(-reach, reach))
    axes.margins(y=0.25)  # room for the legend


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
        axes.set_xticks(self.ticks, [f"{tick:g}" for tick in self.ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(self.factor)
        axes.grid(axis="y", color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)


def _factor_axis(factor: str, table: Table) -> FactorAxis:
    levels = {row.settings.get(factor) for row in table.rows}
    return FactorAxis(factor, tuple(sorted(float(x) for x in levels if isinstance(x, int | float))))


def _lines(table: Table, factor: str) -> list[tuple[str, list[Row]]]:
    """The rows of the table as lines along the factor: one for each set of other settings."""
    others = [name for name in table.varying if name != factor]
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        if isinstance(row.settings.get(factor), int | float):
            label = ", ".join(f"{name}={setting_text(row.settings.get(name))}" for name in others)
            groups.setdefault(_literal(label), []).append(row)
    if not groups:
        raise FigureError(f"{factor} is no number in these records")
    return list(groups.items())


def _line_colours(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [CODES] if n == 1 else [colormaps["viridis"](0.9 * i / (n - 1)) for i in range(n)]


def _points(
    rows: Sequence[Row], at: FactorAxis, metric: str
) -> tuple[list[float], list[float], list[float], list[Row]]:
    """x, y and error of the rows that have the metric: sd over seeds, else 2 Monte Carlo s.e."""
    x, y, error, used = [], [], [], []
    for row in rows:
        a, level = row.metrics.get(metric), row.settings.get(at.factor)
        if a is None or a.mean is None or not isinstance(level, int | float):
            continue
        x.append(at.position(float(level)))
        y.append(a.mean)
        error.append(a.sd if a.sd is not None else 2 * (a.mc_error or 0.0))
        used.append(row)
    return x, y, error, used


def _line(
    axes: Axes,
    rows: Sequence[Row],
    at: FactorAxis,
    metric: str,
    colour: Any,
    label: str,
    style: str,
) -> None:
    x, y, error, used = _points(rows, at, metric)
    if not x:
        return
    main = style == "-"
    axes.errorbar(
        x, y, yerr=error, color=colour, ls=style, lw=1.8 if main else 1.3, capsize=3,
        elinewidth=1.2, label=label or None, zorder=3,
    )  # fmt: skip
    for px, py, row in zip(x, y, used, strict=True):
        hollow = metric == "marginal_kl" and _is_saturated(row)
        axes.plot(
            px, py, "o", ms=6 if main else 4, color=colour, zorder=4,
            markerfacecolor="white" if hollow else colour,
        )  # fmt: skip


def _is_saturated(row: Row) -> bool:
    a = row.metrics.get("mutual_information_fraction")
    return a is not None and a.mean is not None and a.mean > SATURATED_ABOVE


def _floor(axes: Axes, rows: Sequence[Row], at: FactorAxis, colour: Any) -> None:
    """The line KL(q_N‖p) cannot fall below: kl_per_image − log N."""
    x, y, _, used = _points(rows, at, "kl_per_image")
    points = [
        (px, py - math.log(n))
        for px, py, row in zip(x, y, used, strict=True)
        if (n := row.runs[0].n_images) is not None
    ]
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, "--", color=colour, lw=1.3, zorder=2)


def _brackets(axes: Axes, rows: Sequence[Row], at: FactorAxis, colour: Any) -> None:
    """The population bracket of each row as a broad, pale interval."""
    lower = dict(zip(*_points(rows, at, "population_kl_lower")[:2], strict=True))
    upper = dict(zip(*_points(rows, at, "population_kl_upper")[:2], strict=True))
    for level in lower.keys() & upper.keys():
        axes.plot([level] * 2, [lower[level], upper[level]], color=colour, lw=9, alpha=0.22,
                  solid_capstyle="butt", zorder=1)  # fmt: skip


def _log_axis(axes: Axes) -> None:
    """A logarithmic y axis that reads 0.01, not 10⁻²."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _divergence_legends(
    left: Axes, right: Axes, lines: Sequence[tuple[str, Sequence[Row]]], table: Table
) -> None:
    """What lines, dashes, hollow points and pale bars mean."""
    from matplotlib.lines import Line2D

    colour = CODES if len(lines) == 1 else "#444444"
    solid = Line2D([], [], color=colour, marker="o", label="all dimensions")
    dotted = Line2D([], [], color=colour, ls=":", marker="o", ms=4, label="active dimensions only")
    floor = Line2D([], [], color=FLOOR, ls="--", label="floor: kl_per_image − log N")
    full = Line2D([], [], color=colour, marker="o", label="marginal_kl")
    hollow = Line2D([], [], color=colour, marker="o", markerfacecolor="white", ls="",
                    label="saturated: MI > 95% of log N")  # fmt: skip
    pale = Line2D([], [], color=colour, lw=9, alpha=0.22, label="population KL, bracket")
    handles = [full, floor]
    if any(_is_saturated(row) for row in table.rows):
        handles.append(hollow)
    if len(lines) <= MOST_BRACKETS and "population_kl_lower" in table.metrics:
        handles.append(pale)
    right.legend(handles=handles, loc="best", handlelength=1.6)
    shown = left.get_legend_handles_labels()[0] if len(lines) > 1 else []
    if len(shown) > MOST_LINES:
        shown = [shown[i] for i in (0, len(shown) // 2, -1)]
    left.legend(handles=[solid, dotted, *shown], loc="best", handlelength=1.6)
