"""Samples of q(z|x) against N(0, I): in the plane, class by class, and one dimension at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vaeq.report.figures.drawing import Drawing, FigureError, Panel
from vaeq.report.figures.palette import CODES, INK, PAPER, RINGS, TEN_COLOURS, sequence
from vaeq.report.figures.sources import (
    Array,
    Samples,
    by_dimension,
    few,
    kl_by_dimension,
    read_samples,
    run_words,
    runs_words,
)
from vaeq.report.runs import Run
from vaeq.report.table import Table
from vaeq.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More points than this only thicken the ink.
LARGEST_SCATTER = 8_000
PATCHES = 10


def latent_plane(table: Table) -> Drawing:
    """The classes in the plane of the codes over the contours of N(0, I), and both marginals."""
    run, samples = _first_plane(table)
    reach = _reach(samples)
    return Drawing(
        "latent_plane",
        "Where the training images' codes lie, and where N(0, I) expects them",
        f"samples of q(z|x), {run_words(run)}",
        "One point an image, coloured and named by class, over the circles of 1, 2 and 3 standard "
        "deviations of N(0, I), which hold 39%, 86% and 99% of its mass. Beside it each coordinate "
        "against its normal density.",
        "Colours overlap by design, in random order. Gaps between classes are holes: places that "
        "the prior samples and the decoder has hardly seen.",
        (
            (
                Panel(
                    "The plane",
                    f"Codes of {len(samples.z)} images in two dimensions, by class, over the "
                    "contours of N(0, I).",
                    lambda axes: _plane(axes, samples, reach),
                    width=5.0,
                    height=4.9,
                ),
                *(
                    Panel(
                        f"$z_{j + 1}$" + _kl_text(run, j),
                        f"Histogram of coordinate {j + 1} against N(0, 1).",
                        partial(_marginal, data={"samples": samples.z[:, j]}, reach=reach),
                        width=3.6,
                        height=3.0,
                    )
                    for j in range(2)
                ),
            ),
        ),
    )


def patches(table: Table) -> Drawing:
    """Each class alone in the plane."""
    run, samples = _first_plane(table)
    if samples.label is None:
        raise FigureError("the samples have no labels")
    classes = [int(k) for k in np.unique(samples.label)[:PATCHES]]
    return Drawing(
        "patches",
        "The patches of the quilt: each class over N(0, I)",
        f"samples of q(z|x), {run_words(run)}",
        "One small plane a class, with the circles of 1, 2 and 3 standard deviations of N(0, I). A "
        "good fit is a quilt: no patch looks like N(0, I), and together they fill it evenly.",
        "How well the patches tile the plane is seen in two dimensions only; with more, the same "
        "picture of two coordinates would look far better than the joint fit is.",
        (
            (
                Panel(
                    "Class by class",
                    f"Codes of classes {', '.join(map(str, classes))}, each over the contours of "
                    "N(0, I).",
                    lambda axes: _patches(axes, samples, classes, _reach(samples)),
                    width=7.2,
                    height=3.3,
                    left=0.1,
                ),
            ),
        ),
    )


def marginals(table: Table) -> Drawing:
    """Best and worst dimension by KL for each latent_dim, against the normal density."""
    found = _with_samples(table)
    panels = []
    for run, samples, kl in found:
        order = np.argsort(kl)
        best, worst = int(order[0]), int(order[-1])
        data = {
            f"worst, KL {number(kl[worst], 2)}": samples.z[:, worst],
            f"best, KL {number(kl[best], 2)}": samples.z[:, best],
        }
        panels.append(
            Panel(
                f"latent_dim={run.settings['latent_dim']}",
                f"Histograms of the dimension furthest from N(0, 1), KL {number(kl[worst], 2)} "
                f"nats, and of the closest, KL {number(kl[best], 2)}.",
                partial(_marginal, data=data, reach=4.0),
                width=3.7,
                height=2.8,
            )
        )
    return Drawing(
        "marginals",
        "The codes one dimension at a time, against N(0, 1)",
        f"samples of q(z|x), {runs_words([run for run, _, _ in found])}",
        "The worst and the best dimension by KL for each latent_dim; the bare line is N(0, 1).",
        "Values beyond ±4 are not shown. Good margins do not make a good joint distribution: in "
        "many dimensions almost every projection of anything looks Gaussian.",
        (tuple(panels),),
    )


def qq(table: Table) -> Drawing:
    """Quantiles of every dimension against those of N(0, 1)."""
    found = _with_samples(table)
    panels = [
        Panel(
            f"latent_dim={run.settings['latent_dim']}",
            f"Quantiles of {samples.z.shape[1]} dimensions against those of N(0, 1).",
            partial(_qq, z=samples.z, worst=int(np.argmax(kl))),
            width=3.7,
            height=3.1,
        )
        for run, samples, kl in found
    ]
    return Drawing(
        "qq",
        "Quantiles of the codes against those of N(0, 1)",
        f"samples of q(z|x), {runs_words([run for run, _, _ in found])}",
        "One line a dimension, the worst by KL in bold; on the diagonal it is N(0, 1). Steeper is "
        "too wide, flatter too narrow, bent away at an end is a heavy or a light tail.",
        "The last quantiles rest on few samples and wander; dependence does not show at all.",
        (tuple(panels),),
    )


def _first_plane(table: Table) -> tuple[Run, Samples]:
    """The first run of latent_dim=2, in the table's order and by seed, with usable samples."""
    reason = "no run has latent_dim=2"
    for run in by_dimension(table).get(2, ()):
        try:
            return run, read_samples(run)
        except FigureError as error:
            reason = str(error) if reason.startswith("no run") else reason
    raise FigureError(reason)


def _with_samples(table: Table) -> list[tuple[Run, Samples, list[float]]]:
    """For a few latent_dims the first run with samples and KL by dimension."""
    found, reason = [], "there are no runs"
    for candidates in few_groups(by_dimension(table)):
        for run in candidates:
            try:
                found.append((run, read_samples(run), kl_by_dimension(run)))
            except FigureError as error:
                reason = str(error)
                continue
            break
    if not found:
        raise FigureError(reason)
    return found


def few_groups(groups: dict[int, list[Run]]) -> list[list[Run]]:
    """The runs of a few latent_dims, the first and the last among them."""
    kept = {run.settings["latent_dim"] for run in few([runs[0] for runs in groups.values()])}
    return [runs for dim, runs in groups.items() if dim in kept]


def _kl_text(run: Run, j: int) -> str:
    try:
        return f": KL from N(0, 1) {number(kl_by_dimension(run)[j], 2)} nats"
    except FigureError:
        return ""


def _reach(samples: Samples) -> float:
    return max(3.35, float(np.quantile(np.abs(samples.z), 0.999)))


def _plane(axes: Axes, samples: Samples, reach: float) -> None:
    _rings(axes, (0, 0))
    # A fixed random order, so that no class hides the others.
    order = np.random.default_rng(0).permutation(len(samples.z))[:LARGEST_SCATTER]
    z = samples.z[order]
    colours: Any = CODES
    if samples.label is not None:
        palette = _class_colours(samples.label)
        colours = [palette[int(k)] for k in samples.label[order]]
    axes.scatter(z[:, 0], z[:, 1], s=3.2, c=colours, alpha=0.65, linewidths=0, zorder=2,
                 rasterized=True)  # fmt: skip
    for radius in (1, 2, 3):
        at = radius / math.sqrt(2)
        _label(axes, at, at, f"{radius}σ", INK, 9)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    if samples.label is not None:
        _label_classes(axes, samples, reach)


def _rings(axes: Axes, centre: tuple[float, float]) -> None:
    from matplotlib.patches import Circle

    for radius, shade in zip((3, 2, 1), reversed(RINGS), strict=True):
        axes.add_patch(Circle(centre, radius, facecolor=shade, edgecolor=INK,
                              lw=0.9, zorder=1))  # fmt: skip


def _patches(axes: Axes, samples: Samples, classes: Sequence[int], reach: float) -> None:
    assert samples.label is not None
    colours = _class_colours(samples.label)
    columns, step = 5, 2.2 * reach
    for i, k in enumerate(classes):
        centre = step * (i % columns), -step * (i // columns)
        _rings(axes, centre)
        z = samples.z[samples.label == k][: LARGEST_SCATTER // PATCHES]
        z = z[(np.abs(z) < 1.05 * reach).all(axis=1)]
        axes.scatter(z[:, 0] + centre[0], z[:, 1] + centre[1], s=2.4, color=colours[k], alpha=0.6,
                     linewidths=0, zorder=2, rasterized=True)  # fmt: skip
        axes.text(centre[0] - reach, centre[1] + 0.75 * reach, str(k), size=12, weight="bold",
                  zorder=3)  # fmt: skip
    rows = math.ceil(len(classes) / columns)
    edge = 1.1 * reach
    axes.set(xlim=(-edge, step * (columns - 1) + edge), ylim=(-step * (rows - 1) - edge, edge),
             aspect="equal")  # fmt: skip
    axes.set_axis_off()


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
        _label(axes, float(middle[i]), float(middle[j]), str(k), colours[k], 16)


def _smoothed(count: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    padded = np.pad(count, 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.asarray((rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9)


def _label(axes: Axes, x: float, y: float, text: str, colour: Any, size: float) -> None:
    """Text with an outline in the colour of the paper, readable on any background."""
    from matplotlib.patheffects import withStroke

    axes.text(
        x, y, text, size=size, color=colour, weight="bold", ha="center", va="center", zorder=4,
        path_effects=[withStroke(linewidth=3, foreground=PAPER)],
    )  # fmt: skip


def _marginal(axes: Axes, data: dict[str, Array], reach: float) -> None:
    """Histograms over all samples, in units of density, and the normal density."""
    edges = np.linspace(-reach, reach, 51)
    for i, ((label, z), colour) in enumerate(
        zip(data.items(), reversed(sequence(max(len(data), 2))), strict=False)
    ):
        density = np.histogram(z, edges)[0] / (len(z) * (edges[1] - edges[0]))
        colour = CODES if len(data) == 1 else colour
        axes.stairs(density, edges, fill=i == 0, alpha=0.55 if i == 0 else 1.0, color=colour,
                    lw=1.4, label=label)  # fmt: skip
    x = np.linspace(-reach, reach, 121)
    axes.plot(x, np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi), color=INK, lw=1.5,
              label="N(0, 1)")  # fmt: skip
    axes.set(xlim=(-reach, reach), ylabel="density", xlabel="z")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.45)  # room for the legend
    axes.legend(loc="upper right", fontsize=8)


def _qq(axes: Axes, z: Array, worst: int) -> None:
    from matplotlib.collections import LineCollection
    from scipy.special import ndtri

    share = (np.arange(99) + 1) / 100
    theory = ndtri(share)
    quantiles = np.quantile(z, share, axis=0).T  # (D, 99)
    segments = [np.column_stack([theory, each]) for each in quantiles[:64]]
    axes.plot([-2.6, 2.6], [-2.6, 2.6], color=INK, lw=1)
    axes.add_collection(LineCollection(segments, colors=CODES, linewidths=0.8, alpha=0.4))
    axes.plot(theory, quantiles[worst], color=CODES, lw=2)
    reach = max(2.6, min(6.0, float(np.abs(quantiles).max())))
    axes.set(xlim=(-2.6, 2.6), ylim=(-reach, reach), xlabel="quantile of N(0, 1)",
             ylabel="quantile of $z_j$")  # fmt: skip
    axes.grid()
