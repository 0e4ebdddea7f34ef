"""Records of runs → verdict, tables, figures and a page: never trains, never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vaeq.errors import InputError
from vaeq.report.baseline import Comparison, compare
from vaeq.report.folders import expand, newest_experiment
from vaeq.report.runs import Excluded, Run, read_runs
from vaeq.report.table import Table, build_table, to_csv
from vaeq.report.verdict import Verdict, judge
from vaeq.report.where import filter_runs

__all__ = ["Report", "expand", "newest_experiment", "write_report"]

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """What a report found and wrote. Without a complete run there is no verdict and no file."""

    runs: tuple[Run, ...]
    excluded: tuple[Excluded, ...]
    table: Table
    verdict: Verdict | None
    comparison: Comparison | None
    files: tuple[Path, ...]
    left_out: Mapping[str, str]


def write_report(
    runs: Sequence[Path],
    output: Path,
    console: Console,
    *,
    where: str | None = None,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
) -> Report:
    """Print the table and the verdict of all runs under some folders, and write them to files.

    Args:
        runs: folders of runs, searched three levels deep.
        output: folder that receives report.html, the tables, verdict.md and the figures; made if
            absent. A figure of an earlier report that these runs do not allow is removed.
        console: where the report is printed; any width, a terminal or not.
        where: a condition on settings and metrics; runs for which it does not hold are left out.
        metrics: the columns of the tables; empty for those that tell most.
        baseline: the configuration that others are compared with; None for no comparison.

    Raises:
        InputError: there is no run, an option names nothing, or the folder cannot be written.
    """
    from vaeq.report.terminal import Printer, print_report

    complete, excluded = read_runs(runs)
    n_read = len(complete)
    if where is not None:
        complete = filter_runs(complete, where)
    table = build_table(complete, metrics)
    comparison = compare(table, baseline) if baseline is not None and complete else None
    verdict = judge(complete) if complete else None
    filters = f"{len(complete)} of {n_read} where {where}" if where is not None else ""
    print_report(console, table, verdict, excluded, comparison, filters)
    if verdict is None:
        return Report((), tuple(excluded), table, None, None, (), {})
    files, left_out = _write_files(excluded, table, verdict, comparison, filters, output)
    printer = Printer(console)
    printer.line()
    figures = len(files) - sum(path.suffix not in (".png", ".pdf") for path in files)
    names = [path.name for path in files if path.suffix not in (".png", ".pdf")]
    printer.line(f"Wrote {', '.join(names)} and {figures} figure files to {output}.")
    for name, reason in left_out.items():
        printer.line(f"No {name}: {reason}.", "dim")
    return Report(
        tuple(complete), tuple(excluded), table, verdict, comparison, tuple(files), left_out
    )


def _write_files(
    excluded: Sequence[Excluded],
    table: Table,
    verdict: Verdict,
    comparison: Comparison | None,
    filters: str,
    output: Path,
) -> tuple[list[Path], dict[str, str]]:
    """Write every file whole or not at all; the names of those written and why others were not.

    Everything is made before anything is written, so that an error leaves the folder as it was.
    """
    from vaeq.report.figures import DRAWINGS, draw
    from vaeq.report.figures.rendering import render
    from vaeq.report.html import page
    from vaeq.report.latex import table_latex
    from vaeq.report.markdown import differences_markdown, table_markdown, verdict_markdown
    from vaeq.runs.record import write_atomic

    drawings, left_out = draw(table)
    rendered = render(drawings)
    content: dict[str, bytes | str] = {
        PAGE: page(table, verdict, excluded, rendered, left_out, comparison, filters),
        "table.csv": to_csv(table),
        "table.md": table_markdown(table, excluded),
        "table.tex": table_latex(table),
        "verdict.md": verdict_markdown(verdict),
    }
    if comparison is not None:
        content["differences.md"] = differences_markdown(table, comparison)
    for shown in rendered:
        content |= {f"{shown.drawing.name}.{kind}": data for kind, data in shown.files.items()}
    ours = {f"{name}.{kind}" for name in DRAWINGS for kind in ("png", "pdf")} | {"differences.md"}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            write_atomic(output / name, data)
        for name in ours - content.keys():
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"output={output} cannot be written ({error.strerror or error}); "
            "choose another folder with output=DIR."
        ) from None
    return [output / name for name in content], left_out
