"""What the decoder makes of codes: samples by source, the decoded plane, reconstructions."""

from __future__ import annotations

from vaeq.report.figures.drawing import Drawing, FigureError, Panel, Picture
from vaeq.report.figures.sources import (
    by_dimension,
    few,
    montage,
    read_pictures,
    run_words,
    runs_words,
)
from vaeq.report.runs import Run
from vaeq.report.table import Table
from vaeq.runs.record import PICTURES

SOURCES = {
    "prior": "N(0, I), the prior",
    "aggregated": "aggregated posterior q(z)",
    "gmm": "Gaussian mixture fitted to the codes",
    "scaled": "N(0, s²I), s fitted",
}
# Of each source so many pictures, eight by eight.
SHOWN = 64
MOST_RUNS = 3


def samples(table: Table) -> Drawing:
    """Decoded samples by source, a row for each latent_dim."""
    rows = []
    runs = []
    for run, pictures, _ in _with_pictures(table):
        panels = [
            _sheet(
                f"latent_dim={run.settings['latent_dim']}: {words}",
                f"{min(SHOWN, len(pictures[name]))} decoded samples from {words}, "
                f"{run_words(run)}.",
                montage(pictures[name][:SHOWN], 8),
            )
            for name, words in SOURCES.items()
            if name in pictures
        ]
        if panels:
            rows.append(tuple(panels))
            runs.append(run)
    if not rows:
        raise FigureError("no pictures.safetensors holds samples")
    return Drawing(
        "samples",
        "Samples by where their codes come from",
        runs_words(runs),
        "All are decoded by the same network; only the source of z differs. Where the prior's "
        "samples look worse than the aggregated posterior's, the mismatch is what costs.",
        "A few dozen pictures show a failure and not a rate: the table of costs has the numbers.",
        tuple(rows),
    )


def decoded_plane(table: Table) -> Drawing:
    """The decoded grid of the plane's quantiles, and what the decoder does between images."""
    reason, rows, shown = "no run has pictures of the plane, of reconstructions or between", [], []
    for run, pictures, said in _with_pictures(table):
        panels = []
        if "plane" in pictures and len(pictures["plane"]) > 1:
            side = round(len(pictures["plane"]) ** 0.5)
            panels.append(
                _sheet(
                    "The decoded plane",
                    f"{side} by {side} decoded codes over the plane, {run_words(run)}.",
                    montage(pictures["plane"], side, 0),
                    3.6,
                )
            )
        if {"originals", "reconstructions"} <= set(pictures):
            pairs = montage(_interleaved(pictures["originals"], pictures["reconstructions"]), 8)
            panels.append(
                _sheet(
                    f"latent_dim={run.settings['latent_dim']}: held-out images, below each row "
                    "its reconstructions",
                    f"Held-out images and their reconstructions, {run_words(run)}.",
                    pairs,
                    3.6,
                )
            )
        if "interpolations" in pictures:
            between = pictures["interpolations"]
            steps = said if len(between) % said == 0 else len(between)
            panels.append(
                _sheet(
                    f"latent_dim={run.settings['latent_dim']}: from one image to another",
                    f"{len(between) // steps} interpolations in {steps} steps, {run_words(run)}.",
                    montage(between[: 8 * steps], steps),
                    3.6,
                )
            )
        if panels:
            rows.append(tuple(panels))
            shown.append(run)
    if not rows:
        raise FigureError(reason)
    return Drawing(
        "decoder",
        "What the decoder makes of codes: the plane, reconstructions, interpolations",
        runs_words(shown),
        "Interpolations run straight through the latent space: blurred pictures on the way are "
        "where the path crosses a hole.",
        "Reconstructions pass through the posterior of their own image and say nothing of the "
        "prior.",
        tuple(rows),
    )


def _with_pictures(table: Table) -> list[tuple[Run, dict[str, Picture], int]]:
    """For a few latent_dims the first run with pictures."""
    found, reason = [], "there are no runs"
    for runs in by_dimension(table).values():
        for run in runs:
            if (run.directory / PICTURES).is_file():
                found.append(run)
                break
        else:
            reason = f"there is no pictures.safetensors of {runs[0].name}"
    pairs = []
    for run in few(found, MOST_RUNS):
        try:
            pairs.append((run, *read_pictures(run)))
        except FigureError as error:
            reason = str(error)
    if not pairs:
        raise FigureError(reason)
    return pairs


def _interleaved(originals: Picture, reconstructions: Picture, columns: int = 8) -> Picture:
    """Eight originals, their reconstructions, the next eight, ...: at most four such pairs."""
    import numpy as np

    n = min(len(originals), len(reconstructions), 4 * columns) // columns * columns
    n = n or min(len(originals), len(reconstructions))
    step = min(columns, n)
    parts = []
    for start in range(0, n, step):
        parts += [originals[start : start + step], reconstructions[start : start + step]]
    return np.concatenate(parts)


def _sheet(title: str, alt: str, picture: Picture, width: float = 3.0) -> Panel:
    height = width * picture.shape[0] / picture.shape[1]
    return Panel(title, alt, width=width, height=height, picture=picture)
