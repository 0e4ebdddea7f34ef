"""NumPy files, .npy and .npz, from anybody: arrays of numbers, none larger than its file can hold.

Format: NEP 1, "A simple file format for NumPy arrays", and a zip archive of such files. NumPy's own
loader takes the memory that a header asks for before it looks at the file, and unpacks whatever an
archive holds; here the header is checked first. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from vaeq.errors import InputError, one_line
from vaeq.files.foreign import require_regular

# Floats hardly pack at all, labels to a tenth, sorted ones to a thousandth, and of those a file
# holds few. What grows more than this is made to fill the memory.
_MOST_EXPANSION = 100
_ALWAYS_UNPACKED = 64 * 2**20
LARGEST = 16 * 2**30
_CHUNK = 2**20

T = TypeVar("T")


def read_npy(path: Path, label: str) -> npt.NDArray[Any]:
    """The array of a .npy file.

    Args:
        label: how messages begin, such as ``codes=FILE``.

    Raises:
        InputError: there is no such file, it is damaged, or holds something else than numbers.
    """

    def read() -> npt.NDArray[Any]:
        size = require_regular(path)
        with path.open("rb") as stream:
            return _read(stream, size, label)

    return _explained(read, label)


def npz_names(path: Path, label: str) -> tuple[str, ...]:
    """The names of the arrays in a .npz file, in its order.

    Raises:
        InputError: as for :func:`read_npy`, or two arrays have one name.
    """

    def read() -> tuple[str, ...]:
        require_regular(path)
        with zipfile.ZipFile(path) as archive:
            return tuple(info.filename.removesuffix(".npy") for info in archive.infolist())

    names = _explained(read, label)
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"{label} holds {one_line(twice, 40)} twice; keep one of them.")
    return names


def read_npz(path: Path, name: str, label: str) -> npt.NDArray[Any]:
    """One array of a .npz file, stored or deflated.

    Raises:
        InputError: as for :func:`read_npy`, or it is packed beyond what numbers can be.
    """

    def read() -> npt.NDArray[Any]:
        total = require_regular(path)
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(
                    f"{label} is packed by another method than NumPy's; save it again."
                )
            packed = min(info.compress_size, total)
            if info.file_size > max(_MOST_EXPANSION * packed, _ALWAYS_UNPACKED):
                raise InputError(
                    f"{label} unpacks {one_line(name, 40)} to {info.file_size} bytes, more than "
                    f"{_MOST_EXPANSION} times what it holds; save it uncompressed if that is meant."
                )
            with archive.open(info) as stream:
                return _read(stream, info.file_size, label)

    return _explained(read, label)


def _explained(read: Callable[[], T], label: str) -> T:
    """What ``read`` returns, or one sentence for whatever it raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote, and of old dtypes
            return read()
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{label} is larger than the free memory.") from None
    # NumPy, zipfile and zlib raise a dozen unrelated types on files that are cut short or were
    # never theirs, tokenize.TokenError and zlib.error among them: the file is at fault.
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{label} cannot be read: {error.strerror}.") from None
        raise InputError(
            f"{label} cannot be read: it is truncated, or not what its name says; write it again."
        ) from None


@dataclass(frozen=True)
class NpyRows:
    """A matrix in a .npy file of any size, of which some rows at a time are read.

    Args:
        path: the file.
        label: as for :func:`read_npy`.

    Raises:
        InputError: as for :func:`read_npy`, or it is no matrix that lies row by row.
    """

    path: Path
    label: str
    shape: tuple[int, int] = field(init=False)
    dtype: np.dtype[Any] = field(init=False)
    _start: int = field(init=False)

    def __post_init__(self) -> None:
        def read() -> tuple[Any, ...]:
            size = require_regular(self.path)
            with self.path.open("rb") as stream:
                return (*_header(stream, size, self.label), stream.tell())

        shape, fortran_order, dtype, start = _explained(read, self.label)
        if len(shape) != 2 or min(shape) < 1 or (fortran_order and min(shape) > 1):
            raise InputError(
                f"{self.label} must have shape (N, D), a row an image, and lie row by row, got "
                f"shape {shape}{', column by column' if fortran_order else ''}."
            )
        for name, value in (("shape", shape), ("dtype", dtype), ("_start", start)):
            object.__setattr__(self, name, value)

    def read(self, rows: range | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Some rows, in their order; a range must have step 1."""
        result = np.empty((len(rows), self.shape[1]), self.dtype)
        width = self.dtype.itemsize * self.shape[1]

        def read() -> None:
            with self.path.open("rb", buffering=0) as stream:
                if isinstance(rows, range):
                    stream.seek(self._start + rows.start * width)
                    _fill(stream, result.reshape(-1).view(np.uint8).data)
                    return
                for place, row in zip(result, rows.tolist(), strict=True):
                    stream.seek(self._start + row * width)
                    _fill(stream, place.view(np.uint8).data)

        _explained(read, self.label)
        return result


def _header(stream: IO[bytes], size: int, label: str) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether columns lie together, and dtype of the array in ``size`` bytes of a stream."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:  # the third is for names of fields, which numbers do not have
        raise ValueError("another version of the format")
    if dtype.hasobject:
        raise InputError(f"{label} holds Python objects, which are not read; save float arrays.")
    if dtype.kind not in "biufcSU":
        raise InputError(
            f"{label} holds {one_line(str(dtype), 40)}, no numbers; save float arrays."
        )
    count = math.prod(shape)
    if any(length < 0 for length in shape) or count * dtype.itemsize != size - stream.tell():
        raise ValueError("the header promises another size")
    return shape, fortran_order, dtype


def _read(stream: IO[bytes], size: int, label: str) -> npt.NDArray[Any]:
    """The array in ``size`` bytes of a stream."""
    shape, fortran_order, dtype = _header(stream, size, label)
    count = math.prod(shape)
    if size > LARGEST:
        raise InputError(f"{label} holds {size} bytes, more than the {LARGEST} that are read.")
    array = np.empty(count, dtype)
    _fill(stream, array.view(np.uint8).data)
    # At its end a member of an archive is compared with its checksum.
    if stream.read(1):
        raise ValueError("there is more than the header promises")
    return array.reshape(shape, order="F" if fortran_order else "C")


def _fill(stream: IO[bytes], target: memoryview) -> None:
    done = 0
    while done < len(target):
        piece = stream.read(min(_CHUNK, len(target) - done))
        if not piece:
            raise EOFError
        target[done : done + len(piece)] = piece
        done += len(piece)
