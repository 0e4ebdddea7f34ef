"""``report.html``: one file that opens from disk, with nothing fetched and every name escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vaeq.errors import one_line
from vaeq.report.baseline import Comparison
from vaeq.report.claims import FactorVerdict
from vaeq.report.costs import costs_of
from vaeq.report.figures.rendering import Rendered
from vaeq.report.outcomes import SHORT
from vaeq.report.runs import Excluded, Run
from vaeq.report.table import Table, provenance_text, setting_text, settings_text
from vaeq.report.trend import BLOCK_TESTS, FALSE_DISCOVERY, TESTS
from vaeq.report.verdict import Verdict
from vaeq.report.words import MISSING, measured

if TYPE_CHECKING:
    from jinja2 import Template

FOLDER = Path(__file__).parent / "page"


def page(
    table: Table,
    verdict: Verdict,
    excluded: Sequence[Excluded],
    drawings: Sequence[Rendered],
    left_out: Mapping[str, str],
    comparison: Comparison | None,
    filters: str,
) -> str:
    """The whole page; equal text for equal records."""
    runs = [run for row in table.rows for run in row.runs]
    return _template().render(
        experiments=", ".join(dict.fromkeys(one_line(run.experiment, 60) for run in runs)),
        filters=filters,
        n_runs=len(runs),
        n_configurations=len(table.rows),
        verdict=verdict,
        factors=[_factor(factor) for claim in verdict.claims for factor in claim.factors],
        claims=[
            {
                "claim": claim.claim,
                "factors": [_factor(factor) for factor in claim.factors],
                "unanswered": claim.unanswered,
            }
            for claim in verdict.claims
        ],
        tests=_tests(verdict),
        costs=costs_of(table),
        drawings=drawings,
        left_out=left_out,
        comparison=comparison,
        table=table,
        metrics=table.telling(),
        setting=setting_text,
        zip=zip,
        plain=_plain,
        run_head=_run_head(table),
        run_rows=_run_rows(table),
        excluded=excluded,
        constant=settings_text(table.constant),
        provenance=provenance_text(runs),
        hashes=[(run.name, run.config_hash) for run in runs] if len(runs) <= 100 else [],
        css=(FOLDER / "report.css").read_text(encoding="utf-8"),
        script=(FOLDER / "sort.js").read_text(encoding="utf-8"),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _plain(title: str) -> str:
    """A panel's title without the mathematics markup of its file."""
    return re.sub(r"\$(\w)_(\d+)\$", r"\1\2", title).replace(r"\$", "$")


def _factor(verdict: FactorVerdict) -> dict[str, Any]:
    per = next((o.effect.per for o in verdict.outcomes if o.effect is not None), "step")
    ordered = [each for each in verdict.orderings if each.order]
    return {
        "name": verdict.factor,
        "levels": ", ".join(setting_text(level) for level in verdict.levels),
        "blocks": verdict.n_blocks,
        "seeds": len(verdict.seeds),
        "per": per,
        "outcomes": verdict.outcomes,
        "strata": [
            (setting_text(dim), [SHORT[outcome.answer] for outcome in outcomes])
            for dim, outcomes in verdict.strata.items()
        ],
        "metrics": [outcome.metric for outcome in verdict.outcomes],
        "notes": verdict.notes,
        "orderings": verdict.orderings,
        "certified": len(ordered),
    }


def _tests(verdict: Verdict) -> list[tuple[str, str]]:
    used = {
        outcome.trend.test: None
        for claim in verdict.claims
        for factor in claim.factors
        for outcome in factor.outcomes
        if outcome.trend is not None
    }
    tests = [(name, TESTS[name]) for name in used if name in TESTS]
    return [*tests, ("q", FALSE_DISCOVERY)] if any(name in BLOCK_TESTS for name in used) else tests


def _run_head(table: Table) -> list[str]:
    return [*table.varying, "seed", *(table.heading(metric) for metric in table.telling())]


def _run_rows(table: Table) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each run its name, and its cells as text with the number they sort by."""
    metrics = table.telling()
    rows = []
    for row in table.rows:
        settings = [(setting_text(v := row.settings.get(name)), _key(v)) for name in table.varying]
        for run in row.runs:
            cells = [*settings, (str(run.seed), str(run.seed))]
            cells += [_estimate(run, metric) for metric in metrics]
            rows.append((run.name, cells))
    return rows


def _key(value: object) -> str:
    """What a cell sorts by where its text is no number of its own."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(value) if number else ""


def _estimate(run: Run, metric: str) -> tuple[str, str]:
    estimate = run.estimates.get(metric)
    if estimate is None or estimate.value is None:
        return MISSING, ""
    mean, _, error = measured(estimate.value, None, estimate.std_error)
    return mean + (f" ± {error}" if error else ""), repr(estimate.value)
