"""Drawings to markup and files, on as many cores as there are: it is most of a report's time."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from vaeq.report.figures.drawing import Drawing, files, svg

MOST_WORKERS = 4
# Of a forked worker, which inherits them: panels hold functions, which do not travel by themselves.
_inherited: list[Drawing] = []


@dataclass(frozen=True)
class Rendered:
    """A drawing with the markup of its panels, row by row, and its files by suffix."""

    drawing: Drawing
    panels: tuple[tuple[str, ...], ...]
    files: dict[str, bytes]


def render(drawings: Sequence[Drawing]) -> list[Rendered]:
    """Every drawing in every format; the same bytes whatever the number of workers."""
    workers = min(MOST_WORKERS, _cores(), len(drawings))
    if workers < 2 or sys.platform != "linux":
        parts = [_parts(drawing) for drawing in drawings]
    else:
        parts = _forked(drawings, workers)
    return [
        Rendered(drawing, panels, whole)
        for drawing, (panels, whole) in zip(drawings, parts, strict=True)
    ]


Parts = tuple[tuple[tuple[str, ...], ...], dict[str, bytes]]


def _parts(drawing: Drawing) -> Parts:
    panels = tuple(
        tuple(svg(panel, f"{drawing.name}-{i}-{j}") for j, panel in enumerate(row))
        for i, row in enumerate(drawing.rows)
    )
    return panels, files(drawing)


def _forked(drawings: Sequence[Drawing], workers: int) -> list[Parts]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    import matplotlib.backends.backend_pdf
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401  (imported once, before the fork)

    _inherited[:] = drawings
    # A thousand records are millions of objects: neither collected again nor copied by a fork.
    gc.freeze()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork beside threads; those of OpenBLAS mind their own forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            context = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(workers, context) as pool:
                return list(pool.map(_inherited_parts, range(len(drawings))))
    finally:
        gc.unfreeze()
        _inherited.clear()


def _inherited_parts(index: int) -> Parts:
    gc.disable()  # a worker lives for a second, and figures are all cycles
    return _parts(_inherited[index])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
