"""What a run recorded along something: images (N-curve), epochs, dimensions, digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vaeq.report.figures.drawing import (
    Drawing,
    FigureError,
    Panel,
    legend_above,
    legend_room,
)
from vaeq.report.figures.factors import near_zero_axis
from vaeq.report.figures.palette import CODES, INK, MUTED, PAPER, sequence
from vaeq.report.figures.sources import (
    by_dimension,
    few,
    kl_by_dimension,
    numbers,
    run_words,
    runs_words,
)
from vaeq.report.runs import Run
from vaeq.report.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Data = Mapping[str, list[float]]


def n_curve(table: Table) -> Drawing:
    """marginal_kl of growing subsets of the images, one line for each latent_dim."""
    found = _one_each(table, _n_curve_of, "no run has an n_curve (measure.panel=full)")
    alt = "; ".join(
        f"latent_dim={run.settings['latent_dim']}: {data['marginal_kl'][0]:.3g} nats at "
        f"N={data['n'][0]:.0f}, {data['marginal_kl'][-1]:.3g} at {data['n'][-1]:.0f}"
        for run, data in found
    )
    return Drawing(
        "n_curve",
        "Does KL(q_N ‖ p) depend on the number of images?",
        runs_words([run for run, _ in found]),
        "marginal_kl of the first N images, N on a logarithmic scale. A flat line has converged to "
        "the population; a line along the dashed kl_per_image − log N is saturated, a fact about "
        "N.",
        "No single value of a falling line is the divergence of the population: read its bracket.",
        (
            (
                Panel(
                    "marginal_kl by number of images",
                    alt,
                    lambda axes: _n_curve(axes, found),
                    top=legend_room(len(found)),
                ),
            ),
        ),
    )


def _n_curve_of(run: Run) -> Data:
    curve = run.curves.get("n_curve")
    if not isinstance(curve, dict):
        raise FigureError("no n_curve")
    n = numbers(curve.get("n"))
    if min(n) < 1:
        raise FigureError("no number of images is below one")
    return {"n": n, "marginal_kl": numbers(curve.get("marginal_kl"), len(n))}


def _n_curve(axes: Axes, found: Sequence[tuple[Run, Data]]) -> None:
    from matplotlib.ticker import NullLocator

    for (run, data), colour in zip(found, sequence(len(found)), strict=True):
        label = f"latent_dim={run.settings['latent_dim']}"
        axes.plot(data["n"], data["marginal_kl"], "o-", color=colour, ms=4, lw=1.6, label=label)
        average = run.value("kl_per_image")
        if average is not None:
            floor = [average - math.log(n) for n in data["n"]]
            axes.plot(data["n"], floor, "--", color=colour, lw=1.1)
    axes.set_xscale("log")
    longest = max((data["n"] for _, data in found), key=len)
    ticks = longest[:: -(-len(longest) // 4)]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick / 1000:g}k" for tick in ticks])
    axes.set(xlabel="images N", ylabel="nats")
    axes.set_ylim(bottom=0)
    axes.axhline(0, color=INK, lw=1.2)
    axes.grid(axis="y")
    legend_above(axes)


def training(table: Table) -> Drawing:
    """Held-out ELBO and divergence of the codes by epoch."""
    found = _one_each(table, _history_of, "no record has a history of test_elbo by epoch")
    panels = [
        Panel("Held-out ELBO [nats]", _last("test_elbo", found),
              lambda axes: _history(axes, found, ("test_elbo",)), top=legend_room(len(found))),
    ]  # fmt: skip
    names = [
        name
        for name in ("test_marginal_kl", "test_moment_kl")
        if any(name in data for _, data in found)
    ]
    if names:
        panels.append(
            Panel("Divergence of the held-out codes [nats]", _last(names[0], found),
                  lambda axes: _history(axes, found, names), top=legend_room(len(found)))
        )  # fmt: skip
    absent = "" if names else " These records hold no divergence by epoch, so it is not drawn."
    return Drawing(
        "training",
        "Training: ELBO and divergence by epoch",
        runs_words([run for run, _ in found]),
        "First, whether training had converged. "
        + ("Then test_marginal_kl (solid) and test_moment_kl (dotted) as they evolve."
           if names else "")
        + absent,
        "Runs that still improve at their last epoch differ in how long they were trained as well "
        "as in their architecture."
        + (" The divergence by epoch is of the held-out codes and saturates at log of their "
           "number." if names else ""),
        (tuple(panels),),
    )  # fmt: skip


def _history_of(run: Run) -> Data:
    epochs = numbers(run.history.get("epoch"))
    data = {"epoch": epochs, "test_elbo": numbers(run.history.get("test_elbo"), len(epochs))}
    for name in ("test_marginal_kl", "test_moment_kl"):
        try:
            data[name] = numbers(run.history.get(name), len(epochs))
        except FigureError:
            continue
    return data


def _last(name: str, found: Sequence[tuple[Run, Data]]) -> str:
    ends = [
        f"latent_dim={run.settings['latent_dim']}: {data[name][0]:.4g} to {data[name][-1]:.4g}"
        for run, data in found
        if name in data
    ]
    return f"{name} from the first to the last epoch. {'; '.join(ends)}."


def _history(axes: Axes, found: Sequence[tuple[Run, Data]], names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for (run, data), colour in zip(found, sequence(len(found)), strict=True):
        for name, style in zip(names, ("-", ":"), strict=False):
            if name in data:
                label = f"latent_dim={run.settings['latent_dim']}" if style == "-" else None
                axes.plot(data["epoch"], data[name], style, color=colour, lw=1.6, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set(xlabel="epoch", ylabel="nats")
    axes.grid(axis="y")
    if names != ("test_elbo",):
        axes.set_ylim(bottom=0)
    legend_above(axes)


def dimensions(table: Table) -> Drawing:
    """KL(q_N,j ‖ N(0, 1)) sorted, one line for each latent_dim."""
    found = _one_each(
        table, lambda run: {"kl": sorted(kl_by_dimension(run), reverse=True)},
        "no record has per_dimension.kl",
    )  # fmt: skip
    alt = "; ".join(
        f"latent_dim={run.settings['latent_dim']}: {data['kl'][0]:.3g} to {data['kl'][-1]:.3g}"
        for run, data in found
    )
    return Drawing(
        "dimensions",
        "KL from N(0, 1) of each dimension, sorted",
        runs_words([run for run, _ in found]),
        "From the worst dimension to the best; 0 is a perfect match. Hollow: collapsed dimensions, "
        "which the decoder ignores.",
        "A long tail near zero lowers the mean over dimensions without bringing any used dimension "
        "closer.",
        ((Panel("KL by rank of the dimension", f"KL in nats, sorted. {alt}.",
                lambda axes: _dimensions(axes, found), top=legend_room(len(found))),),),
    )  # fmt: skip


def _dimensions(axes: Axes, found: Sequence[tuple[Run, Data]]) -> None:
    for (run, data), colour in zip(found, sequence(len(found)), strict=True):
        kl = data["kl"]
        rank = range(1, len(kl) + 1)
        axes.plot(rank, kl, "o-", color=colour, ms=3.5, lw=1.2,
                  label=f"latent_dim={run.settings['latent_dim']}")  # fmt: skip
        active = run.per_dimension.get("active", ())
        if len(active) == len(kl):
            order = sorted(zip(kl_by_dimension(run), active, strict=True), key=lambda p: -p[0])
            idle = [(i, value) for i, (value, used) in zip(rank, order, strict=True) if not used]
            axes.plot([i for i, _ in idle], [v for _, v in idle], "o", ms=3.5, color=colour,
                      markerfacecolor=PAPER)  # fmt: skip
    longest = max(len(data["kl"]) for _, data in found)
    if longest > 8:
        from matplotlib.ticker import NullLocator

        axes.set_xscale("log", base=2)
        ticks = [2**i for i in range(longest.bit_length())]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    smallest = min(min(data["kl"]) for _, data in found)
    largest = max(max(data["kl"]) for _, data in found)
    if smallest > 0:
        near_zero_axis(axes, max(smallest, largest * 1e-4))
    axes.axhline(0, color=INK, lw=1)
    axes.set(xlabel="dimension, by rank", ylabel="nats")
    axes.grid(axis="y")
    legend_above(axes)


def quilt(table: Table) -> Drawing:
    """KL(q(z|y)‖p) of every class, between marginal_kl and kl_per_image."""
    found = _one_each(table, _classes_of, "no run has curves by class (measure.panel=full)")
    panels = tuple(
        Panel(
            f"latent_dim={run.settings['latent_dim']}",
            f"KL by class in nats: {', '.join(_class_words(data))}.",
            partial(_quilt, run=run, data=data),
            top=legend_room(3),
            width=3.7,
            height=2.8,
        )
        for run, data in found
    )
    return Drawing(
        "quilt",
        "The quilt: KL of each class, between single images and the whole",
        runs_words([run for run, _ in found]),
        "Points: KL(q(z|y)‖p) of each class. Dashed above: kl_per_image, of single images. Solid "
        "below: marginal_kl, of all images together. The classes are the patches of the quilt.",
        "With few images a class saturates as a run does: it is then its kl_per_image less log n.",
        (panels,),
    )


def _classes_of(run: Run) -> Data:
    curve = run.curves.get("by_class")
    if not isinstance(curve, dict):
        raise FigureError("no by_class")
    labels = numbers(curve.get("label"))
    return {
        "label": labels,
        "marginal_kl": numbers(curve.get("marginal_kl"), len(labels)),
        "std_error": _errors(curve.get("std_error"), len(labels)),
    }


def _errors(values: Any, n: int) -> list[float]:
    """Errors for the bars, zero where the record has none: a bar of no length is not drawn."""
    try:
        return numbers(values, n)
    except FigureError:
        return [0.0] * n


def _class_words(data: Data) -> list[str]:
    return [
        f"{label:.0f}: {value:.3g}"
        for label, value in zip(data["label"], data["marginal_kl"], strict=True)
    ]


def _quilt(axes: Axes, run: Run, data: Data) -> None:
    kl = data["marginal_kl"]
    axes.plot(data["label"], kl, "o", color=CODES, ms=5, label="one class")
    ends = [(v - 2 * e, v + 2 * e) for v, e in zip(kl, data["std_error"], strict=True)]
    axes.vlines(data["label"], *zip(*ends, strict=True), color=CODES, lw=1.3)
    for metric, style in (("kl_per_image", "--"), ("marginal_kl", "-")):
        value = run.value(metric)
        if value is not None:
            axes.axhline(value, color=MUTED, ls=style, lw=1.3, label=metric)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    if len(data["label"]) <= 12:
        axes.set_xticks(data["label"], [f"{label:.0f}" for label in data["label"]])
    axes.set(xlabel="class", ylabel="nats")
    axes.grid(axis="y")
    legend_above(axes)


def uniform(table: Table) -> Drawing:
    """Histograms of u = Φ(z_j), flat where the dimension is N(0, 1)."""
    found = _one_each(table, _pit_of, "no run has PIT histograms (measure.panel=full)")
    panels = tuple(
        Panel(
            f"latent_dim={run.settings['latent_dim']}",
            f"Density of u for {len(masses)} dimensions; the worst leaves 1 by up to "
            f"{_worst(masses)[1]:.2g}.",
            partial(_pit, masses=masses),
            width=3.7,
            height=2.6,
        )
        for run, masses in found
    )
    return Drawing(
        "uniform",
        "The uniform view: u = Φ(z) of each dimension",
        ", ".join([run_words(found[0][0])] if len(found) == 1 else [
            runs_words([run for run, _ in found])]),
        "A dimension that is N(0, 1) gives the flat line at 1. High in the middle: too narrow; "
        "high at both ends: too wide; tilted: shifted. Bold: the dimension furthest from flat.",
        "Flat histograms of all dimensions do not make the codes N(0, I): dependence between "
        "dimensions does not show here.",
        (panels,),
    )  # fmt: skip


def _pit_of(run: Run) -> list[list[float]]:
    pit = run.curves.get("pit")
    masses = pit.get("mass") if isinstance(pit, dict) else None
    if not isinstance(masses, list) or not masses:
        raise FigureError("no pit")
    first = numbers(masses[0])
    return [[m * len(first) for m in numbers(mass, len(first))] for mass in masses]


def _worst(masses: Sequence[Sequence[float]]) -> tuple[int, float]:
    """The dimension whose histogram is furthest from flat in total, and its largest excess."""
    index = max(range(len(masses)), key=lambda j: sum(abs(m - 1) for m in masses[j]))
    return index, max(abs(m - 1) for m in masses[index])


def _pit(axes: Axes, masses: Sequence[Sequence[float]]) -> None:
    from matplotlib.collections import LineCollection

    bins = len(masses[0])
    edges = [i / bins for i in range(bins + 1) for _ in (0, 1)][1:-1]
    steps = [[m for m in mass for _ in (0, 1)] for mass in masses]
    segments = [list(zip(edges, step, strict=True)) for step in steps]
    axes.add_collection(LineCollection(segments[:64], colors=CODES, linewidths=0.8, alpha=0.35))
    axes.plot(edges, steps[_worst(masses)[0]], color=CODES, lw=2)
    axes.axhline(1, color=INK, lw=1.2)
    axes.set(xlim=(0, 1), xlabel="u", ylabel="density")
    axes.set_ylim(0, max(1.6, 1.1 * max(max(step) for step in steps)))


def _one_each(table: Table, read: Callable[[Run], Any], reason: str) -> list[tuple[Run, Any]]:
    """For each latent_dim the first run that holds what is needed, a few of them."""
    found: dict[str, tuple[Run, Any]] = {}
    for runs in by_dimension(table).values():
        for run in runs:
            try:
                found[run.name] = run, read(run)
            except FigureError:
                continue
            break
    if not found:
        raise FigureError(reason)
    kept = {run.name for run in few([run for run, _ in found.values()])}
    return [pair for name, pair in found.items() if name in kept]
