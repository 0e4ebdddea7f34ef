"""Which runs stand for the others in a figure, and the arrays they left beside their record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vaeq.checksum import DamagedFile
from vaeq.errors import one_line
from vaeq.record import PICTURES, SAMPLES, read_listed
from vaeq.report.figures.drawing import FigureError, Picture
from vaeq.report.runs import Run
from vaeq.report.table import Table

Array = npt.NDArray[np.float32]

MOST_RUNS = 3


@dataclass(frozen=True)
class Samples:
    """Samples of q(z|x) of training images, one an image, with the images' labels if known."""

    z: Array  # (n, D)
    label: npt.NDArray[np.int64] | None  # (n,)


def by_dimension(table: Table) -> dict[int, list[Run]]:
    """The runs of every latent_dim, in the table's order and by seed."""
    found: dict[int, list[Run]] = {}
    for row in table.rows:
        if isinstance(dim := row.settings["latent_dim"], int):
            found.setdefault(dim, []).extend(row.runs)
    return dict(sorted(found.items()))


def few(items: Sequence[Run], most: int = MOST_RUNS) -> list[Run]:
    """At most so many, evenly spread from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def run_words(run: Run) -> str:
    """latent_dim, encoder and seed of a run."""
    words = [f"latent_dim={run.settings['latent_dim']}"]
    depth, width = run.settings.get("encoder_depth"), run.settings.get("encoder_width")
    if isinstance(depth, int) and isinstance(width, int):
        words.append(f"encoder {depth} × {width}")
    return ", ".join([*words, f"seed {run.seed}"])


def runs_words(runs: Sequence[Run]) -> str:
    """Which runs are shown: one for each latent_dim."""
    if len(runs) == 1:
        return run_words(runs[0])
    same = {run_words(run).partition(", ")[2] for run in runs}
    dims = ", ".join(str(run.settings["latent_dim"]) for run in runs)
    rest = f", {same.pop()}" if len(same) == 1 else ", the first run of each"
    return f"latent_dim={dims}{rest}"


def read_samples(run: Run) -> Samples:
    """The samples a run left behind; FigureError if there are none that can be used."""
    where = f"{SAMPLES} of {one_line(run.name)}"
    arrays = _read(run, SAMPLES, where)
    z, label = arrays.get("z"), arrays.get("label")
    if z is None or z.ndim != 2 or z.shape[0] < 2 or z.shape[1] != run.settings["latent_dim"]:
        raise FigureError(f"{where} holds no array z of shape (n, latent_dim)")
    if not np.issubdtype(z.dtype, np.floating) or not np.isfinite(z).all():
        raise FigureError(f"z in {where} holds numbers that are not finite")
    if label is not None and (label.shape != z.shape[:1] or label.dtype.kind not in "iu"):
        raise FigureError(f"label in {where} is not one integer for each z")
    return Samples(z.astype(np.float32), None if label is None else label.astype(np.int64))


def read_pictures(run: Run) -> dict[str, npt.NDArray[np.uint8]]:
    """Pictures by name, (n, h, w) or (n, h, w, 3); FigureError if none can be used."""
    where = f"{PICTURES} of {one_line(run.name)}"
    arrays = _read(run, PICTURES, where)
    found = {
        name: np.asarray(array, dtype=np.uint8)
        for name, array in arrays.items()
        if (array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3))
        and array.dtype == np.uint8
        and array.size
    }
    if not found:
        raise FigureError(f"{where} holds no pictures")
    return found


def interpolation_steps(run: Run, n: int) -> int:
    """How many of the n pictures make one interpolation; ten where the file does not say."""
    from safetensors import SafetensorError, safe_open

    text = ""
    try:
        with safe_open(run.directory / PICTURES, framework="numpy") as file:
            text = (file.metadata() or {}).get("interpolation_steps", "")
    except (OSError, SafetensorError):
        pass
    steps = int(text) if text.isdecimal() and int(text) > 0 else 10
    return steps if n % steps == 0 else n


def _read(run: Run, name: str, where: str) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of a file that the run's record lists; DamagedFile if it is another."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(read_listed(run.directory, name, run.files)))
    except FileNotFoundError:
        raise FigureError(f"there is no {where}") from None
    except DamagedFile as error:
        raise DamagedFile(one_line(str(error))) from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FigureError(f"{where} cannot be read ({one_line(str(error), 80)})") from None


def montage(pictures: Picture, columns: int, gap: int = 1) -> Picture:
    """(n, h, w[, 3]) pictures as one, row by row, a grey line between them."""
    n, height, width, *colours = pictures.shape
    rows = math.ceil(n / columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *colours)
    sheet = np.full(shape, 96, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def numbers(values: object, n: int | None = None) -> list[float]:
    """A list of finite numbers, of length n where given; FigureError if it is none."""
    if not isinstance(values, list) or not values or (n is not None and len(values) != n):
        raise FigureError("a list of numbers is missing or of another length")
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in values):
        raise FigureError("a list of numbers holds something else")
    return [float(x) for x in values]


def kl_by_dimension(run: Run) -> list[float]:
    """KL(q_N,j ‖ N(0, 1)) for every dimension j."""
    dim = run.settings["latent_dim"]
    try:
        return numbers(run.per_dimension.get("kl"), dim if isinstance(dim, int) else None)
    except FigureError:
        raise FigureError(f"the record of {one_line(run.name)} lacks per_dimension.kl") from None
