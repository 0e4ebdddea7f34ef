"""``baseline=``: every configuration's difference from one of them, with the errors of both."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from vaeq.errors import InputError, one_line
from vaeq.report.table import Aggregate, Row, Table, setting_text, settings_text
from vaeq.report.words import MISSING, measured


@dataclass(frozen=True)
class Difference:
    """A metric minus the baseline's.

    ``error`` is sqrt(sd²/n + sd₀²/n₀) where both have two seeds or more, and then ``over_seeds``;
    else the Monte Carlo errors combined, None where a record gives none.
    """

    value: float | None
    error: float | None
    over_seeds: bool

    def text(self) -> str:
        """``+1.20 ± 0.05``."""
        if self.value is None:
            return MISSING
        mean, _, error = measured(abs(self.value), None, self.error)
        sign = "+" if self.value > 0 else "−" if self.value < 0 else ""
        return f"{sign}{mean}" + (f" ± {error}" if error else "")


@dataclass(frozen=True)
class Comparison:
    """The baseline, and a row of differences for each other configuration."""

    baseline: Row
    label: str
    metrics: tuple[str, ...]
    rows: tuple[tuple[Row, tuple[Difference, ...]], ...]

    def legend(self) -> str:
        """What the cells mean."""
        cells = [cell for _, row in self.rows for cell in row]
        over = {cell.over_seeds for cell in cells if cell.value is not None}
        words = {
            frozenset({True}): "the error combines the spread over seeds of both",
            frozenset({False}): "the error is Monte Carlo only: too few seeds for their spread",
        }.get(
            frozenset(over),
            "the error combines the spread over seeds where both have two, else it is Monte Carlo",
        )
        return f"Difference from {self.label}; {words}. None shown: computed without sampling."


def compare(table: Table, text: str) -> Comparison:
    """All differences from the configuration that ``text`` names.

    Args:
        table: the report's table.
        text: settings, such as ``latent_dim=2,encoder_depth=1``, or the beginning of a run's name,
            which stands for its configuration.

    Raises:
        InputError: it names no configuration, or several.
    """
    baseline = _find(table, text)
    metrics = table.telling()
    rows = tuple(
        (row, tuple(difference(row.metrics[m], baseline.metrics[m]) for m in metrics))
        for row in table.rows
        if row is not baseline
    )
    label = settings_text({name: baseline.settings.get(name) for name in table.varying})
    return Comparison(baseline, label or "the only configuration", metrics, rows)


def difference(a: Aggregate, base: Aggregate) -> Difference:
    """a minus base, with the errors of both."""
    if a.mean is None or base.mean is None:
        return Difference(None, None, False)
    value = a.mean - base.mean
    if a.sd is not None and base.sd is not None:
        return Difference(value, math.hypot(a.sd / a.n**0.5, base.sd / base.n**0.5), True)
    if a.mc_error is None or base.mc_error is None:
        return Difference(value, None, False)
    return Difference(value, math.hypot(a.mc_error, base.mc_error), False)


def _find(table: Table, text: str) -> Row:
    wanted = _settings(table, text)
    if wanted is not None:
        found = [
            row
            for row in table.rows
            if all(setting_text(row.settings.get(k)) == v for k, v in wanted.items())
        ]
    else:
        found = [
            row
            for row in table.rows
            if any(text in ("", run.name) or _starts(run.name, text) for run in row.runs)
        ]
    if len(found) == 1:
        return found[0]
    shown = one_line(text, 80)
    if found:
        raise InputError(
            f"baseline={shown} names {len(found)} configurations; "
            f"give {', '.join(table.varying)} of one of them."
        )
    names = [run.name for row in table.rows for run in row.runs]
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    hint = f"; did you mean {one_line(close[0])}?" if close else "."
    raise InputError(f"baseline={shown} names no run of this report{hint}")


def _starts(name: str, text: str) -> bool:
    return name.startswith(text) or name.rpartition("/")[2].startswith(text)


def _settings(table: Table, text: str) -> dict[str, str] | None:
    """``latent_dim=2,encoder_depth=1`` as a mapping; None where it is no list of settings."""
    known = {*table.varying, *table.constant}
    wanted = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name not in known:
            return None
        wanted[name] = value
    return wanted
