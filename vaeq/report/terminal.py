"""The report on a terminal of any width, or in a pipe: table, verdict, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from vaeq.errors import one_line
from vaeq.report.baseline import Comparison
from vaeq.report.claims import FactorVerdict
from vaeq.report.outcomes import SHORT, Outcome
from vaeq.report.runs import Excluded, Kind
from vaeq.report.table import (
    Table,
    provenance_text,
    setting_text,
    settings_text,
)
from vaeq.report.trend import BLOCK_TESTS, FALSE_DISCOVERY, TESTS
from vaeq.report.verdict import Verdict
from vaeq.report.words import ASCII

_STYLES = {
    "closer": "green",
    "further": "red",
    "no clear change": "yellow",
    "unclear": "yellow",
    "saturated": "magenta",
    "not measured": "dim",
}
_KINDS: dict[Kind, str] = {
    "failed": "failed",
    "unfinished": "unfinished",
    "unreadable": "unreadable",
    "other schema": "of another schema version",
    "duplicate": "counted already",
}
# Blanks between two columns.
_GAP = 2


@dataclass(frozen=True)
class Column:
    """A column that knows its width, so that the layout is chosen before anything is printed."""

    header: tuple[str, ...]
    cells: tuple[str, ...]
    justify: str = "right"

    @property
    def width(self) -> int:
        return max(len(line) for line in (*self.header, *self.cells))


class Printer:
    """Prints literal text: nothing in it is taken for markup, an emoji or an escape code."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.unicode = console.encoding.lower().startswith("utf")

    def text(self, content: str, style: str = "") -> Text:
        """Styled literal text, in ASCII where the terminal has no UTF-8."""
        if not self.unicode:
            content = content.translate(ASCII).encode("ascii", "backslashreplace").decode()
        return Text(content, style=style)

    def line(self, content: str = "", style: str = "", bullet: str = "") -> None:
        """One paragraph, wrapped at the width of the terminal, with no trailing blanks."""
        width = max(self.console.width - len(bullet), 20)
        lines = self.text(content, style).wrap(self.console, width)
        for i, line in enumerate(lines):
            line.rstrip()
            margin = bullet if i == 0 else " " * len(bullet)
            self.console.print(Text(margin) + line, soft_wrap=True)

    def item(self, content: str) -> None:
        """A paragraph with a hanging bullet."""
        self.line(content, bullet="  - ")

    def heading(self, content: str) -> None:
        """A heading after an empty line."""
        self.line()
        self.line(content, "bold")

    def grid(self, columns: Sequence[Column], sections: Sequence[int] = ()) -> None:
        """A table of columns; a rule follows each row whose index is in ``sections``."""
        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            grid.add_column(
                self.text("\n".join(column.header)),
                justify="left" if column.justify == "left" else "right",
                no_wrap=True,
                overflow="fold",
                vertical="bottom",
            )
        for index, row in enumerate(zip(*(column.cells for column in columns), strict=True)):
            cells = [self.text(cell, _STYLES.get(cell.split(", ")[0], "")) for cell in row]
            grid.add_row(*cells, end_section=index in sections)
        self.console.print(grid)


def print_report(
    console: Console,
    table: Table,
    verdict: Verdict | None,
    excluded: Sequence[Excluded],
    comparison: Comparison | None = None,
    filters: str = "",
) -> None:
    """Print the counts, the table, the verdict and the runs that are not in the table."""
    printer = Printer(console)
    printer.line(count_text(sum(len(row.runs) for row in table.rows), excluded), "bold")
    if filters:
        printer.line(f"{one_line(filters)}.")
    if verdict is not None:
        printer.line()
        print_table(printer, table)
        if comparison is not None:
            print_differences(printer, table, comparison)
        print_verdict(printer, verdict)
    if excluded:
        printer.heading("Runs that are not in the table")
        for run in excluded:
            printer.item(f"{one_line(run.name)} ({run.kind}): {run.reason}")


def print_differences(printer: Printer, table: Table, comparison: Comparison) -> None:
    """Every configuration's difference from the baseline."""
    printer.heading("Differences from the baseline")
    rows = [row for row, _ in comparison.rows]
    keys = [
        _plain_column(one_line(name), [setting_text(row.settings.get(name)) for row in rows])
        for name in table.varying
    ]
    columns = [
        Column(
            tuple(_broken(table.heading(metric), 12)),
            tuple(cells[i].text() for _, cells in comparison.rows),
        )
        for i, metric in enumerate(comparison.metrics)
    ]
    for panel in _fold(keys, columns, printer.console.width):
        printer.grid(panel)
        printer.line()
    printer.line(comparison.legend(), "dim")


def count_text(n_complete: int, excluded: Sequence[Excluded]) -> str:
    """``9 runs: 7 complete, 1 failed, 1 unfinished``."""
    counts = Counter(run.kind for run in excluded)
    total = n_complete + len(excluded)
    parts = [f"{n_complete} complete"]
    parts += [f"{counts[kind]} {words}" for kind, words in _KINDS.items() if counts[kind]]
    return f"{total} run{'' if total == 1 else 's'}: {', '.join(parts)}"


def print_table(printer: Printer, table: Table) -> None:
    """The telling metrics, in the first layout that fits: wide, turned on its side, or folded."""
    width = printer.console.width
    metrics = table.telling()
    keys = [
        _plain_column(one_line(name), [setting_text(row.settings.get(name)) for row in table.rows])
        for name in table.varying
    ]
    keys.append(_plain_column("n", [str(len(row.runs)) for row in table.rows]))
    columns = [
        _metric_column(
            metric, table.units[metric], [table.parts(row, metric) for row in table.rows]
        )
        for metric in metrics
    ]
    turned = _turned(table, metrics)
    if _total([*keys, *columns]) <= width:
        printer.grid([*keys, *columns])
    elif _total(turned) <= width:
        printer.grid(turned)
    else:
        for panel in _fold(keys, columns, width):
            printer.grid(panel)
            printer.line()
    printer.line(table.legend(), "dim")
    if table.constant:
        printer.line(f"Constant: {settings_text(table.constant)}.", "dim")
    if provenance := provenance_text([run for row in table.rows for run in row.runs]):
        printer.line(f"Measured with {provenance}.", "dim")
    for reason in table.missing:
        printer.line(f"{reason}.", "dim")


def _total(columns: Sequence[Column]) -> int:
    return sum(column.width + _GAP for column in columns) - _GAP


def _plain_column(name: str, cells: Sequence[str]) -> Column:
    return Column(tuple(_broken(name, max(map(len, cells), default=0))), tuple(cells))


def _metric_column(metric: str, unit: str, parts: Sequence[tuple[str, str, str]]) -> Column:
    """A metric over configurations: decimal points and errors under one another."""
    means, sds = (_aligned([part[i] for part in parts]) for i in range(2))
    wide = max(len(error) for _, _, error in parts)
    cells = [
        mean
        + (f" ± {sd}" if sd.strip() else " " * (len(sd) and len(sd) + 3))
        + (f" ({error})" if error else "").ljust(wide and wide + 3)
        for mean, sd, (_, _, error) in zip(means, sds, parts, strict=True)
    ]
    header = _broken(one_line(metric), max(map(len, cells)))
    return Column((*header, f"[{unit}]" if unit not in ("", "1") else ""), tuple(cells))


def _aligned(texts: Sequence[str]) -> list[str]:
    """Texts of numbers padded to one width, decimal points under one another."""
    split = [text.partition(".") for text in texts]
    left = max(len(whole) for whole, _, _ in split)
    right = max(len(point + decimals) for _, point, decimals in split)
    return [w.rjust(left) + (p + d).ljust(right) for w, p, d in split]


def _broken(name: str, width: int) -> list[str]:
    """A name over several lines, broken after underscores and dots, at least ``width`` wide."""
    lines = [""]
    for piece in name.replace("_", "_\n").replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(piece) > max(width, 10):
            lines.append("")
        lines[-1] += piece
    return lines


def _turned(table: Table, metrics: Sequence[str]) -> list[Column]:
    """Configurations side by side, one line a metric: for few configurations."""
    names = tuple(one_line(table.heading(metric)) for metric in metrics)
    columns = [Column((*map(one_line, table.varying), "n"), names, "left")]
    for row in table.rows:
        parts = [table.parts(row, metric) for metric in metrics]
        wide = [max(len(part[i]) for part in parts) for i in range(3)]
        cells = [
            mean.rjust(wide[0])
            + (f" ± {sd.ljust(wide[1])}" if sd else " " * (wide[1] and wide[1] + 3))
            + (f" ({error})" if error else "").ljust(wide[2] and wide[2] + 3)
            for mean, sd, error in parts
        ]
        width = max(map(len, cells))
        keys = [setting_text(row.settings.get(name)) for name in table.varying]
        head = [key.rjust(wide[0]).ljust(width) for key in (*keys, str(len(row.runs)))]
        columns.append(Column(tuple(head), tuple(cells)))
    return columns


def _fold(keys: Sequence[Column], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Panels of columns that fit the width, each led by the settings."""
    panels: list[list[Column]] = [[]]
    for column in columns:
        if panels[-1] and _total([*keys, *panels[-1], column]) > width:
            panels.append([])
        panels[-1].append(column)
    return [[*keys, *panel] for panel in panels]


def print_verdict(printer: Printer, verdict: Verdict) -> None:
    """The bottom line, then each claim with its outcomes and what weakens them."""
    printer.heading("Verdict")
    printer.line(" ".join(verdict.bottom_line))
    used: dict[str, None] = {}
    for n, claim in enumerate(verdict.claims, start=1):
        printer.heading(f"Claim {n}: {claim.claim}")
        for factor in claim.factors:
            printer.line()
            _print_factor(printer, factor)
            used |= {o.trend.test: None for o in factor.outcomes if o.trend is not None}
        if claim.unanswered:
            printer.line()
            printer.line(claim.unanswered)
    tests = [f"{name}: {TESTS[name]}" for name in used if name in TESTS]
    if any(name in BLOCK_TESTS for name in used):
        tests.append(f"q: {FALSE_DISCOVERY}")
    if tests:
        printer.line()
        printer.line("Tests. " + ". ".join(tests) + ".", "dim")


def _print_factor(printer: Printer, verdict: FactorVerdict) -> None:
    levels = ", ".join(setting_text(level) for level in verdict.levels)
    seeds = f"{len(verdict.seeds)} seed{'s' if len(verdict.seeds) > 1 else ''}"
    blocks = f"{verdict.n_blocks} block{'s' if verdict.n_blocks > 1 else ''}"
    printer.line(f"{verdict.factor} = {levels} ({blocks}, {seeds})", "bold")
    names = Column(("metric",), tuple(outcome.metric for outcome in verdict.outcomes), "left")
    for panel in _fold([names], _outcome_columns(verdict.outcomes), printer.console.width):
        printer.grid(panel, _view_ends(verdict.outcomes))
    if verdict.strata:
        printer.line()
        printer.line(f"{verdict.factor} by latent_dim (unclear: no clear change)", "bold")
        columns = [
            Column((setting_text(dim),), tuple(SHORT[o.answer] for o in outcomes), "left")
            for dim, outcomes in verdict.strata.items()
        ]
        for panel in _fold([names], columns, printer.console.width):
            printer.grid(panel, _view_ends(verdict.outcomes))
            printer.line()
    for note in verdict.notes:
        printer.item(note)


def _view_ends(outcomes: Sequence[Outcome]) -> tuple[int, ...]:
    return tuple(i for i, (a, b) in enumerate(pairwise(outcomes)) if a.view != b.view)


def _outcome_columns(outcomes: Sequence[Outcome]) -> list[Column]:
    """Answer, effect and test of every outcome; blocks too where metrics differ in them."""
    blocks = [str(outcome.trend.n_blocks) if outcome.trend else "0" for outcome in outcomes]
    columns = [
        Column(("answer",), tuple(outcome.answer_text() for outcome in outcomes), "left"),
        Column(("first → last", "[nats]"), tuple(outcome.effect_text() for outcome in outcomes)),
        Column(("test",), tuple(outcome.test_text() for outcome in outcomes), "left"),
    ]
    if any(outcome.q_value is not None for outcome in outcomes):
        columns.append(
            Column(("q",), tuple(o.q_text().removeprefix("q") for o in outcomes), "left")
        )
    if per := next((o.effect.per for o in outcomes if o.effect), ""):
        changes = (o.effect.change_text() if o.effect else "" for o in outcomes)
        columns.append(Column((f"change per {per}", "[nats, 95% CI over seeds]"), tuple(changes)))
    if len(set(blocks)) > 1:
        columns.append(Column(("blocks",), tuple(blocks)))
    return columns
