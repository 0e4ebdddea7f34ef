"""Finding run folders: a folder, several, or globs, each searched three levels deep."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vaeq.errors import InputError, one_line

SEARCH_DEPTH = 3
# A file server's clock may be so many seconds ahead of ours.
_SKEW = 60
RUN_FILES = ("record.json", "status.json", "config.yaml")
MAKE_SOME = "make some with: vaeq sweep latent_dim=2,8,32"


def expand(patterns: Sequence[str]) -> list[Path]:
    """The folders that paths and globs name, each once; a path that exists is taken as it is.

    Raises:
        InputError: a glob matches no folder.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.exists() or not glob.has_magic(pattern):
            found[path] = None
            continue
        folders = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        folders = [folder for folder in folders if folder.is_dir()]
        if not folders:
            raise InputError(f"runs={pattern} matches no folder; {MAKE_SOME}")
        found |= dict.fromkeys(folders)
    return list(found)


def newest_experiment(outputs: Path) -> Path:
    """The sub-folder of ``outputs`` in which a run was written last.

    Raises:
        InputError: no sub-folder holds a run; or several do, and one was written in the future: the
            clock was set back since, and which is the newest is not to be told from it.
    """
    newest: tuple[float, Path] | None = None
    experiments: set[Path] = set()
    folders = sorted(outputs.iterdir()) if outputs.is_dir() else []
    for folder in folders:
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        for run in _walk(folder, SEARCH_DEPTH - 1):
            experiments.add(folder)
            written = max((file.stat().st_mtime for file in _run_files(run)), default=-1.0)
            if newest is None or written > newest[0]:
                newest = written, folder
    if newest is None:
        raise InputError(f"no runs in {outputs} yet; {MAKE_SOME}")
    if len(experiments) > 1 and newest[0] > time.time() + _SKEW:
        raise InputError(
            f"{newest[1]} is dated in the future, so the clock was set back and the newest of "
            f"{len(experiments)} experiments is not known; name one: runs={newest[1]}"
        )
    return newest[1]


def _run_files(directory: Path) -> list[Path]:
    return [path for name in RUN_FILES if (path := directory / name).is_file()]


def find_runs(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Name and path of every run directory under the roots, each once, in the order of names."""
    seen: set[Path] = set()
    for root in roots:
        if not root.is_dir():
            problem = "is not a folder" if root.exists() else "does not exist"
            raise InputError(
                f"runs={root} {problem}; give a folder of runs, such as outputs/default"
            )
        for directory in _walk(root, SEARCH_DEPTH):
            resolved = directory.resolve()
            if resolved not in seen:
                seen.add(resolved)
                relative = directory.relative_to(root)
                name = str(relative) if relative.parts else root.resolve().name
                yield one_line(name), directory


def _walk(directory: Path, depth: int) -> Iterator[Path]:
    """Run directories at or below a directory; a run directory is not searched further.

    A directory that cannot be listed is yielded too: it may be a run, and is named as unreadable.
    """
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError:
        yield directory
        return
    if any(entry.name in RUN_FILES for entry in entries):
        yield directory
    elif depth > 0:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _walk(directory / entry.name, depth - 1)
