"""Image sets in files other than the packaged MNIST: where they lie, what they may hold, their MD5.

    fashion_mnist kmnist emnist   the four IDX files, plain or .gz, in ROOT/FashionMNIST/raw (or
                                  KMNIST, EMNIST), as torchvision keeps them, or in ROOT itself
    idx    FOLDER                 four IDX files of anyone's images, named like MNIST's:
                                  train-images-idx3-ubyte, train-labels-idx1-ubyte,
                                  t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte
    npz    FILE                   train_images, test_images, train_labels, test_labels, or as Keras
                                  names them x_train, x_test, y_train, y_test

Labels may be missing. Images are (N, H, W) or (N, H, W, C), C of 1 or 3, in unsigned bytes or, in a
.npz, floating point in [0, 1]; those are rounded to the 256 grey levels that everything here sees.

No torch in this module: the MD5 of the images is a part of what a run is, and is asked for before
it is known whether anything is left to do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vaeq.errors import InputError, one_line
from vaeq.files.idx import read_idx
from vaeq.files.npy import npz_names, read_npz

# The class of torchvision, which is also its folder.
_FAMILIES = {"fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "emnist": "EMNIST"}
_CACHE = Path("~/.cache/vaeq")
# Of the package dataset-fashion-mnist.
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_CHANNELS = (1, 3)
_NPZ_NAMES = {
    "train_images": ("train_images", "x_train"),
    "train_labels": ("train_labels", "y_train"),
    "test_images": ("test_images", "x_test"),
    "test_labels": ("test_labels", "y_test"),
}

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """Checked images in unsigned bytes, and their labels where there are any."""

    train: Bytes  # (N, H, W) or (N, H, W, 3)
    train_labels: Labels | None  # (N,)
    test: Bytes  # (M, H, W) or (M, H, W, 3)
    test_labels: Labels | None  # (M,)

    @cached_property
    def md5(self) -> str:
        """MD5 of shapes and values, in whatever files they came."""
        digest = hashlib.md5(usedforsecurity=False)
        for array in (self.train, self.train_labels, self.test, self.test_labels):
            if array is None:
                digest.update(b"none")
            else:
                digest.update(f"{array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def read_image_set(
    name: str,
    *,
    root: str | None = None,
    download: bool = False,
    split: str | None = None,
    path: str | None = None,
) -> ImageSet:
    """Read and check a set of images.

    Args:
        name: ``fashion_mnist``, ``kmnist``, ``emnist``, ``idx`` or ``npz``.
        root: folder of the first three; None takes ``~/.cache/vaeq``, and for fashion_mnist also
            the folder of Debian's package.
        download: let torchvision fetch what is missing of the first three.
        split: of emnist.
        path: folder of idx, file of npz.

    Raises:
        InputError: a file is missing, damaged or holds something else; images are of a shape or a
            type that is not read, or disagree with each other or with their labels.
    """
    if name == "npz":
        return _read_npz(_given(path, "npz"))
    if name == "idx":
        folder = _given(path, "idx")
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise InputError(
                f"data.path={one_line(str(folder))} {what}; data=idx takes the folder of "
                "train-images-idx3-ubyte and its kin."
            )
        files = _files([folder], "")
        _require(
            files,
            f"data.path={one_line(str(folder))}",
            "; name them as MNIST's, plain or .gz, the labels being optional.",
        )
        return _read_files(files)
    return _read_named(name, root, download, split)


def _given(path: str | None, name: str) -> Path:
    if path is None:
        raise InputError(f"data.path is missing; data={name} needs data.path=...")
    return Path(path).expanduser()


def _read_named(name: str, root: str | None, download: bool, split: str | None) -> ImageSet:
    """A set that torchvision knows, from the files as torchvision or Debian names them."""
    base = Path(root) if root is not None else _CACHE
    base = base.expanduser()
    raw = base / _FAMILIES[name] / "raw"
    folders = [raw, base]
    if name == "fashion_mnist" and root is None:
        folders.append(_DEBIAN)
    prefix = f"emnist-{split}-" if name == "emnist" else ""
    files = _files(folders, prefix)
    if download and len(files) < 4:
        _download(name, base, split, raw)
        files = _files(folders, prefix)
    debian = ", or install Debian's dataset-fashion-mnist" if name == "fashion_mnist" else ""
    _require(
        files,
        f"data={name}: {raw}",
        f"; put the four IDX files there, plain or .gz{debian}, or set data.download=true where "
        "the network allows it.",
        labels=True,
        prefix=prefix,
    )
    found = _read_files(files)
    if name != "emnist":
        return found
    # EMNIST is kept with rows and columns exchanged: shown as it is, every letter lies on its side.
    upright = (np.ascontiguousarray(part.swapaxes(1, 2)) for part in (found.train, found.test))
    train, test = upright
    return ImageSet(train, found.train_labels, test, found.test_labels)


def _download(name: str, root: Path, split: str | None, raw: Path) -> None:
    """Let torchvision put the files where it keeps them."""
    from torchvision import datasets

    more = {"split": split} if name == "emnist" else {}
    try:
        getattr(datasets, _FAMILIES[name])(root, train=True, download=True, **more)
    except (RuntimeError, OSError, EOFError) as error:
        reason = one_line(" ".join(str(error).split()), 160)
        raise InputError(
            f"data={name} could not be downloaded ({reason}); put its four IDX files, plain or "
            f".gz, in {raw}."
        ) from None


def _files(folders: Iterable[Path], prefix: str) -> dict[str, Path]:
    """Those of the four files that there are, from the folder that has most of them."""
    best: dict[str, Path] = {}
    for folder in folders:
        found: dict[str, Path] = {}
        for part, stems in (
            ("train_images", ("train-images",)),
            ("train_labels", ("train-labels",)),
            ("test_images", ("t10k-images", "test-images")),
            ("test_labels", ("t10k-labels", "test-labels")),
        ):
            ranks = (1,) if part.endswith("labels") else (3, 4)
            names = (
                f"{prefix}{stem}{mark}idx{rank}-ubyte{end}"
                for stem in stems
                for rank in ranks
                for mark in "-."
                for end in ("", ".gz")
            )
            path = next((folder / n for n in names if (folder / n).is_file()), None)
            if path is not None:
                found[part] = path
        if len(found) > len(best):
            best = found
    return best


def _require(
    files: dict[str, Path], where: str, remedy: str, *, labels: bool = False, prefix: str = ""
) -> None:
    """Raise InputError for the first file that is needed and not there."""
    names = {"train_images": "train-images-idx3-ubyte", "test_images": "t10k-images-idx3-ubyte"}
    if labels:
        names |= {"train_labels": "train-labels-idx1-ubyte"}
        names |= {"test_labels": "t10k-labels-idx1-ubyte"}
    if prefix:
        names = {part: prefix + name.replace("t10k", "test") for part, name in names.items()}
    for part, name in names.items():
        if part not in files:
            raise InputError(f"{where} has no {name}{remedy}")


def _read_files(files: dict[str, Path]) -> ImageSet:
    arrays = {part: read_idx(path) for part, path in files.items()}
    return _checked(arrays, {part: one_line(str(path)) for part, path in files.items()})


def _read_npz(path: Path) -> ImageSet:
    """The arrays of a .npz, none of them unpickled."""
    text = f"data.path={one_line(str(path))}"
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{text} {what}; data=npz takes a .npz file.")
    names = _npz_names(npz_names(path, text), text)
    arrays = {part: read_npz(path, name, text) for part, name in names.items()}
    return _checked(arrays, {part: f"{name} of {text}" for part, name in names.items()})


def _npz_names(names: Sequence[str], text: str) -> dict[str, str]:
    """What the four arrays are called in this file."""
    found = {}
    for part, candidates in _NPZ_NAMES.items():
        given = [name for name in candidates if name in names]
        if len(given) > 1:
            raise InputError(f"{text} has both {given[0]} and {given[1]}; keep one of them.")
        if given:
            found[part] = given[0]
        elif part.endswith("images"):
            shown = ", ".join(one_line(name, 40) for name in names[:8]) or "nothing"
            raise InputError(f"{text} must hold {candidates[0]} (or {candidates[1]}), got {shown}.")
    return found


def _checked(arrays: dict[str, npt.NDArray[Any]], places: dict[str, str]) -> ImageSet:
    """Images of one shape, and labels that belong to them."""
    images = {part: _images(arrays[part], places[part]) for part in ("train_images", "test_images")}
    train, test = images.values()
    if train.shape[1:] != test.shape[1:]:
        raise InputError(
            f"{places['test_images']} must hold images of {_words(train)} as for training, "
            f"got {_words(test)}."
        )
    labels = {
        part: _labels(arrays[part], places[part], len(images[part.replace("labels", "images")]))
        for part in ("train_labels", "test_labels")
        if part in arrays
    }
    return ImageSet(train, labels.get("train_labels"), test, labels.get("test_labels"))


def _words(images: Bytes) -> str:
    return " x ".join(map(str, images.shape[1:]))


def _images(array: npt.NDArray[Any], place: str) -> Bytes:
    """(N, H, W) or (N, H, W, 3) in unsigned bytes."""
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise InputError(
            f"{place} must have shape (N, H, W) or (N, H, W, C) and hold images, got {array.shape}."
        )
    if array.ndim == 4 and array.shape[3] not in _CHANNELS:
        raise InputError(
            f"{place} must have 1 or 3 channels, the last of (N, H, W, C), got {array.shape}."
        )
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        # NaN compares false.
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"{place} must be in [0, 1] where it is floating point, got {low:g} to {high:g}; "
                "scale it, or save unsigned bytes."
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(
            f"{place} must be unsigned bytes, or floating point in [0, 1], got {array.dtype}; "
            "convert it, e.g. with astype('uint8')."
        )
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    return np.ascontiguousarray(array)


def _labels(array: npt.NDArray[Any], place: str, images: int) -> Labels:
    if array.dtype.kind not in "iu":
        raise InputError(
            f"{place} must be integers, got {array.dtype}; number them or leave it out."
        )
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (images,):
        raise InputError(f"{place} must have shape ({images},), one an image, got {array.shape}.")
    return array.astype(np.int64)
