"""What is shown while runs train: bars on a terminal, plain lines without one."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from vaeq.launch import progress
from vaeq.launch.progress import Bars, Event, Lines, clock, display, short_labels

NAMES = [f"latent_dim={d},encoder_depth=2,seed=0-{d:08x}" for d in (2, 8)]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def story(name: str, epochs: int = 2) -> list[Event]:
    events = [Event("start", name, 0, epochs, 0, epochs * 100)]
    for epoch in range(1, epochs + 1):
        events.append(Event("images", name, epoch, epochs, epoch * 100 - 50, epochs * 100))
        events.append(
            Event("epoch", name, epoch, epochs, epoch * 100, epochs * 100, -100.0 - epoch)
        )
    return [*events, Event("stage", name, message="measuring")]


def shown(terminal: bool, events: list[Event], width: int = 120) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width)
    with display(console, NAMES) as screen:
        for event in events:
            screen.update(event)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


def test_a_terminal_gets_bars_and_a_file_gets_lines() -> None:
    assert isinstance(display(Console(force_terminal=True), NAMES), Bars)
    assert isinstance(display(Console(file=io.StringIO()), NAMES), Lines)


def test_lines_have_no_escape_codes_and_tell_everything() -> None:
    end = [
        Event("complete", NAMES[0], message="ELBO -101.00 nats"),
        Event("failed", NAMES[1], message="the loss is not finite in epoch 1"),
    ]
    text = shown(False, [*story(NAMES[0]), *story(NAMES[1]), *end])
    assert "\x1b" not in text
    assert f"{NAMES[0]}: training, 2 epochs\n" in text
    assert re.search(r"epoch 2/2  ELBO -102\.00 nats  [\d,]+ images/s  0:00 left\n", text)
    assert f"[1/2] {NAMES[0]}: complete: ELBO -101.00 nats\n" in text
    assert f"[2/2] {NAMES[1]}: failed: the loss is not finite in epoch 1\n" in text


def test_a_long_run_writes_a_bounded_number_of_lines() -> None:
    text = shown(False, story(NAMES[0], epochs=1000))
    assert 20 <= text.count("epoch ") <= 23
    assert "epoch 1000/1000" in text


def test_a_resumed_run_says_from_where() -> None:
    text = shown(False, [Event("start", NAMES[0], 7, 10)])
    assert "training from epoch 7, 10 epochs" in text


def test_bars_show_each_job_and_the_whole() -> None:
    end = [Event("complete", name, message="done") for name in NAMES]
    raw = shown(True, [*story(NAMES[0]), *story(NAMES[1]), *end])
    text = ESCAPE.sub("", raw)
    assert "\x1b" in raw
    for part in ("latent_dim=2 ", "latent_dim=8 ", "all runs", "2/2 runs", "measuring"):
        assert part in text
    assert "encoder_depth=2 " not in text
    for name in NAMES:
        assert f"{name}: complete: done" in text


def test_bars_fit_a_narrow_terminal() -> None:
    text = ESCAPE.sub("", shown(True, story(NAMES[0]), width=60))
    assert "latent_dim=2" in text
    assert all(len(line) <= 60 for line in text.replace("\r", "\n").split("\n"))


def test_the_rate_counts_only_what_this_process_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    rate = progress.Rate()
    words = rate.words(Event("epoch", "r", 6, 10, images=500, total_images=2000))
    assert words == "50 images/s  0:30 left"


def test_labels_tell_the_runs_apart() -> None:
    assert list(short_labels(NAMES).values()) == ["latent_dim=2", "latent_dim=8"]
    same = ["latent_dim=2,seed=0-aaaaaaaa", "latent_dim=2,seed=0-bbbbbbbb"]
    assert len(set(short_labels(same).values())) == 2
    assert short_labels(NAMES[:1])[NAMES[0]] == "latent_dim=2,encoder_depth=2,seed=0"


def test_clock() -> None:
    assert clock(59.6) == "1:00"
    assert clock(3723) == "1:02:03"
