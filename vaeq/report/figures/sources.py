"""Which runs stand for the others in a figure, and the arrays they left beside their record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vaeq.errors import one_line
from vaeq.files.checksum import DamagedFile
from vaeq.files.foreign import require_regular
from vaeq.report.figures.drawing import FigureError, Picture
from vaeq.report.runs import Run
from vaeq.report.table import Table
from vaeq.runs.record import PICTURES, SAMPLES, read_listed
from vaeq.runs.schema import is_number

Array = npt.NDArray[np.float32]

MOST_RUNS = 3
# What these files may hold, whoever wrote them: ten thousand samples of the largest network, more
# pictures than a page shows, classes whose names still find a place in the plane.
_LARGEST_FILE = 2**28
_LARGEST_CODE = 1e9
_MOST_CLASSES = 100
_MOST_PICTURES = 4096
_SAMPLED = ("prior", "aggregated", "gmm", "scaled")
_PICTURES = (*_SAMPLED, "plane", "originals", "reconstructions", "interpolations")


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
    where = f"{SAMPLES} of {run.name}"
    arrays, _ = _read(run, SAMPLES, where, ("z", "label"))
    z, label = arrays.get("z"), arrays.get("label")
    if z is None or z.ndim != 2 or z.shape[0] < 2 or z.shape[1] != run.settings["latent_dim"]:
        raise FigureError(f"{where} holds no array z of shape (n, latent_dim)")
    if (
        not np.issubdtype(z.dtype, np.floating)
        or not (np.abs(z.astype(float)) < _LARGEST_CODE).all()
    ):
        raise FigureError(f"z in {where} holds numbers that are not finite")
    if label is None:
        return Samples(z.astype(np.float32), None)
    if label.shape != z.shape[:1] or label.dtype.kind not in "iu":
        raise FigureError(f"label in {where} is not one integer for each z")
    if len(np.unique(label)) > _MOST_CLASSES:
        raise FigureError(f"label in {where} has more than {_MOST_CLASSES} classes")
    return Samples(z.astype(np.float32), label.astype(np.int64))


def read_pictures(run: Run) -> tuple[dict[str, Picture], int]:
    """Pictures by name, (n, h, w) or (n, h, w, 3), and the steps of an interpolation, or ten.

    FigureError if there are none that can be used.
    """
    where = f"{PICTURES} of {run.name}"
    arrays, metadata = _read(run, PICTURES, where, _PICTURES)
    found = {
        name: np.asarray(array, dtype=np.uint8)
        for name, array in arrays.items()
        if (array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3))
        and array.dtype == np.uint8
        and array.size
    }
    if not found:
        raise FigureError(f"{where} holds no pictures")
    if max(len(array) for array in found.values()) > _MOST_PICTURES:
        raise FigureError(f"{where} holds more than {_MOST_PICTURES} pictures of a kind")
    if len({array.shape[1:] for array in found.values()}) > 1:
        raise FigureError(f"{where} holds pictures of several sizes")
    text = metadata.get("interpolation_steps", "")
    return found, int(text) if text.isdecimal() and 0 < len(text) < 5 and int(text) else 10


def _read(
    run: Run, name: str, where: str, names: Sequence[str]
) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, str]]:
    """Those arrays that are wanted of a file that the run's record lists, and its metadata.

    DamagedFile if it is another file.
    """
    from safetensors import safe_open

    path = run.directory / name
    try:
        if require_regular(path) > _LARGEST_FILE:
            raise FigureError(f"{where} is larger than {_LARGEST_FILE} bytes")
        read_listed(run.directory, name, run.files)
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
            return arrays, dict(file.metadata() or {})
    except FigureError:
        raise
    except FileNotFoundError:
        raise FigureError(f"there is no {where}") from None
    except DamagedFile as error:
        raise DamagedFile(one_line(str(error))) from None
    # NumPy's errors too: a dtype or a shape that it does not have.
    except Exception as error:
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
    if not all(map(is_number, values)):
        raise FigureError("a list of numbers holds something else")
    return [float(x) for x in values]


def kl_by_dimension(run: Run) -> list[float]:
    """KL(q_N,j ‖ N(0, 1)) for every dimension j."""
    dim = run.settings["latent_dim"]
    try:
        return numbers(run.per_dimension.get("kl"), dim if isinstance(dim, int) else None)
    except FigureError:
        raise FigureError(f"the record of {run.name} lacks per_dimension.kl") from None
