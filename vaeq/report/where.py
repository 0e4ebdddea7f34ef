"""``where=``: a condition on settings and metrics, parsed into a small grammar and never executed.

    latent_dim >= 8 and seed < 3
    activation == 'relu' and not (data.name in ('kmnist', 'fashion_mnist'))
    2 < latent_dim <= 16 or marginal_kl < 1

Python's own parser reads it; only comparisons of columns with constants, ``and``, ``or``, ``not``
and parentheses pass. A comparison with a number that a run does not have is false.
"""

from __future__ import annotations

import ast
import difflib
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from vaeq.errors import InputError, one_line
from vaeq.report.runs import Run, Scalar
from vaeq.report.table import AXES

LONGEST = 1_000
_CONSTANTS: Mapping[str, Scalar] = {"true": True, "false": False, "null": None}
_ORDER: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def filter_runs(runs: Sequence[Run], text: str) -> list[Run]:
    """The runs for which the condition holds, in their order.

    Raises:
        InputError: the condition cannot be read, names no column, compares text with a number, or
            holds for no run.
    """
    tree = _parse(text)
    known = {name: None for run in runs for name in row_of(run)}
    for name in _names(tree):
        if name not in known and name not in _CONSTANTS:
            raise InputError(_unknown(name, list(known)))
    kept = [run for run in runs if _holds(tree, row_of(run))]
    if runs and not kept:
        raise InputError(f"where={_shown(text)} holds for none of {len(runs)} runs.")
    return kept


def row_of(run: Run) -> dict[str, Scalar]:
    """Everything of a run that a condition can name."""
    values: dict[str, Scalar] = {metric: run.value(metric) for metric in run.estimates}
    return values | dict(run.settings) | {"seed": run.seed, "experiment": run.experiment}


def _parse(text: str) -> ast.expr:
    shown = _shown(text)
    if len(text) > LONGEST:
        raise InputError(f"where= has {len(text)} characters; at most {LONGEST} are read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval").body
        _check(tree, shown)
    except InputError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        hint = "compare with ==, not =" if "=" in text else "write latent_dim>=8 and seed<3"
        raise InputError(f"where={shown} is no condition; {hint}.") from None
    return tree


def _check(node: ast.expr, shown: str) -> None:
    """Refuse whatever is no condition."""
    match node:
        case ast.BoolOp(values=values):
            for value in values:
                _check(value, shown)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            _check(operand, shown)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for op, right in zip(ops, comparators, strict=True):
                listed = isinstance(op, ast.In | ast.NotIn)
                if type(op) not in (*_ORDER, ast.Eq, ast.NotEq) and not listed:
                    raise InputError(f"where={shown}: compare with ==, !=, <, <=, >, >= or in.")
                if listed != isinstance(right, ast.Tuple | ast.List):
                    raise InputError(f"where={shown}: in wants a list, as in latent_dim in (2, 8).")
                for value in right.elts if isinstance(right, ast.Tuple | ast.List) else [right]:
                    _check_value(value, shown)
            _check_value(left, shown)
        case _ if _name(node) is not None:
            pass
        case _:
            raise InputError(_refusal(node, shown))


def _check_value(node: ast.expr, shown: str) -> None:
    if _name(node) is None and _constant(node) is _NO_CONSTANT:
        raise InputError(_refusal(node, shown))


def _refusal(node: ast.expr, shown: str) -> str:
    part = one_line(ast.unparse(node), 60)
    return (
        f"where={shown}: {part} is neither a column nor a number nor 'text'; only comparisons, "
        "and, or, not and parentheses are read."
    )


_NO_CONSTANT = object()


def _constant(node: ast.expr) -> object:
    """The value of a number, a text or a negative number; _NO_CONSTANT for anything else."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    return _NO_CONSTANT


def _name(node: ast.AST) -> str | None:
    """``data.name`` for a column, also a dotted one; None for anything else."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.expr() as value, attr=attr):
            head = _name(value)
            return None if head is None else f"{head}.{attr}"
    return None


def _names(node: ast.AST) -> Iterator[str]:
    """Every column that is named; of ``data.name`` the whole and not its parts."""
    name = _name(node)
    if name is not None:
        yield name
        return
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


def _holds(node: ast.expr, row: Mapping[str, Scalar]) -> bool:
    match node:
        case ast.BoolOp(op=op, values=values):
            results = (_holds(value, row) for value in values)
            return all(results) if isinstance(op, ast.And) else any(results)
        case ast.UnaryOp(operand=operand):
            return not _holds(operand, row)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            sides = [left, *comparators]
            return all(
                _compare(op, a, b, row) for op, a, b in zip(ops, sides, sides[1:], strict=False)
            )
    value = _value(node, row)
    if not isinstance(value, bool):
        raise InputError(
            f"where=: {_name(node)} is neither true nor false; compare it with a value."
        )
    return value


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, row: Mapping[str, Scalar]) -> bool:
    a = _value(left, row)
    if isinstance(right, ast.Tuple | ast.List):
        found = any(_alike(left, a, item, _value(item, row)) for item in right.elts)
        return found if isinstance(op, ast.In) else not found
    b = _value(right, row)
    equal = _alike(left, a, right, b)
    if isinstance(op, ast.Eq | ast.NotEq):
        return equal if isinstance(op, ast.Eq) else not equal
    return a is not None and b is not None and _ORDER[type(op)](a, b)


def _alike(left: ast.expr, a: Scalar, right: ast.expr, b: Scalar) -> bool:
    """Whether two values are equal; text never equals a number by accident but is refused."""
    if a is not None and b is not None and isinstance(a, str) != isinstance(b, str):
        column, text = (left, b) if isinstance(b, str) else (right, a)
        name = _name(column) or ast.unparse(column)
        raise InputError(
            f"where=: {name} is a number and {text!r} is text; compare like with like."
        )
    return a == b


def _value(node: ast.expr, row: Mapping[str, Scalar]) -> Scalar:
    name = _name(node)
    if name is None:
        value: Any = _constant(node)
        return value
    # A run of an older version may lack a setting that others have.
    return _CONSTANTS[name] if name in _CONSTANTS and name not in row else row.get(name)


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"where=: {one_line(name, 60)} is no column; {hint}text goes in quotes, and the columns "
        f"are {', '.join(map(one_line, _ordered(known)))}."
    )


def _ordered(known: Iterable[str]) -> list[str]:
    """The axes of the claims first."""
    return sorted(known, key=lambda name: AXES.index(name) if name in AXES else len(AXES))


def _shown(text: str) -> str:
    return f"'{one_line(text, 80)}'"
