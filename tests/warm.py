"""The program from a process that has imported torch: two seconds less for every command of a test.

``python -m tests.warm`` reads an order a line, a JSON object {words, cwd, stdout, stderr, env},
forks, runs ``python -m vaeq words...`` there, and writes its exit status. It has no threads and,
but for what it imported, no state: what a command finds is what a new process finds after its
imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from vaeq.loading import loading

# Seconds that a command may take.
_LONGEST = 300


class Warm:
    """A process that commands are forked from, as long as this object is used."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3000"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` of the program in a folder, with its output captured."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as kept:
            out, err = Path(kept) / "out", Path(kept) / "err"
            order = {"words": words, "cwd": str(folder), "stdout": str(out), "stderr": str(err)}
            self._process.stdin.write(json.dumps({**order, "env": dict(os.environ)}) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            if status == -signal.SIGALRM:
                raise subprocess.TimeoutExpired(["vaeq", *words], _LONGEST)
            return subprocess.CompletedProcess(
                ["vaeq", *words], status, out.read_text("utf-8"), err.read_text("utf-8")
            )

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    with loading():
        import torch  # noqa: F401

        import vaeq.compose
        import vaeq.experiment
        import vaeq.measurement  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(order)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _become(order: dict[str, Any]) -> None:
    """The command itself; never returns."""
    status = 1
    try:
        for number, name in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            opened = os.open(name, flags, 0o600)
            os.dup2(opened, number)
            os.close(opened)
        os.environ.clear()
        os.environ.update(order["env"], OMP_NUM_THREADS="1")
        os.chdir(order["cwd"])
        signal.alarm(_LONGEST)
        sys.path[0] = ""
        sys.argv = ["vaeq", *order["words"]]
        try:
            runpy.run_module("vaeq", run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
