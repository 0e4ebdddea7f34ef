"""Every estimate for one set of codes, from any encoder: the panel, and how to show it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vaeq.divergence import decompose, marginals
from vaeq.divergence.bracket import population_bracket
from vaeq.divergence.classes import class_kl
from vaeq.divergence.n_curve import n_curve
from vaeq.divergence.reverse import reverse_marginal_kl
from vaeq.divergence.two_sample import N_DIRECTIONS, N_SAMPLES, REPEATS, two_sample
from vaeq.divergence.uniform import uniform_view
from vaeq.errors import InputError, one_line
from vaeq.estimate import Estimate
from vaeq.lockstep import rejoin
from vaeq.posterior.aggregated import AggregatedPosterior
from vaeq.posterior.codes import Codes, as_codes, read_beside, read_codes, warn_of
from vaeq.seeds import derive_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# The estimates of each panel, beside those of the panels before it.
PANELS: dict[str, tuple[str, ...]] = {
    "decomposition": (
        "kl_per_image",
        "mutual_information",
        "mutual_information_fraction",
        "marginal_kl",
        "total_correlation",
        "dimension_kl_sum",
        "dimension_kl_mean",
        "dimension_kl_max",
        "dimension_kl_mean_active",
        "active_units",
        "moment_kl",
    ),
    "bracket": ("population_kl_lower", "population_kl_upper", "population_kl_upper_infonce"),
    "full": (
        "reverse_marginal_kl",
        "reverse_marginal_kl_ess",
        "n_curve_slope",
        "class_kl_mean",
        *(
            f"{distance}{part}"
            for distance in ("sliced_w2", "mmd", "energy_distance", "c2st_auc")
            for part in ("", "_null", "_null_sd", "_z")
        ),
    ),
}
# Draws a point of the n_curve, a class of the quilt, and of the prior for the reverse KL.
CURVE_SAMPLES = 2_000


@dataclass(frozen=True)
class Measurement:
    """What was found about one aggregated posterior, and with which settings.

    ``print`` it for a table; ``to_dict``, ``to_frame`` and ``plot`` for the rest.
    """

    estimates: dict[str, Estimate]
    per_dimension: dict[str, list[Any]]
    settings: dict[str, Any]
    curves: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "estimates": {name: value.to_dict() for name, value in self.estimates.items()},
            "per_dimension": self.per_dimension,
            "curves": self.curves,
            "settings": self.settings,
        }

    def to_frame(self) -> DataFrame:
        """One row an estimate: value, std_error, unit, reason."""
        import pandas as pd

        columns = ["value", "std_error", "unit", "reason"]
        rows = [[getattr(value, name) for name in columns] for value in self.estimates.values()]
        return pd.DataFrame(rows, index=pd.Index([*self.estimates], name="name"), columns=columns)

    def __str__(self) -> str:
        rows = [("", "value", "± s.e.", "unit"), *map(_row, *_columns(self.estimates))]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {value:>{widths[1]}}  {error:>{widths[2]}}  {unit}".rstrip()
            for name, value, error, unit in rows
        ]
        settings = self.settings
        title = f"{settings['n']} images, {settings['latent_dim']} dimensions"
        if settings.get("test_n"):
            title += f", {settings['test_n']} held out"
        return "\n".join([title, "", *lines])

    def plot(self) -> Figure:
        """A figure of the dimensions, their uniform view, the n_curve and the ends of the KL."""
        return _plot(self)


def estimate_names(panel: str) -> list[str]:
    """The estimates of a panel, with those of the panels before it."""
    names: list[str] = []
    for each, own in PANELS.items():
        names += own
        if each == panel:
            break
    return names


def measure(
    mean: Any,
    logvar: Any,
    test_mean: Any = None,
    test_logvar: Any = None,
    labels: Any = None,
    *,
    n_samples: int = 10_000,
    seed: int = 0,
    panel: str = "full",
    flow: bool = False,
) -> Measurement:
    """How far the aggregated posterior of some codes is from N(0, I), in every reading.

    Args:
        mean, logvar: mean and log variance of q(z|x) for the training images, (N, D); torch
            tensors on any device or NumPy arrays.
        test_mean, test_logvar: the same for images the encoder has not seen, (M, D). Without them
            the population bracket is missing, with that reason.
        labels: class of each training image, integers (N,), for the KL by class.
        n_samples: draws of q_N for the decomposition.
        seed: of everything random. Each part has a stream of its own, drawn on the CPU, so that
            panel and device do not change the draws of the others.
        panel: "decomposition" for the decomposition and the exact marginals (seconds), "bracket"
            for the population bracket beside them, "full" for everything
            (about 20 s for N = 60,000, M = 10,000, D = 32 on two cores).
        flow: try a normalizing flow for the lower bound, too (about a minute; the extra ``flow``).

    Returns:
        A :class:`Measurement`. Estimates that could not be had are None with the reason.

    Raises:
        InputError: on arrays that cannot be measured, or an unknown panel.

    Warns:
        CodesWarning: where a variance seems to have been given as logvar.
    """
    codes = as_codes(mean, logvar, test_mean, test_logvar, labels)
    return measure_posterior(
        AggregatedPosterior(codes.mean, codes.logvar),
        codes,
        n_samples=n_samples,
        seed=seed,
        panel=panel,
        flow=flow,
    )


def measure_posterior(
    posterior: AggregatedPosterior,
    codes: Codes,
    *,
    n_samples: int = 10_000,
    seed: int = 0,
    panel: str = "full",
    flow: bool = False,
) -> Measurement:
    """As :func:`measure`, for an aggregated posterior that need not be in memory.

    Args:
        posterior: of the training images, perhaps a
            :class:`vaeq.posterior.shards.ShardedPosterior`.
        codes: its held-out codes, its labels and what is suspicious about them.
    """
    if panel not in PANELS:
        raise InputError(f"panel must be one of {', '.join(PANELS)}, got {panel!r}.")
    if n_samples < 1:
        raise InputError(f"n_samples must be >= 1, got {n_samples}.")
    warn_of(codes, stacklevel=3)

    def stream(part: str) -> torch.Generator:
        rejoin()  # every part begins in step
        return torch.Generator().manual_seed(derive_seed(seed, part))

    per_dimension: dict[str, list[Any]] = dict(marginals(posterior))
    estimates = decompose(
        posterior, n_samples, stream("decomposition"), per_dimension=per_dimension
    )
    settings: dict[str, Any] = {
        "panel": panel,
        "n_samples": n_samples,
        "seed": seed,
        "n": posterior.n,
        "latent_dim": posterior.latent_dim,
        "test_n": 0 if codes.test_mean is None else len(codes.test_mean),
        "dtype": str(posterior.dtype).removeprefix("torch."),
        "path": posterior.path,
        "warnings": list(codes.suspicions),
    }
    curves: dict[str, Any] = {}
    if panel == "decomposition":
        return Measurement(estimates, per_dimension, settings, curves)

    held_out = None
    if codes.test_mean is not None and codes.test_logvar is not None:
        held_out = AggregatedPosterior(codes.test_mean, codes.test_logvar)
    bracket = population_bracket(posterior, held_out, flow=flow, generator=stream("bracket"))
    estimates |= bracket.estimates()
    settings["bracket"] = bracket.settings
    curves["bracket"] = bracket.table()
    if panel == "bracket":
        return Measurement(estimates, per_dimension, settings, curves)

    estimates |= reverse_marginal_kl(posterior, CURVE_SAMPLES, stream("reverse"))
    estimates["n_curve_slope"], curves["n_curve"] = n_curve(
        posterior, CURVE_SAMPLES, stream("n_curve")
    )
    if codes.labels is None:
        estimates["class_kl_mean"] = Estimate.missing("nats", "needs labels")
    else:
        estimates["class_kl_mean"], curves["by_class"] = class_kl(
            posterior, codes.labels, CURVE_SAMPLES, stream("classes")
        )
    view = uniform_view(posterior)
    per_dimension["pit_total_variation"] = view.total_variation
    curves["pit"] = {"edges": view.edges, "mass": view.mass}
    estimates |= two_sample(posterior, N_SAMPLES, REPEATS, stream("two_sample"))
    settings["two_sample"] = {
        "n_samples": N_SAMPLES,
        "repeats": REPEATS,
        "directions": N_DIRECTIONS,
        "mmd_kernel": "(1 + |a - b|^2)^(-1/2)",
    }
    settings["curve_samples"] = CURVE_SAMPLES
    return Measurement(estimates, per_dimension, settings, curves)


def measure_file(
    codes: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    shards: int | None = None,
    **settings: Any,
) -> Measurement:
    """Measure a file of codes, and write what was found as JSON.

    Args:
        codes: as :mod:`vaeq.posterior.sources` says.
        output: JSON file to write, whole or not at all; None to write none.
        shards: parts in which .npy files are read, each by a worker process; see
            :mod:`vaeq.posterior.shards`. None: 1, or as many as the free memory makes necessary.
        settings: of :func:`vaeq.measure`.

    Raises:
        InputError: on codes or an output that cannot be used; nothing is written then.
    """
    from vaeq.posterior.shards import in_shards

    target = None if output is None else _writable(Path(output))
    with _explaining_memory(str(codes)):
        sharded = in_shards(str(codes), shards)
        if sharded is None:
            read = read_codes(codes)
            found = measure(
                read.mean, read.logvar, read.test_mean, read.test_logvar, read.labels, **settings
            )
        else:
            with sharded as posterior:
                test = read_beside(str(codes), posterior)
                found = measure_posterior(posterior, test, **settings)
    if target is not None:
        from vaeq.runs.record import dump, write_atomic

        write_atomic(target, dump(found.to_dict()))
    return found


@contextmanager
def _explaining_memory(source: str) -> Iterator[None]:
    """One sentence for memory that is used up, in the words of NumPy or of torch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(
            f"codes={one_line(source)} need more memory than there is; keep them as .npy files and "
            "add shards=16, or more."
        ) from None


def _writable(path: Path) -> Path:
    """The path, if a file can be written there: asked before minutes are spent on its content."""
    text = one_line(str(path))
    if path.is_dir():
        raise InputError(f"output={text} is a folder; give a file, e.g. {text}/measure.json.")
    if not path.parent.is_dir():
        raise InputError(
            f"output={text} is in a folder that does not exist; make {path.parent} first."
        )
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"output={text} is in a folder that cannot be written; choose another.")
    return path


def _columns(estimates: Mapping[str, Estimate]) -> tuple[list[str], list[Estimate]]:
    return [*estimates], [*estimates.values()]


def _row(name: str, estimate: Estimate) -> tuple[str, str, str, str]:
    if estimate.value is None:
        return name, "–", "", f"not available: {estimate.reason}"
    unit = "" if estimate.unit == "1" else estimate.unit
    if not estimate.std_error:
        return name, f"{estimate.value:.4g}", "exact" if estimate.std_error == 0 else "", unit
    # As many decimals as two digits of the error have.
    decimals = min(max(0, 1 - math.floor(math.log10(estimate.std_error))), 9)
    return name, f"{estimate.value:.{decimals}f}", f"{estimate.std_error:.{decimals}f}", unit


def _plot(found: Measurement) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    dimensions, uniform, curve, ends = figure.subplots(2, 2).flat

    kl = found.per_dimension["kl"]
    dimensions.bar(range(1, len(kl) + 1), kl, color="tab:blue")
    dimensions.set(
        xlabel="dimension", ylabel="KL to N(0, 1), nats", title="One dimension at a time"
    )

    pit = found.curves.get("pit")
    if pit:
        for mass in pit["mass"]:
            flat = [m * len(mass) for m in mass]
            uniform.stairs(flat, pit["edges"], color="tab:blue", alpha=0.4)
        uniform.axhline(1, color="black", linewidth=1)
        uniform.set(xlabel="u = Φ(z)", ylabel="density", ylim=(0, None))
    uniform.set_title("Uniform view: flat where N(0, 1)")

    points = found.curves.get("n_curve")
    average = found.estimates["kl_per_image"].value
    if points and average is not None:
        curve.errorbar(points["n"], points["marginal_kl"], points["std_error"], marker="o")
        curve.plot(points["n"], [average - math.log(n) for n in points["n"]], ":", color="gray")
        curve.set(xscale="log", xlabel="images N", ylabel="KL(q_N ‖ p), nats", ylim=(0, None))
    curve.set_title("Flat: identified. On the dotted line: saturated")

    names = ["moment_kl", "population_kl_lower", "population_kl_upper", "marginal_kl",
             "kl_per_image"]  # fmt: skip
    shown = [
        (name, estimate.value, estimate.std_error or 0.0)
        for name in reversed(names)
        if (estimate := found.estimates.get(name)) is not None and estimate.value is not None
    ]
    for row, (_, value, error) in enumerate(shown):
        ends.errorbar(value, row, xerr=2 * error, marker="o", color="tab:blue")
    ends.set_yticks(range(len(shown)), [name for name, _, _ in shown])
    ends.set(xlabel="nats, ± 2 s.e.", xlim=(0, None), title="Jointly")
    return figure
