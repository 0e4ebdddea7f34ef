"""What a person sees while runs train: live bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Event:
    """One step of one run, small enough to be sent through a pipe many times a second."""

    kind: str  # start, images, epoch, stage, note, taken, complete, failed, skipped
    run: str
    epoch: int = 0
    epochs: int = 0
    images: int = 0  # seen by this process since it began to train
    total_images: int = 0  # that this process will see
    elbo: float | None = None  # held out, nats per image
    message: str = ""


class Rate:
    """Images a second and time left of one run, over the time it has really trained."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def words(self, event: Event) -> str:
        seconds = time.monotonic() - self.began
        if event.images == 0 or seconds <= 0:
            return ""
        rate = event.images / seconds
        left = (event.total_images - event.images) / rate
        return f"{rate:,.0f} images/s  {clock(left)} left"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def epoch_words(event: Event) -> str:
    """``epoch 3/10  ELBO -104.21 nats``."""
    words = f"epoch {event.epoch}/{event.epochs}"
    return words if event.elbo is None else f"{words}  ELBO {event.elbo:.2f} nats"


class Display(ABC):
    """Shows the events of one or many runs."""

    def __init__(self, console: Console, runs: Sequence[str]) -> None:
        self.console = console
        self.n_runs = len(runs)
        self.ended: dict[str, int] = {"complete": 0, "failed": 0, "skipped": 0}
        self.rates: dict[str, Rate] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def update(self, event: Event) -> None:
        """Take one event in."""
        if event.kind == "start":
            self.rates[event.run] = Rate()
        if event.kind in self.ended:
            self.ended[event.kind] += 1
        self.show(event)

    def rate(self, event: Event) -> str:
        return self.rates[event.run].words(event) if event.run in self.rates else ""

    def count(self) -> str:
        return f"[{sum(self.ended.values())}/{self.n_runs}]"

    def line(self, text: str) -> None:
        # Folding a log line at 80 columns would break the paths in it.
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say(self, event: Event) -> None:
        """The lines that stay on the screen."""
        if event.kind in self.ended:
            self.line(f"{self.count()} {event.run}: {event.kind}{_colon(event.message)}")
        elif event.kind == "note":
            self.line(f"{event.run}: {event.message}")

    @abstractmethod
    def show(self, event: Event) -> None:
        """Draw one event."""


def _colon(message: str) -> str:
    return f": {message}" if message else ""


class Lines(Display):
    """Plain lines without escape codes, a bounded number of them for a run."""

    def show(self, event: Event) -> None:
        if event.kind == "start":
            resumed = f" from epoch {event.epoch}" if event.epoch else ""
            self.line(f"{event.run}: training{resumed}, {event.epochs} epochs")
        elif event.kind == "epoch" and self._worth_a_line(event):
            self.line(f"{event.run}: {epoch_words(event)}  {self.rate(event)}")
        else:
            self.say(event)

    @staticmethod
    def _worth_a_line(event: Event) -> bool:
        return event.epoch % max(1, event.epochs // 20) == 0 or event.epoch == event.epochs


class Bars(Display):
    """A live bar for each running job, and one for the whole sweep."""

    def __init__(self, console: Console, runs: Sequence[str]) -> None:
        super().__init__(console, runs)
        self.labels = short_labels(runs)
        self.progress = Progress(
            TextColumn("{task.description}", markup=True),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.last_words: dict[str, str] = {}
        self.overall = (
            self.progress.add_task("all runs", total=self.n_runs, words=f"0/{self.n_runs} runs")
            if self.n_runs > 1
            else None
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def show(self, event: Event) -> None:
        if event.kind == "start":
            label = escape(self.labels.get(event.run, event.run))
            self.tasks[event.run] = self.progress.add_task(
                label, total=event.total_images, words=epoch_words(event)
            )
        elif event.run in self.tasks and event.kind in ("images", "epoch", "stage"):
            if event.kind == "epoch":
                self.last_words[event.run] = epoch_words(event)
            words = self.last_words.get(event.run, epoch_words(event))
            if event.kind == "images":
                words = words.replace(f"epoch {event.epoch - 1}/", f"epoch {event.epoch}/")
            words = event.message if event.kind == "stage" else f"{words}  {self.rate(event)}"
            completed = None if event.kind == "stage" else event.images
            self.progress.update(self.tasks[event.run], completed=completed, words=words)
        elif event.kind in self.ended:
            if event.run in self.tasks:
                self.progress.remove_task(self.tasks.pop(event.run))
            self.say(event)
            if self.overall is not None:
                done = sum(self.ended.values())
                words = f"{done}/{self.n_runs} runs"
                if self.ended["failed"]:
                    words += f", {self.ended['failed']} failed"
                self.progress.update(self.overall, completed=done, words=words)
        else:
            self.say(event)


def short_labels(runs: Sequence[str]) -> dict[str, str]:
    """What tells the runs apart: the axes that differ, or the hashes where no axis does.

    A bar has no room for whole run names; the finished line and the folder have them.
    """
    axes = {run: run.rpartition("-")[0].split(",") for run in runs}
    shared = set.intersection(*map(set, axes.values())) if len(runs) > 1 else set()
    labels = {run: ",".join(a for a in axes[run] if a not in shared) for run in runs}
    distinct = len(set(labels.values())) == len(runs) and all(labels.values())
    return labels if distinct else {run: f"{labels[run]}-{run.rpartition('-')[2]}" for run in runs}


def display(console: Console, runs: Sequence[str]) -> Display:
    """Bars on a terminal that can move its cursor, else lines, for the runs of these names."""
    # FORCE_COLOR makes rich take a pipe for a terminal: a log may want colours, but never bars.
    piped = "FORCE_COLOR" in os.environ and not console.file.isatty()
    live = console.is_terminal and not console.is_dumb_terminal and not piped
    return Bars(console, runs) if live else Lines(console, runs)
