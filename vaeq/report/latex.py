"""The table in LaTeX for a paper: needs ``\\usepackage{booktabs}`` and nothing else."""

from __future__ import annotations

import re

from vaeq.report.table import Table, setting_text

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "—": "---",
    "−": r"$-$",
    "×": r"$\times$",
    "‖": r"$\|$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "σ": r"$\sigma$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    # After the end of a row TeX takes these for its arguments.
    "[": "{[}",
    "*": "{*}",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def table_latex(table: Table) -> str:
    """A tabular turned on its side: metrics down, configurations across, as fits a page."""
    names = [*table.varying, "n"]
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * len(table.rows)}}}",
        "\\toprule",
    ]
    for name in names:
        cells = [
            str(len(row.runs)) if name == "n" else setting_text(row.settings.get(name))
            for row in table.rows
        ]
        lines.append(_row(name, cells))
    lines.append("\\midrule")
    for metric in table.telling():
        lines.append(_row(table.heading(metric), [table.cell(row, metric) for row in table.rows]))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", f"% {_plain(table.legend())}", ""])


def _row(head: str, cells: list[str]) -> str:
    return " & ".join(map(literal, [head, *cells])) + r" \\"


def literal(text: str) -> str:
    """Text in which TeX finds nothing to act on; characters it may lack become question marks."""
    escaped = re.sub(r".", lambda m: _SPECIAL.get(m[0], m[0]), text, flags=re.DOTALL)
    return escaped.encode("ascii", "replace").decode()


def _plain(text: str) -> str:
    return text.replace("±", "+-").replace("—", "-").encode("ascii", "replace").decode()
