"""C source to functions of this process, by the machine's own compiler, where it has one.

What was compiled is kept in ``~/.cache/vaeq``, under a name that says what it was made of and what
it holds: a processor that lacks an instruction never meets it, and a damaged file is not loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from vaeq.hardware import cpu_flags

_CACHE = Path("~/.cache/vaeq/compiled")
# What is no number stays so, hence no -ffast-math; errno and traps nobody reads.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# With threads, or where the compiler or the process has no OpenMP, without. Nothing is linked: the
# functions of OpenMP are to be those of torch, whose threads are there already.
_VARIANTS = (("-fopenmp",), ())
_LONGEST = 60  # seconds; it takes one


@cache
def compiled(*sources: Path) -> ctypes.CDLL | None:
    """The functions of C files; None without a compiler, or where it fails.

    ``CC`` names the compiler, perhaps with options; else it is ``cc``.
    """
    name, *options = shlex.split(os.environ.get("CC", "")) or ["cc"]
    compiler = shutil.which(name)
    if compiler is None:
        return None
    for variant in _VARIANTS:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return _load(sources, [compiler, *options, *_FLAGS, *variant])
    return None


def _load(sources: Sequence[Path], command: list[str]) -> ctypes.CDLL:
    tool = Path(command[0]).resolve()
    facts = tool.stat()
    made_of = hashlib.sha256(repr([source.read_bytes() for source in sources]).encode())
    made_of.update(repr((command, str(tool), facts.st_size, facts.st_mtime_ns)).encode())
    made_of.update(repr((platform.machine(), sorted(cpu_flags()))).encode())
    name = f"{sources[0].stem}-{made_of.hexdigest()[:32]}"
    folder = _folder()
    for kept in sorted(folder.glob(f"{name}-*.so")) if folder else []:
        with contextlib.suppress(OSError):
            if kept.stem.rpartition("-")[2] == _digest(kept):
                return ctypes.CDLL(str(kept))
    # Without a folder to keep it in, every process compiles it for itself.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / f"{name}.so"
        subprocess.run(
            [*command, *map(str, sources), "-o", str(made), "-lm"],
            check=True,
            capture_output=True,
            timeout=_LONGEST,
        )
        functions = ctypes.CDLL(str(made))
        if folder is not None:
            made.replace(folder / f"{name}-{_digest(made)}.so")
        return functions


def _folder() -> Path | None:
    """Where compiled files are kept; None where nobody has a home, or it cannot be written."""
    try:
        folder = _CACHE.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
