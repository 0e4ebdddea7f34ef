"""The right to write into a run's folder: one process has it at a time.

It is the kernel's lock (flock) on the file ``.lock``. It ends with the process that holds it,
however that ends, so that none is ever stale. Between machines that share a folder it is as good as
the folder's file system:

- NFS passes it to the server, so it holds between machines, too, but for mounts with ``nolock`` or
  ``local_lock``; CephFS, GPFS, BeeGFS and Lustre hold it where they are set up to.
- Lustre with ``localflock``, and shares into virtual machines, hold it on each machine alone: the
  same sweep must not run on two of them at once.
- Where there is no flock at all, filelock takes a file that is there while the lock is held. One of
  a dead process is taken over on the same machine; of a process on another, it has to be deleted by
  hand.
"""

from __future__ import annotations

import contextlib
import errno
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import SoftFileLock, Timeout

from vaeq.errors import DiskError, Taken
from vaeq.runs.record import LOCK, lock


class RunLock:
    """The lock of a run's folder, which is made if it is not there; nobody waits for it.

    Raises, on entering:
        Taken: another process holds it.
        DiskError: the folder cannot be made, or written, or its file system has no lock.
        InputError: a link lies where the lock is, see ``vaeq.runs.record.lock``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = lock(directory / LOCK)
        self._file: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                # That there is no flock: whoever holds the lock says so, see ``by_file``.
                warnings.simplefilter("ignore", UserWarning)
                self._lock.acquire(blocking=False)
        except Timeout:
            raise Taken(self.directory.name) from None
        except NotImplementedError:  # filelock before it took a file where there is no flock
            missing = OSError(errno.ENOSYS, "its file system has no flock")
            raise DiskError(self.directory / LOCK, missing) from None
        except OSError as error:
            raise DiskError(self.directory / LOCK, error) from None
        self._file = self._found()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # the folder may have gone
            self._lock.release()

    @property
    def by_file(self) -> bool:
        """Whether the file system has no flock, and the lock is a file's being there."""
        return isinstance(self._lock, SoftFileLock)

    def require_held(self) -> None:
        """Prove that the folder is still the one that was locked.

        Raises:
            DiskError: it was removed, and what is there now may be another process's.
        """
        if self._file is None or self._found() != self._file:
            gone = OSError(errno.ENOENT, "it was removed or replaced while the run was at work")
            raise DiskError(self.directory, gone)

    def _found(self) -> tuple[int, int] | None:
        try:
            status = (self.directory / LOCK).stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino
