"""C source to functions of this process, by the machine's own compiler, where it has one.

What was compiled is kept in ``~/.cache/vaeq``, under a name that says what it was made of and what
it holds: a processor that lacks an instruction never meets it, and a damaged file is not loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from vaeq.hardware import cpu_flags

_CACHE = Path("~/.cache/vaeq/compiled")
# What is no number stays so, hence no -ffast-math; errno and traps nobody reads.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# With threads, or where the compiler or the process has no OpenMP, without. Nothing is linked: the
# functions of OpenMP are to be those of torch, whose threads are there already.
_VARIANTS = (("-fopenmp",), ())
_LONGEST = 60  # seconds; it takes half of one


@cache
def compiled(source: Path) -> ctypes.CDLL | None:
    """The functions of a C file; None without a compiler, or where it fails.

    ``CC`` names the compiler, else it is ``cc``.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return None
    for variant in _VARIANTS:
        try:
            return _load(source, compiler, (*_FLAGS, *variant))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _load(source: Path, compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    made_of = hashlib.sha256(source.read_bytes())
    tool = Path(compiler).resolve()
    facts = tool.stat()
    made_of.update(repr((flags, str(tool), facts.st_size, facts.st_mtime_ns)).encode())
    made_of.update(repr((platform.machine(), sorted(cpu_flags()))).encode())
    name = f"{source.stem}-{made_of.hexdigest()[:32]}"
    folder = _CACHE.expanduser()
    for kept in sorted(folder.glob(f"{name}-*.so")):
        if kept.stem.rpartition("-")[2] == _digest(kept):
            return ctypes.CDLL(str(kept))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder)
    except OSError:
        scratch = tempfile.TemporaryDirectory()  # compiled anew by every process
    with scratch:
        made = Path(scratch.name) / f"{name}.so"
        command = [compiler, *flags, str(source), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=_LONGEST)
        functions = ctypes.CDLL(str(made))
        if made.parent.parent == folder:
            made.replace(folder / f"{name}-{_digest(made)}.so")
        return functions


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
