"""Colours told apart on white and on near-black paper, and text that is drawn literally."""

from __future__ import annotations

from vaeq.errors import one_line

# Petroff (2021), "Accessible color sequences for data visualization", the ten-colour sequence.
TEN_COLOURS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
CODES = "#3f8fd8"
INK, MUTED, GRID, PAPER = "#222222", "#555555", "#e6e6e6", "#ffffff"
RINGS = ("#dfdfdf", "#ebebeb", "#f4f4f4")
# In the page these follow its theme; the PNG and PDF files keep them.
CSS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
} | {ring: f"var(--ring{i})" for i, ring in enumerate(RINGS, start=1)}

# Of one lightness, so that neither end of an ordered sequence fades into either paper.
_STOPS = ((63, 143, 216), (122, 116, 214), (190, 94, 180), (219, 92, 104), (205, 125, 40))


def sequence(n: int) -> list[str]:
    """n colours in order, from blue over purple to orange."""
    if n == 1:
        return [CODES]
    colours = []
    for i in range(n):
        at = i / (n - 1) * (len(_STOPS) - 1)
        low = min(int(at), len(_STOPS) - 2)
        mixed = (
            round(a + (at - low) * (b - a))
            for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True)
        )
        colours.append("#" + "".join(f"{part:02x}" for part in mixed))
    return colours


def literal(text: str) -> str:
    """Text from a file without what matplotlib would typeset, or has no glyph for."""
    kept = "".join(c if c.isascii() or c in "×−–→≤≥‖Σσ·" else "?" for c in one_line(text, 160))
    return kept.replace("$", r"\$")
