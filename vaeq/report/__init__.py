"""Records of runs → table, verdict and figures: never trains, never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vaeq.errors import InputError
from vaeq.report.runs import Excluded, Run, newest_experiment, read_runs
from vaeq.report.table import Table, build_table, to_csv
from vaeq.report.verdict import Verdict, judge

__all__ = ["Report", "newest_experiment", "write_report"]


@dataclass(frozen=True)
class Report:
    """What a report found and wrote. Without a complete run there is no verdict and no file."""

    runs: tuple[Run, ...]
    excluded: tuple[Excluded, ...]
    table: Table
    verdict: Verdict | None
    files: tuple[Path, ...]
    left_out: Mapping[str, str]


def write_report(runs: Sequence[Path], output: Path, console: Console) -> Report:
    """Print the table and the verdict of all runs under some folders, and write them to files.

    Args:
        runs: folders of runs, searched three levels deep.
        output: folder that receives table.csv, table.md, verdict.md and the figures; made if
            absent. A figure of an earlier report that these runs do not allow is removed.
        console: where the report is printed; any width, a terminal or not.

    Raises:
        InputError: there is no run, or the output folder cannot be written.
    """
    from vaeq.report.terminal import Printer, print_report

    complete, excluded = read_runs(runs)
    table = build_table(complete)
    verdict = judge(complete) if complete else None
    print_report(console, table, verdict, excluded)
    if verdict is None:
        return Report((), tuple(excluded), table, None, (), {})
    files, left_out = _write_files(complete, excluded, table, verdict, output)
    printer = Printer(console)
    printer.line()
    printer.line(f"Wrote {', '.join(path.name for path in files)} to {output}.")
    for name, reason in left_out.items():
        printer.line(f"No {name}: {reason}.", "dim")
    return Report(tuple(complete), tuple(excluded), table, verdict, files, left_out)


def _write_files(
    runs: Sequence[Run],
    excluded: Sequence[Excluded],
    table: Table,
    verdict: Verdict,
    output: Path,
) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Write every file whole or not at all; the names of those written and why others were not."""
    from vaeq.record import write_atomic
    from vaeq.report.figures import FIGURES, FigureError
    from vaeq.report.markdown import table_markdown, verdict_markdown

    texts = {
        "table.csv": to_csv(table),
        "table.md": table_markdown(table, excluded),
        "verdict.md": verdict_markdown(verdict),
    }
    drawings: dict[str, Callable[[Sequence[Run], Table], bytes]] = FIGURES
    files, left_out = [], {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(output / name, text)
            files.append(output / name)
        for name, draw in drawings.items():
            try:
                image = draw(runs, table)
            except FigureError as reason:
                left_out[name] = str(reason)
                (output / name).unlink(missing_ok=True)
                continue
            write_atomic(output / name, image)
            files.append(output / name)
    except OSError as error:
        raise InputError(
            f"output={output} cannot be written ({error.strerror or error}); "
            "choose another folder with output=DIR."
        ) from None
    return tuple(files), left_out
