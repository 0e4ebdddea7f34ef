"""IDX, the file format of MNIST: a magic number, the sizes of the dimensions, unsigned bytes.

    0x00 0x00 0x08 R    R dimensions of unsigned bytes; 0x09, 0x0B to 0x0E are the other types
    R x 4 bytes         their sizes, big-endian
    the values          the last dimension fastest

Format: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", 1998. The
file may come from anybody: its header is checked against its real size before memory is taken, and
a compressed one is never unpacked beyond what the header promises.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vaeq.errors import InputError, one_line

# Images by rows by columns by channels.
_MOST_DIMENSIONS = 4
_TYPES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_UINT8 = 0x08
_GZIP = b"\x1f\x8b"
# Grey levels pack to a tenth; sorted labels to a thousandth, and of those a file holds few. What
# grows more than this is made to fill the memory.
_MOST_EXPANSION = 100
_ALWAYS_UNPACKED = 64 * 2**20
# More than any set of small images, and what a machine that trains on them can hold.
LARGEST = 4 * 2**30
_CHUNK = 2**20


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes, plain or gzip, told apart by its first bytes.

    Args:
        path: the file; its name may end in anything.

    Returns:
        A writable array with the dimensions of the header, at most 4 of them.

    Raises:
        InputError: the file does not exist, cannot be read, is no IDX file, holds another type than
            unsigned bytes or no value at all, has fewer or more bytes than its header promises, is
            larger than ``LARGEST``, or is compressed beyond what images can be. Nothing of the size
            promised is allocated before it is found plausible.
    """
    text = one_line(str(path))
    file = Path(path)
    try:
        # A pipe or a device has no size and perhaps no end.
        if not file.is_file():
            what = "is no regular file" if file.exists() else "does not exist"
            raise InputError(f"{text} {what}; give an IDX file, plain or gzip.")
        with file.open("rb") as raw:
            size = raw.seek(0, os.SEEK_END)
            raw.seek(0)
            packed = raw.read(2) == _GZIP
            raw.seek(0)
            if not packed:
                return _read(raw, text, size)
            with gzip.open(raw) as stream:
                return _read(stream, text, size, packed=True)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{text} is a damaged gzip file ({one_line(str(error))}); restore it."
        ) from None
    except OSError as error:
        raise InputError(f"{text} cannot be read: {error.strerror or error}.") from None
    except MemoryError:
        raise InputError(f"{text} is larger than the free memory; keep fewer images.") from None


def _read(
    stream: BufferedIOBase, text: str, size: int, *, packed: bool = False
) -> npt.NDArray[np.uint8]:
    """The array of an open file of ``size`` bytes, compressed or not."""
    shape = _shape(stream, text)
    promised = math.prod(shape)
    words = f"{text} promises {' x '.join(map(str, shape))} values in its header"
    if promised == 0:
        raise InputError(f"{words}, which are none; give a file of at least one image.")
    if promised > LARGEST:
        raise InputError(f"{words}, more than the {LARGEST} that are read; keep fewer images.")
    header = 4 + 4 * len(shape)
    if packed:
        if promised > max(_MOST_EXPANSION * size, _ALWAYS_UNPACKED):
            raise InputError(
                f"{words}, more than {_MOST_EXPANSION} times its {size} bytes of gzip; "
                "unpack it first if that is meant."
            )
    elif size - header != promised:
        raise InputError(f"{words} and holds {size - header}; restore the file.")
    array = np.empty(shape, np.uint8)
    _fill(stream, array.reshape(-1).data, words)
    # At its end gzip compares its checksum.
    if stream.read(1):
        raise InputError(f"{words} and holds more; restore the file.")
    return array


def _shape(stream: BufferedIOBase, text: str) -> tuple[int, ...]:
    """The dimensions in the header, which is read to its end and no further."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in {_UINT8, *_TYPES}:
        raise InputError(
            f"{text} is no IDX file: it must begin with 00 00 08 and the number of dimensions, "
            f"got {magic.hex(' ') or 'an empty file'}."
        )
    if magic[2] != _UINT8:
        raise InputError(
            f"{text} must hold unsigned bytes, 0 to 255, got {_TYPES[magic[2]]}; convert it."
        )
    rank = magic[3]
    if not 1 <= rank <= _MOST_DIMENSIONS:
        raise InputError(
            f"{text} must have 1 to {_MOST_DIMENSIONS} dimensions (images, rows, columns, "
            f"channels), got {rank}."
        )
    sizes = stream.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise InputError(f"{text} ends within its header; restore the file.")
    return tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * rank, 4))


def _fill(stream: BufferedIOBase, target: memoryview, words: str) -> None:
    """Read until ``target`` is full."""
    done = 0
    while done < len(target):
        # In pieces: a stream that ends early has not touched the memory behind its end.
        count = stream.readinto(target[done : done + _CHUNK])
        if not count:
            raise InputError(f"{words} and holds {done}; restore the file.")
        done += count
