"""A temporary folder of this process that does not outlive it for long.

It is removed when the process ends. One that was killed cannot do that: the next one that wants
such a folder does it for it.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "vaeq-pool-"
_LOCK = "lock"
# The name of a socket in it has 108 bytes on Linux and 104 on macOS, some 50 of them ours.
_LONGEST = 50


def scratch_folder() -> Path:
    """The folder of this process, made when it is first asked for."""
    return _made()[0]


@cache
def _made() -> tuple[Path, FileLock]:
    """The folder, and the lock that tells others that it is in use: held to the process's end."""
    place = Path(tempfile.gettempdir())
    if len(str(place)) > _LONGEST:
        place = Path("/tmp")
    for abandoned in place.glob(f"{_PREFIX}*"):
        # In use, another user's, or gone by now.
        with contextlib.suppress(OSError, Timeout):
            if (abandoned / _LOCK).exists():
                with FileLock(abandoned / _LOCK, blocking=False):
                    _remove(abandoned)
            else:
                abandoned.rmdir()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        lock = FileLock(folder / _LOCK)
        # Before it is locked, another process may take it for abandoned.
        with contextlib.suppress(Timeout, FileNotFoundError):
            lock.acquire(blocking=False)
            # Later than multiprocessing's own, at -100, which removes what it has put there.
            Finalize(None, _remove, (folder,), exitpriority=-200)
            return folder, lock


def _remove(folder: Path) -> None:
    """Remove what multiprocessing has put there, and the folder, if it holds nothing else."""
    with contextlib.suppress(OSError):
        for own in folder.glob("pymp-*"):
            for socket in own.glob("listener-*"):
                socket.unlink()
            own.rmdir()
        (folder / _LOCK).unlink()
        folder.rmdir()
