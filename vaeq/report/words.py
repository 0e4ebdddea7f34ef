"""Numbers and names as text: digits that fit the error, names that cannot act on a terminal."""

from __future__ import annotations

import math

DASH = "—"
MISSING = "n/a"

# What a terminal without UTF-8 can show instead.
ASCII = str.maketrans(
    {
        "±": "+/-",
        "—": "-",
        "–": "-",
        "−": "-",
        "→": "->",
        "×": "x",
        "‖": "||",
        "Σ": "sum",
        "σ": "sigma",
        "θ": "theta",
        "²": "^2",
        "≤": "<=",
        "≥": ">=",
        "…": "...",
        "↓": "v",
        "↑": "^",
    }
)


def number(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent where that is readable.

    >>> [number(x) for x in (0.00412, 5.5, 131.27, 0.0, 1.2e-7)]
    ['0.00412', '5.50', '131', '0', '1.20e-07']
    """
    if value == 0:
        return "0"
    if not 1e-5 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{_decimals(value, digits)}f}"


def _decimals(scale: float, digits: int) -> int:
    """Decimal places that show so many significant digits of a number of this size."""
    exponent = math.floor(math.log10(abs(scale)))
    # 0.0996 rounds up to 0.100 at two digits: the rounded number decides.
    exponent = math.floor(math.log10(float(f"{abs(scale):.{digits - 1}e}"))) or exponent
    return max(0, digits - 1 - exponent)


def measured(mean: float, sd: float | None, mc_error: float | None) -> tuple[str, str, str]:
    """Mean, sd over seeds and Monte Carlo error as text, to two digits of the larger error.

    The sd is a dash where one seed leaves it undefined. The Monte Carlo error is empty where the
    quantity is computed without sampling, and a question mark where the record has none.
    """
    largest = max(sd or 0.0, mc_error or 0.0)
    if largest > 0 and 1e-5 <= max(abs(mean), largest) < 1e7:
        places = min(_decimals(largest, 2), 8)
        mean_text = f"{mean:.{places}f}"
    else:
        places = None
        mean_text = f"{mean:.0f}" if mean == int(mean) and abs(mean) < 1e7 else number(mean, 4)
    return (
        mean_text,
        _error(sd, places, DASH),
        "" if mc_error == 0 else _error(mc_error, places, "?"),
    )


def _error(error: float | None, places: int | None, unknown: str) -> str:
    if error is None:
        return unknown
    if error == 0:
        return "0"
    if places is None or error < 0.95 * 10.0**-places:
        return number(error, 1)
    return f"{error:.{places}f}"
