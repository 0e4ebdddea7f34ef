"""Errors a user meets: one calm sentence naming the field, the value, the range and the remedy."""

from __future__ import annotations

import errno
from pathlib import Path


class VaeqError(Exception):
    """A failure that is not our bug; the command line prints it without a traceback."""


class InputError(VaeqError, ValueError):
    """A value, a file or an array that cannot be used as given."""


class RunsFailed(VaeqError):
    """Some runs of a sweep failed; the others are finished."""


class TrainingDiverged(VaeqError):
    """The training loss stopped being a finite number."""

    def __init__(self, epoch: int) -> None:
        super().__init__(
            f"the training loss is not finite in epoch {epoch}; "
            "lower learning_rate, or raise kl_warmup_epochs"
        )
        self.epoch = epoch


class Taken(VaeqError):
    """Another process, here or on a machine that shares the folder, is at the run."""

    def __init__(self, run: str) -> None:
        super().__init__(f"another process is at {run}; wait for it, or stop it")


class DiskError(VaeqError, OSError):
    """A file that could not be written: the disk is full, closed to us, failing or gone."""

    def __init__(self, path: Path, error: OSError) -> None:
        OSError.__init__(self, error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        remedy = _REMEDIES.get(self.errno or 0, "put that right")
        return f"{self.filename} cannot be written: {self.strerror}; {remedy} and try again"


_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "check the disk",
    errno.ENOENT: "leave its folder where it is",
}


class NeverTrained(VaeqError):
    """Epochs went by, and no weight moved."""

    def __init__(self, epochs: int, learning_rate: float) -> None:
        super().__init__(
            f"no weight moved in {epochs} epochs: steps of learning_rate={learning_rate:g} are "
            "below the rounding of the weights; raise learning_rate"
        )


def one_line(text: str, limit: int = 300) -> str:
    """Text from a file made safe to print: one line, no control characters, no lone surrogates."""
    if len(text) <= limit and text.isprintable() and "  " not in text and text == text.strip():
        return text
    text = " ".join(text.split())
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
