"""Errors a user meets: one calm sentence naming the field, the value, the range and the remedy."""

from __future__ import annotations


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


def one_line(text: str, limit: int = 300) -> str:
    """Text from a file made safe to print: one line, no control characters, no lone surrogates."""
    if len(text) <= limit and text.isprintable() and "  " not in text and text == text.strip():
        return text
    text = " ".join(text.split())
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
