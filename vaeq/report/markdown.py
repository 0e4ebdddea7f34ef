"""The table and the verdict as Markdown, for a README or a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vaeq.errors import one_line
from vaeq.report.baseline import Comparison
from vaeq.report.claims import FactorVerdict
from vaeq.report.runs import Excluded
from vaeq.report.table import (
    Table,
    provenance_text,
    setting_text,
    settings_text,
)
from vaeq.report.trend import BLOCK_TESTS, FALSE_DISCOVERY, TESTS
from vaeq.report.verdict import Verdict


def table_markdown(table: Table, excluded: Sequence[Excluded]) -> str:
    """The telling metrics as a Markdown table, with what a reader needs to judge them."""
    metrics = table.telling()
    header = [*table.varying, "n", *(table.heading(metric) for metric in metrics)]
    rows = [
        [setting_text(row.settings.get(name)) for name in table.varying]
        + [str(len(row.runs)), *(table.cell(row, metric) for metric in metrics)]
        for row in table.rows
    ]
    lines = ["# Aggregated posterior against N(0, I)", "", *_grid(header, rows, numbers=True)]
    runs = [run for row in table.rows for run in row.runs]
    lines += ["", table.legend(), "", f"Constant: {_literal(settings_text(table.constant))}."]
    if provenance := provenance_text(runs):
        lines += ["", f"Measured with {_literal(provenance)}."]
    lines += _bullets("Numbers that could not be had", table.missing)
    names = [f"{one_line(run.name)} ({run.kind}): {run.reason}" for run in excluded]
    lines += _bullets("Runs that are not in the table", names)
    return "\n".join(lines) + "\n"


def differences_markdown(table: Table, comparison: Comparison) -> str:
    """Every configuration's difference from the baseline."""
    header = [*table.varying, *(table.heading(metric) for metric in comparison.metrics)]
    rows = [
        [setting_text(row.settings.get(name)) for name in table.varying]
        + [cell.text() for cell in cells]
        for row, cells in comparison.rows
    ]
    lines = ["# Differences from the baseline", "", *_grid(header, rows, numbers=True)]
    return "\n".join([*lines, "", _literal(comparison.legend()), ""])


def verdict_markdown(verdict: Verdict) -> str:
    """The bottom line, then each claim with its outcomes and what weakens them."""
    lines = ["# Verdict", "", _literal(" ".join(verdict.bottom_line))]
    used: dict[str, None] = {}
    for n, claim in enumerate(verdict.claims, start=1):
        lines += ["", f"## Claim {n}: {claim.claim}"]
        for factor in claim.factors:
            lines += _factor_lines(factor)
            used |= {o.trend.test: None for o in factor.outcomes if o.trend is not None}
        if claim.unanswered:
            lines += ["", claim.unanswered]
    tests = [f"{name}: {TESTS[name]}." for name in used if name in TESTS]
    if any(name in BLOCK_TESTS for name in used):
        tests.append(f"q: {FALSE_DISCOVERY}.")
    lines += _bullets("Tests", tests)
    return "\n".join(lines) + "\n"


def _factor_lines(verdict: FactorVerdict) -> list[str]:
    levels = ", ".join(setting_text(level) for level in verdict.levels)
    per = next((o.effect.per for o in verdict.outcomes if o.effect), "")
    change = f"change per {per} [95% CI over seeds]" if per else "change"
    header = ["view", "metric", "answer", "first → last", "unit", change, "test", "q", "blocks"]
    rows = [
        [
            outcome.view,
            outcome.metric,
            outcome.answer_text(),
            outcome.effect_text(),
            outcome.unit,
            outcome.effect.change_text() if outcome.effect else "",
            outcome.test_text(),
            outcome.q_text(),
            str(outcome.trend.n_blocks if outcome.trend else 0),
        ]
        for outcome in verdict.outcomes
    ]
    seeds = ", ".join(str(seed) for seed in verdict.seeds)
    counts = f"blocks: {verdict.n_blocks}, seeds: {seeds}"
    lines = ["", f"### {verdict.factor} = {_literal(levels)} ({counts})", "", *_grid(header, rows)]
    if verdict.strata:
        strata = verdict.strata.values()
        answers = [
            [metric.metric, *(outcomes[i].answer_text() for outcomes in strata)]
            for i, metric in enumerate(verdict.outcomes)
        ]
        lines += [
            "",
            *_grid(
                ["metric", *(f"latent_dim={setting_text(dim)}" for dim in verdict.strata)], answers
            ),
        ]
    return [*lines, "", *map(_bullet, verdict.notes)]


def _grid(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False
) -> list[str]:
    """A Markdown table, numbers to the right, whose columns line up as plain text too."""
    cells = [[_literal(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [cell.rjust(w) if numbers else cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
        for row in cells
    ]
    lines.insert(1, ["-" * (w - 1) + (":" if numbers else "-") for w in widths])
    return [f"| {' | '.join(line)} |" for line in lines]


def _bullets(heading: str, items: Sequence[str]) -> list[str]:
    """A heading and a bullet list, or nothing without items."""
    if not items:
        return []
    return ["", f"## {heading}", "", *map(_bullet, items)]


def _bullet(text: str) -> str:
    """An item, that begins no heading, quotation or list of its own."""
    return "- " + _LEADING.sub(lambda found: f"{found[1] or ''}\\", _literal(text))


# What GitHub's Markdown acts on in the middle of a line; an underscore within a word is none of it.
_ACTIVE = re.compile(
    r"[\\`*|~$]|<(?=[a-zA-Z/!?])|\](?=[(\[:])|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|:(?=//)|(?<=www)\."
)
# And at the beginning of an item.
_LEADING = re.compile(r"^(?=[#>+=-])|^(\d+)(?=[.)])")


def _literal(text: str) -> str:
    """Text in which Markdown and HTML find nothing to act on."""
    return _ACTIVE.sub(r"\\\g<0>", text)
