"""One row a configuration: mean ± sd over seeds, n, and the pooled Monte Carlo error beside it."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vaeq.errors import InputError, one_line
from vaeq.estimate import Estimate
from vaeq.report.runs import Run, Scalar
from vaeq.report.words import DASH, MISSING, measured

# The axes of the two claims lead every table and sort its rows.
AXES = ("latent_dim", "encoder_depth", "encoder_width")

# What tells most, in the order of METRICS.md; table.csv has everything.
TELLING = (
    "elbo",
    "kl_per_image",
    "mutual_information",
    "mutual_information_fraction",
    "marginal_kl",
    "total_correlation",
    "dimension_kl_mean",
    "dimension_kl_mean_active",
    "dimension_kl_max",
    "active_units",
    "moment_kl",
    "population_kl_lower",
    "population_kl_upper",
    "log_likelihood",
    "inference_gap",
    "prior_cost",
    "quality_mismatch",
)


@dataclass(frozen=True)
class Aggregate:
    """A metric over the seeds of a configuration.

    ``sd`` is the standard deviation between seeds, None below two. ``mc_error`` is the Monte Carlo
    standard error of the mean, sqrt(Σ se²)/n; None where a record does not give its error.
    """

    mean: float | None
    sd: float | None
    n: int
    mc_error: float | None


def aggregate(estimates: Iterable[Estimate]) -> Aggregate:
    """Mean, sd and pooled Monte Carlo error over seeds; estimates without a value are left out."""
    present = [estimate for estimate in estimates if estimate.value is not None]
    values = [estimate.value for estimate in present if estimate.value is not None]
    if not values:
        return Aggregate(None, None, 0, None)
    errors = [estimate.std_error for estimate in present]
    known = [error for error in errors if error is not None]
    n, mean = len(values), fmean(values)
    return Aggregate(
        mean=mean,
        sd=_sd(values, mean) if n > 1 else None,
        n=n,
        mc_error=math.sqrt(math.fsum(e * e for e in known)) / n if len(known) == n else None,
    )


def _sd(values: Sequence[float], mean: float) -> float:
    """In two passes: statistics.stdev is exact in fractions and forty times slower."""
    if min(values) == max(values):
        return 0.0  # and not the rounding error of the mean
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


@dataclass(frozen=True)
class Row:
    """A configuration and its seeds."""

    settings: Mapping[str, Scalar]
    runs: tuple[Run, ...]
    metrics: Mapping[str, Aggregate]


@dataclass(frozen=True)
class Table:
    """All configurations; ``varying`` and ``constant`` split their settings."""

    rows: tuple[Row, ...]
    varying: tuple[str, ...]
    constant: Mapping[str, Scalar]
    metrics: tuple[str, ...]
    units: Mapping[str, str]
    missing: tuple[str, ...]
    chosen: tuple[str, ...] = ()

    def telling(self) -> tuple[str, ...]:
        """The metrics asked for, else those a terminal or a README has room for."""
        return self.chosen or tuple(metric for metric in TELLING if metric in self.metrics)

    @property
    def replicated(self) -> bool:
        """Does any configuration have more than one seed?"""
        return any(len(row.runs) > 1 for row in self.rows)

    def parts(self, row: Row, metric: str) -> tuple[str, str, str]:
        """Mean, sd and Monte Carlo error as text; no sd where no configuration can have one."""
        a = row.metrics[metric]
        if a.mean is None:
            return MISSING, "", ""
        mean, sd, mc_error = measured(a.mean, a.sd, a.mc_error)
        return mean, sd if self.replicated else "", mc_error

    def cell(self, row: Row, metric: str) -> str:
        """``5.54 ± 0.12 (0.01)``."""
        mean, sd, mc_error = self.parts(row, metric)
        return mean + (f" ± {sd}" if sd else "") + (f" ({mc_error})" if mc_error else "")

    def legend(self) -> str:
        """What the cells mean."""
        if self.replicated:
            head = f"Cells: mean ± sd over seeds (Monte Carlo s.e. of the mean); {DASH}: one seed, "
            head += "no sd."
        else:
            head = "Cells: value (Monte Carlo s.e.). One seed each: the sd over seeds is undefined "
            head += f"({DASH}) and left out."
        return f"{head} No parenthesis: computed without sampling. {MISSING}: reason below."

    def heading(self, metric: str) -> str:
        """The metric with its unit, which is left out where it is 1."""
        unit = self.units[metric]
        return metric if unit in ("", "1") else f"{metric} [{unit}]"


def build_table(runs: Sequence[Run], chosen: Sequence[str] = ()) -> Table:
    """Group complete runs by configuration and aggregate every metric any of them has.

    Args:
        runs: complete runs.
        chosen: the metrics to show, in this order; empty for the telling ones.

    Raises:
        InputError: no run has a chosen metric.
    """
    groups: dict[tuple[tuple[str, Scalar], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    names = {name: None for run in runs for name in run.settings}
    first = runs[0].settings if runs else {}
    varying = [
        name
        for name in names
        if any(name not in run.settings or run.settings[name] != first.get(name) for run in runs)
    ]
    varying.sort(key=lambda name: AXES.index(name) if name in AXES else len(AXES))
    units, unit_problems = _units(runs)
    metrics = sorted(units, key=lambda m: (TELLING.index(m) if m in TELLING else len(TELLING), m))
    rows = []
    for members in groups.values():
        members = sorted(members, key=lambda run: run.seed)
        usable = {m: [_in_unit(run, m, units[m]) for run in members] for m in metrics}
        aggregates = {m: aggregate(estimates) for m, estimates in usable.items()}
        rows.append(Row(members[0].settings, tuple(members), aggregates))
    rows.sort(key=lambda row: [sort_key(row.settings.get(name)) for name in varying])
    return Table(
        rows=tuple(rows),
        varying=tuple(varying),
        constant={name: first[name] for name in names if name not in varying},
        metrics=tuple(metrics),
        units=units,
        missing=(*_reasons(runs, metrics), *unit_problems),
        chosen=_known_metrics(chosen, metrics) if runs else (),
    )


def _known_metrics(chosen: Sequence[str], metrics: Sequence[str]) -> tuple[str, ...]:
    for name in chosen:
        if name not in metrics:
            close = difflib.get_close_matches(name, metrics, n=1)
            hint = f"did you mean {one_line(close[0])}? " if close else ""
            raise InputError(
                f"metrics={one_line(name, 60)} is in none of the records; {hint}"
                f"They hold {', '.join(map(one_line, metrics))}."
            )
    return tuple(dict.fromkeys(chosen))


def sort_key(value: Scalar) -> tuple[int, float, str]:
    """Numbers by size, then text, then what is absent."""
    if isinstance(value, int | float):
        return 0, float(value), ""
    return (2, 0.0, "") if value is None else (1, 0.0, value)


def setting_text(value: Scalar) -> str:
    """A setting as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return one_line(value) if isinstance(value, str) else repr(value)


def settings_text(settings: Mapping[str, Scalar]) -> str:
    """``latent_dim=2, encoder_depth=3``."""
    return ", ".join(f"{one_line(k, 60)}={setting_text(v)}" for k, v in settings.items())


def _units(runs: Sequence[Run]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The unit of every metric: the one most records give; others are named, not converted."""
    counts: dict[str, Counter[str]] = {}
    for run in runs:
        for metric, estimate in run.estimates.items():
            counts.setdefault(metric, Counter())[estimate.unit] += 1
    units = {metric: counter.most_common(1)[0][0] for metric, counter in counts.items()}
    problems = tuple(
        f"{one_line(metric)}: left out in {total - counter[units[metric]]} of {total} runs, where "
        f"its unit is not {one_line(units[metric])}"
        for metric, counter in counts.items()
        if (total := counter.total()) != counter[units[metric]]
    )
    return units, problems


def _in_unit(run: Run, metric: str, unit: str) -> Estimate:
    estimate = run.estimates.get(metric)
    if estimate is None:
        return Estimate.missing(unit, "not in the record")
    return estimate if estimate.unit == unit else Estimate.missing(unit, "another unit")


def _reasons(runs: Sequence[Run], metrics: Sequence[str]) -> tuple[str, ...]:
    """Why numbers are missing: metrics with the same reason in the same runs share a line."""
    where: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        for metric in metrics:
            estimate = run.estimates.get(metric)
            if estimate is not None and estimate.value is not None:
                continue
            reason = "not in the record" if estimate is None else estimate.reason or ""
            where.setdefault(one_line(reason), {}).setdefault(metric, []).append(run)
    lines = []
    for reason, by_metric in where.items():
        shared: dict[tuple[str, ...], list[str]] = {}
        for metric, members in by_metric.items():
            shared.setdefault(tuple(run.name for run in members), []).append(metric)
        for names, group in shared.items():
            which = ", ".join(one_line(metric) for metric in group)
            few = f" ({', '.join(map(one_line, names))})" if len(names) <= 2 < len(runs) else ""
            lines.append(f"{which}: {MISSING} in {len(names)} of {len(runs)} runs{few}: {reason}")
    return tuple(lines)


def provenance_text(runs: Sequence[Run]) -> str:
    """What measured the runs: versions, device, images; several where the runs differ."""

    def every(*path: str) -> str:
        values: dict[str, None] = {}
        for run in runs:
            value: object = run.provenance
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            if isinstance(value, str | int | float):
                values[one_line(str(value), 80)] = None
        return " and ".join(values)

    parts = [
        f"{label}{text}{after}"
        for label, path, after in (
            ("vaeq ", ("vaeq",), ""),
            ("commit ", ("commit",), ""),
            ("torch ", ("torch",), ""),
            ("Python ", ("python",), ""),
            ("", ("device",), ""),
            ("", ("threads",), " threads a run"),
            ("", ("data", "n_train"), " training images"),
            ("", ("data", "n_test"), " test images"),
        )
        if (text := every(*path))
    ]
    seconds = [run.seconds for run in runs if run.seconds is not None]
    if seconds:
        parts.append(f"{fmean(seconds):.0f} s a run")
    return ", ".join(parts)


def to_csv(table: Table) -> str:
    """All settings, and mean, sd, n and Monte Carlo error of every metric, or of those chosen.

    Text that a spreadsheet would compute is led by an apostrophe, as spreadsheets themselves do it.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    settings = [*table.varying, *table.constant]
    header = [*settings, "n", "seeds"]
    metrics = table.chosen or table.metrics
    for metric in metrics:
        unit = table.heading(metric)[len(metric) :]
        header += [f"{metric}_mean{unit}", f"{metric}_sd{unit}", f"{metric}_n"]
        header.append(f"{metric}_mc_error{unit}")
    writer.writerow(header)
    for row in table.rows:
        cells: list[object] = [_inert(row.settings.get(name)) for name in settings]
        cells += [len(row.runs), " ".join(str(run.seed) for run in row.runs)]
        for metric in metrics:
            a = row.metrics[metric]
            cells += [_exact(a.mean), _exact(a.sd), a.n, _exact(a.mc_error)]
        writer.writerow(cells)
    return stream.getvalue()


def _inert(value: Scalar) -> str:
    text = setting_text(value)
    return f"'{text}" if isinstance(value, str) and text[:1] in tuple("=+-@") else text


def _exact(value: float | None) -> str:
    """The shortest text that reads back as the same number; empty where there is none."""
    return "" if value is None else repr(value)
