"""The pictures: every drawing these runs allow, and why the others are missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vaeq.files.checksum import DamagedFile
from vaeq.report.figures import brackets, codes, curves, heat_map, null_bands, pictures
from vaeq.report.figures.divergence import divergence
from vaeq.report.figures.drawing import Drawing, FigureError, Panel, files, svg
from vaeq.report.table import AXES, Table

__all__ = ["DRAWINGS", "Drawing", "FigureError", "Panel", "draw", "files", "svg"]

# In the order of the report; the name of each is that of its files.
DRAWINGS: dict[str, Callable[[Table], Drawing]] = {
    **{f"divergence_by_{factor}": partial(divergence, factor=factor) for factor in AXES},
    "heat_map": heat_map.heat_map,
    "brackets": brackets.brackets,
    "two_sample": null_bands.null_bands,
    "n_curve": curves.n_curve,
    "latent_plane": codes.latent_plane,
    "patches": codes.patches,
    "quilt": curves.quilt,
    "marginals": codes.marginals,
    "qq": codes.qq,
    "uniform": curves.uniform,
    "dimensions": curves.dimensions,
    "training": curves.training,
    "samples": pictures.samples,
    "decoder": pictures.decoded_plane,
}


def draw(table: Table) -> tuple[list[Drawing], dict[str, str]]:
    """The drawings these runs allow, and by name the reason why another is missing.

    Where a file of a run is damaged no other run takes its place: the figure is missing, and says
    which file it is.
    """
    drawings, left_out = [], {}
    for name, make in DRAWINGS.items():
        try:
            drawings.append(make(table))
        except (FigureError, DamagedFile) as reason:
            left_out[name] = str(reason)
    return drawings, left_out
