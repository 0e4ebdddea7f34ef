"""Files that anybody may have written: regular ones alone, and no more of them than is wanted.

A pipe in the place of a file makes its reader wait for ever, and a device or a file of holes has no
end. Both come as links in a folder from elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def require_regular(path: Path) -> int:
    """The size of a regular file in bytes, links followed.

    Raises:
        OSError: there is none, or it is a folder, a pipe, a socket or a device.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return found.st_size


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: there is none, it is larger, or it cannot be read.
    """
    require_regular(path)
    with path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes", str(path))
    return content
