"""MNIST (LeCun, Cortes and Burges, 1998), which ships inside the package as its four IDX files.

The MD5 of the uncompressed bytes is checked at every load. No torch here: the files can be unpacked
while it is imported.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from vaeq.errors import InputError

# file → (MD5 of the uncompressed bytes, shape), of the original distribution.
MNIST_FILES = {
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", (60_000,)),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", (10_000,)),
}
# Folder → its files, as far as they were asked for ahead and not fetched yet.
_under_way: dict[str | None, list[Future[bytearray]]] = {}


def read_ahead(root: str | None) -> None:
    """Begin to read the files of a folder, or the packaged ones, for :func:`read_mnist`.

    Returns at once; what goes wrong is raised there. Neither zlib nor MD5 holds Python's lock.
    """
    if root not in _under_way:
        _under_way[root] = _begin(root)


def read_mnist(root: str | None) -> list[bytearray]:
    """The values of the four files, without their headers, in the order of ``MNIST_FILES``.

    Args:
        root: the folder of the ``.gz`` files; None takes the packaged ones.

    Raises:
        InputError: a file is missing or damaged, or is not the original one.
    """
    # Of two threads that ask, one takes what was begun.
    files = _under_way.pop(root, None) or _begin(root)
    return [reading.result() for reading in files]


def _begin(root: str | None) -> list[Future[bytearray]]:
    folder: Traversable = resources.files("vaeq.mnist") if root is None else Path(root)
    readers = ThreadPoolExecutor(2, thread_name_prefix="mnist")
    files = [readers.submit(_read, folder, name) for name in MNIST_FILES]
    readers.shutdown(wait=False)
    return files


def _read(folder: Traversable, name: str) -> bytearray:
    md5, shape = MNIST_FILES[name]
    # The MD5 vouches for the header: a magic number, and a size for each dimension.
    header = 4 + 4 * len(shape)
    content = _unpack(folder / f"{name}.gz", header + math.prod(shape))
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise InputError(
            f"{folder / name}.gz is not the original MNIST file: MD5 {actual} instead of "
            f"{md5}; restore the file, or leave data.root unset to use the packaged one."
        )
    return bytearray(memoryview(content)[header:])


def _unpack(path: Traversable, limit: int) -> bytes:
    """The uncompressed bytes, at most ``limit`` + 1 of them: a larger file fails its MD5."""
    reader = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # gzip's header and checksum, too
    try:
        with path.open("rb") as raw:
            packed = raw.read(limit)  # the original is smaller packed
        # In one call: a thread that asks for Python's lock piece by piece waits 5 ms for each.
        content = reader.decompress(packed, limit + 1)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; put the four MNIST .gz files there, or leave data.root unset."
        ) from None
    except (OSError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}; restore the file.") from None
    if len(content) <= limit and not reader.eof:
        raise InputError(f"{path} cannot be read: it ends too early; restore the file.")
    return content
