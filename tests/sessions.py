"""The program in a session of its own: its processes, and what must be true of the runs it left."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

# A machine whose cores are all at something else needs its time; a process that hangs needs more.
PATIENCE = 300.0


class Session:
    """One command, started in ``folder``, with all of its descendants, wherever they end up."""

    def __init__(self, folder: Path, *words: str, **env: str) -> None:
        self.stderr = folder / "stderr"
        self.stdout = folder / "stdout"
        with self.stdout.open("w") as out, self.stderr.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vaeq", *words],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **env},
                stdout=out,
                stderr=err,
                start_new_session=True,
                # A job in the background of a shell inherits that SIGINT is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def processes(self) -> dict[int, str]:
        """Living processes by number: main, tracker, server or worker."""
        found: dict[int, tuple[int, str]] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, parent, _, session = (
                    (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                )
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if int(session) == self.process.pid and state not in "ZX":
                found[int(entry.name)] = int(parent), words
        roles: dict[int, str] = {}
        for number, (parent, words) in found.items():
            if number == self.process.pid:
                roles[number] = "main"
            elif "resource_tracker" in words:
                roles[number] = "tracker"
            else:
                # While main lives: once it is dead, the server is nobody's child, too.
                roles[number] = "server" if parent == self.process.pid else "worker"
        return roles

    def of(self, role: str) -> list[int]:
        """The processes of a role, oldest first."""
        return sorted(number for number, own in self.processes().items() if own == role)

    def ended(self) -> bool:
        """Whether the command itself is over."""
        return self.process.poll() is not None

    def wait(self) -> int:
        """Its exit status; SIGKILL for all of it where it does not end."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise

    def wait_empty(self) -> float:
        """Seconds until not one process of it lives."""
        began = time.monotonic()
        if not eventually(lambda: not self.processes(), 60):
            left = self.processes()
            self.kill_all()
            raise AssertionError(f"orphans a minute after the command's end: {left}")
        return time.monotonic() - began

    def kill_all(self) -> None:
        """SIGKILL for every process at one moment."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def eventually(condition: Callable[[], Any], seconds: float = PATIENCE) -> bool:
    """Whether it becomes true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def leftovers(folders: Iterable[Path]) -> list[str]:
    """Temporary files in runs, caches and the temporary folder."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return [str(path) for path in found if path.name.endswith(".tmp") or "pymp-" in str(path)]


def half_written(outputs: Path) -> list[str]:
    """Files of runs that are there under their own name, and not whole."""
    broken = []
    for path in outputs.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="np") as file:
                    for name in file.keys():  # noqa: SIM118
                        file.get_tensor(name)
            elif path.suffix == ".csv":
                rows = list(csv.reader(path.read_text().splitlines()))
                assert all(len(row) == len(rows[0]) for row in rows)
                assert path.read_text().endswith("\n")
            elif path.suffix == ".yaml":
                assert path.read_text().endswith("\n")
        except Exception as error:
            broken.append(f"{path}: {error!r}")
    return broken


def content(run: Path) -> dict[str, Any]:
    """Everything in the folder of a run but for times: what must be the same to the last bit."""
    files: dict[str, Any] = {path.name: None for path in run.iterdir()}
    for path in run.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            metadata = _timeless(file.metadata() or {})
            if "history" in metadata:
                metadata["history"] = [_timeless(row) for row in json.loads(metadata["history"])]
            tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
        files[path.name] = metadata, tensors
    for path in run.glob("*.json"):
        found = _timeless(json.loads(path.read_text()))
        found.get("history", {}).pop("seconds", None)
        for name in ("checkpoint.safetensors", "history.csv"):  # whose content is compared itself
            found.get("files", {}).pop(name, None)
        files[path.name] = found
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    files["history.csv"] = [_timeless(row) for row in rows]
    files["config.yaml"] = (run / "config.yaml").read_text()
    return files


def _timeless(mapping: dict[str, Any]) -> dict[str, Any]:
    times = ("seconds", "timing", "updated_at", "seal")  # a seal is of the times, too
    return {k: v for k, v in mapping.items() if k not in times}


def contents(experiment: Path) -> dict[str, dict[str, Any]]:
    """:func:`content` of every run of an experiment, by the run's name."""
    return {run.name: content(run) for run in sorted(experiment.iterdir()) if run.is_dir()}
