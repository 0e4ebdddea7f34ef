"""On real terminals: of any size, resized under a sweep, without colour, dumb, or none at all."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import TINY
from tests.report_fixtures import default_sweep
from tests.soak import times
from vaeq.launch.progress import Bars, Event, Lines, display

# Columns and rows; a terminal that does not know its size says 0 x 0.
SIZES = [(20, 10), (80, 24), (300, 100), (0, 0)]
COMMANDS = [
    (command, size)
    for command in ("report", "train", "--help", "sweep --help", "report --help")
    for size in SIZES
]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-7]|9[0-7]|38;[0-9;]+)m")
PLAIN = ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "LINES", "COLORTERM")


def resize(terminal: int, size: tuple[int, int]) -> None:
    columns, rows = size
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def on_terminal(
    folder: Path, *words: str, sizes: list[tuple[int, int]], **env: str
) -> tuple[int, str]:
    """Exit status and everything shown of the program on a terminal that takes size after size."""
    terminal, other = os.openpty()
    resize(terminal, sizes[0])
    inherited = {name: value for name, value in os.environ.items() if name not in PLAIN}
    process = subprocess.Popen(
        [sys.executable, "-m", "vaeq", *words],
        cwd=folder,
        env={**inherited, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **env},
        pass_fds=(other,),
        preexec_fn=lambda: os.login_tty(other),
    )
    os.close(other)
    shown = b""
    following = cycle(sizes)
    deadline = time.monotonic() + 300
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # nobody has the other end open any more
                break
            if not chunk:
                break
            shown += chunk
            resize(terminal, next(following))
        status = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    return status, shown.decode()


@contextmanager
def console(size: tuple[int, int]) -> Iterator[tuple[Console, int]]:
    """A console on a terminal of that size, and the end from which the terminal is read."""
    terminal, other = os.openpty()
    resize(terminal, size)
    with os.fdopen(other, "w", encoding="utf-8") as stream:
        yield Console(file=stream), terminal
    os.close(terminal)


def read(terminal: int) -> str:
    """What has been shown so far; of a terminal there is no end to read until."""
    shown = b""
    while select.select([terminal], [], [], 0)[0]:
        shown += os.read(terminal, 65536)
    return shown.decode()


@pytest.mark.soak
@pytest.mark.parametrize("first", range(times(1, len(SIZES))))
def test_a_sweep_survives_every_size_its_terminal_takes(tmp_path: Path, first: int) -> None:
    sizes = SIZES[first:] + SIZES[:first]
    words = ("sweep", *TINY, "latent_dim=2", "seed=0,1", "epochs=10", "generation.quality=false")
    status, shown = on_terminal(tmp_path, *words, sizes=sizes)
    text = ESCAPE.sub("", shown)
    assert status == 0, text
    assert "Traceback" not in text
    assert "[2/2]" in text
    assert len(list(tmp_path.glob("outputs/smoke/*/record.json"))) == 2
    # Bars were drawn, and the cursor that they hid is back.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.soak
@pytest.mark.parametrize(("command", "size"), COMMANDS[: times(1, len(COMMANDS))])
def test_every_command_survives_every_size(
    tmp_path: Path, command: str, size: tuple[int, int]
) -> None:
    words = {"train": ("train", *TINY), "report": ("report", "runs=runs")}
    if command == "report":
        default_sweep(tmp_path / "runs")
    status, shown = on_terminal(tmp_path, *words.get(command, command.split()), sizes=[size])
    assert status == 0, shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("size", SIZES)
def test_bars_are_drawn_in_every_size_and_resized(size: tuple[int, int]) -> None:
    names = ["latent_dim=2,seed=0-00000000", "latent_dim=8,seed=0-00000001"]
    with console(size) as (screen, terminal):
        with display(screen, names) as bars:
            assert isinstance(bars, Bars)
            for name in names:
                bars.update(Event("start", name, 0, 2, 0, 200))
            for other in (*SIZES, size):
                resize(terminal, other)
                bars.update(Event("epoch", names[0], 1, 2, 100, 200, -101.0))
                bars.progress.refresh()
            for name in names:
                bars.update(Event("complete", name, message="ELBO -101.00 nats"))
        shown = ESCAPE.sub("", read(terminal))
    for name in names:
        assert f"{name}: complete: ELBO -101.00 nats" in shown.replace("\r\n", "")


def test_no_color_takes_the_colours_and_leaves_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        with console((80, 24)) as (screen, terminal), display(screen, ["a=1-0"]) as bars:
            bars.update(Event("start", "a=1-0", 0, 2, 0, 200))
            bars.progress.refresh()  # type: ignore[attr-defined]
            return read(terminal)

    for name in PLAIN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert COLOUR.search(shown())
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown()
    assert not COLOUR.search(text)
    assert "epoch 0/2" in text


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    with console((80, 24)) as (screen, terminal):
        with display(screen, ["a=1-0"]) as lines:
            assert isinstance(lines, Lines)
            lines.update(Event("start", "a=1-0", 0, 2, 0, 200))
        text = read(terminal)
    assert text == "a=1-0: training, 2 epochs\r\n"


def test_forced_colour_moves_no_cursor_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with (tmp_path / "log").open("w", encoding="utf-8") as stream:
        screen = Console(file=stream)
        assert screen.is_terminal
        assert isinstance(display(screen, ["a=1-0"]), Lines)
