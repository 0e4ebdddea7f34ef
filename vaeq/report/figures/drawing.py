"""A drawing is rows of panels with a caption: one SVG a panel for the page, one PNG and PDF in all.

A page of any width then lays the panels out itself, and their text stays readable on a phone.
Neutral colours of the SVG become the page's CSS variables, so that a drawing follows its theme.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vaeq.report.figures.palette import CSS, GRID, INK, MUTED, PAPER, literal

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = npt.NDArray[np.uint8]

# Inches. Titles of a file stand above its panels; a panel's own stands in its margin.
_HEAD, _PANEL_HEAD, _RIGHT, _BOTTOM = 0.72, 0.3, 0.14, 0.5
_RASTER_DPI = 130


class FigureError(Exception):
    """These runs do not hold what a figure needs."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes, or one picture.

    Args:
        title: a few words above it.
        alt: what a reader who cannot see it must know.
        draw: draws into axes of ``width`` × ``height`` inches, margins included.
        left: inches for the labels of the y axis.
        top: inches for a legend above the axes, ``legend_room``.
        picture: (h, w) grey levels or (h, w, 3) colours, shown as they are in place of axes.
    """

    title: str
    alt: str
    draw: Callable[[Axes], None] | None = None
    width: float = 4.4
    height: float = 3.1
    left: float = 0.62
    top: float = 0.1
    picture: Picture | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure: its file name, and all that is said about it.

    ``caption`` says what to read in it, ``caveat`` what would mislead; ``source`` which runs.
    """

    name: str
    title: str
    source: str
    caption: str
    caveat: str
    rows: tuple[tuple[Panel, ...], ...]


def svg(panel: Panel, salt: str) -> str:
    """A panel as inline markup; ``salt`` keeps its ids apart from those of other panels."""
    if panel.picture is not None:
        data = base64.b64encode(_png_of(panel.picture)).decode()
        height, width = panel.picture.shape[:2]
        return (
            f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
            f'alt="{escape(panel.alt)}">'
        )
    with style(salt):
        figure = _figure(panel.width, panel.height)
        _place(figure, panel, 0, 0, panel.width, panel.height)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline(stream.getvalue(), panel.alt)


def files(drawing: Drawing, kinds: Sequence[str] = ("png", "pdf")) -> dict[str, bytes]:
    """The whole drawing as PNG and PDF, by suffix; equal bytes for equal numbers."""
    width = max(sum(panel.width for panel in row) for row in drawing.rows)
    heights = [max(panel.height for panel in row) + _PANEL_HEAD for row in drawing.rows]
    height = _HEAD + sum(heights)
    with style(drawing.name):
        figure = _figure(width, height)
        figure.text(0.14 / width, 1 - 0.12 / height, drawing.title, size=13, weight="bold",
                    va="top")  # fmt: skip
        figure.text(0.14 / width, 1 - 0.42 / height, literal(drawing.source), color=MUTED,
                    size=9.5, va="top")  # fmt: skip
        top = _HEAD
        for row, row_height in zip(drawing.rows, heights, strict=True):
            left = 0.0
            for panel in row:
                _place(figure, panel, left, top + _PANEL_HEAD, width, height)
                figure.text((left + 0.14) / width, 1 - (top + 0.14) / height, panel.title,
                            size=10, va="top")  # fmt: skip
                left += panel.width
            top += row_height
        unnamed: dict[str, dict[str, Any]] = {
            "png": {"Software": None},
            "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        }
        return {kind: _save(figure, kind, unnamed[kind]) for kind in kinds}


def style(salt: str) -> AbstractContextManager[None]:
    """Settings of our own, whatever the user's matplotlibrc says."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "text.usetex": False,
            "text.color": INK,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 10,
            "mathtext.fontset": "dejavusans",
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#888888",
            "axes.labelcolor": INK,
            "axes.unicode_minus": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "figure.facecolor": PAPER,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "legend.handlelength": 1.5,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
        }
    )


def legend_room(n: int, columns: int = 2) -> float:
    """Inches above the axes that a legend of n entries takes."""
    return 0.14 + 0.185 * -(-n // columns)


def legend_above(axes: Axes, columns: int = 2, handles: Sequence[Artist] | None = None) -> None:
    """A legend that cannot hide what is drawn."""
    more = {} if handles is None else {"handles": handles}
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.985),
        ncols=columns,
        columnspacing=1.2,
        borderaxespad=0.1,
        labelspacing=0.3,
        **more,
    )


def _figure(width: float, height: float) -> Figure:
    """A figure with no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_RASTER_DPI)


def _place(
    figure: Figure, panel: Panel, left: float, top: float, width: float, height: float
) -> None:
    """Draw a panel whose upper left corner is so many inches from that of the figure."""
    bare = panel.picture is not None
    margin, below = (0.14, 0.1) if bare else (panel.left, _BOTTOM)
    axes = figure.add_axes(
        (
            (left + margin) / width,
            1 - (top + panel.height - below) / height,
            (panel.width - margin - _RIGHT) / width,
            (panel.height - below - panel.top) / height,
        )
    )
    if panel.picture is not None:
        axes.imshow(panel.picture, cmap="gray", vmin=0, vmax=255, interpolation="none")
        axes.set_axis_off()
        axes.set_anchor("NW")
    elif panel.draw is not None:
        panel.draw(axes)
        _few_ticks(axes)
    # Without it matplotlib measures every label to find a place for a title that is not there.
    axes.set_title("", y=1.0)


def _few_ticks(axes: Axes) -> None:
    """Every label is laid out three times over, and four or five on an axis are enough to read."""
    from matplotlib.ticker import AutoLocator, MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        if isinstance(axis.get_major_locator(), AutoLocator):
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def _save(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    # A tenth larger than at the default level, and twice as fast.
    quick: dict[str, Any] = {"pil_kwargs": {"compress_level": 3}} if kind == "png" else {}
    figure.savefig(stream, format=kind, metadata=metadata, **quick)
    return stream.getvalue()


def _png_of(picture: Picture) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _inline(document: str, alt: str) -> str:
    """The svg element alone, scalable, named, in the page's colours, without repeated ids."""
    markup = document[document.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>\s*", "", markup, flags=re.DOTALL)
    # Groups are numbered afresh in every drawing; only clips and markers are referred to.
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)
    markup = re.sub(r"<g>\s*</g>\s*", "", markup)
    # Two decimals of a point are enough for a line, but tick labels keep theirs.
    markup = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), markup)
    for colour, variable in CSS.items():
        markup = markup.replace(colour, variable)
    box = re.search(r'viewBox="([^"]*)"', markup)
    width = re.search(r'width="([\d.]+)pt"', markup)
    head = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(alt)}"'
    head += f' style="max-width:{float(width[1]) * 1.5 if width else 400:.0f}px"'
    head += ' xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">'
    return re.sub(r"<svg[^>]*>", lambda _: head, markup, count=1).strip()
