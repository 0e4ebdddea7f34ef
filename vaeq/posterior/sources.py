"""Where codes come from: a file, a folder or a list of files; which arrays it has, one at a time.

    FILE.npz, FILE.safetensors    arrays mean and logvar (or std, or var) of shape (N, D); optional
                                  test_mean, test_logvar (or test_std, test_var), labels (N,)
    DIR                           the same, one file an array: mean.npy, logvar.npy, ...
    PREFIXmean.npy                the same, beside it: PREFIXlogvar.npy, PREFIXtest_mean.npy, ...
    mean.npy,logvar.npy,...       the same, listed; the end of a file's name says which array it is

Nothing is ever unpickled, and torch is not needed to say that there is no such file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaeq.errors import InputError, one_line
from vaeq.files.foreign import require_regular
from vaeq.files.npy import npz_names, read_npy, read_npz

SPREADS = ("logvar", "std", "var")
# Longest first: test_mean.npy is test_mean, and not the mean of something called test_.
_NAMES = ("test_logvar", "test_mean", "test_std", "test_var", "logvar", "labels", "mean", "std",
          "var")  # fmt: skip


@dataclass(frozen=True)
class Arrays:
    """Names of what a source holds, and how to read one of them."""

    found: tuple[str, ...]
    get: Callable[[str], Any]


def find_arrays(source: str) -> Arrays:
    """What a source holds, as the module's first lines say; of the arrays none is read yet.

    Raises:
        InputError: one sentence: what is missing or wrong.
    """
    path = Path(source)
    text = one_line(source)
    files = npy_paths(source)
    if files is not None:
        return _npy_files(files)
    if not _exists(path):
        raise InputError(
            f"codes={text} does not exist; give a .npz or .safetensors file, a folder of .npy "
            "files, or one of them that ends in mean.npy."
        )
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _npz(path, text)
    if suffix == ".safetensors":
        return _safetensors(path, text)
    kind = repr(suffix or "no suffix")
    raise InputError(f"codes={text} must be .npz, .safetensors or .npy, got {kind}.")


def npy_paths(source: str) -> dict[str, Path] | None:
    """The .npy file of each array of a source; None where it is a file of another kind, or none."""
    path = Path(source)
    if not _exists(path):
        listed = [Path(part.strip()) for part in source.split(",") if part.strip()]
        return {_name_of(file): file for file in listed} if "," in source else None
    if path.is_dir():
        return {file.stem: file for file in sorted(path.glob("*.npy"))}
    if path.suffix.lower() != ".npy":
        return None
    if _name_of(path) not in ("mean", "test_mean"):
        raise InputError(
            f"codes={one_line(source)} must end in mean.npy; the other arrays are looked for "
            "beside it."
        )
    prefix = path.stem.removesuffix("mean").removesuffix("test_")
    beside = {name: path.with_name(f"{prefix}{name}.npy") for name in sorted(_NAMES)}
    return {name: file for name, file in beside.items() if file.exists()}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than any file's
        return False


def _name_of(file: Path) -> str:
    """Which array a .npy file holds, from the end of its name; else the whole of it."""
    return next((name for name in _NAMES if file.stem.endswith(name)), file.stem)


def _npy_files(files: Mapping[str, Path]) -> Arrays:
    def get(name: str) -> Any:
        return read_npy(files[name], f"codes={one_line(str(files[name]))}")

    return Arrays(tuple(files), get)


def _npz(path: Path, text: str) -> Arrays:
    label = f"codes={text}"
    return Arrays(npz_names(path, label), lambda name: read_npz(path, name, label))


def _safetensors(path: Path, text: str) -> Arrays:
    from safetensors import safe_open

    def read(take: Callable[[Any], Any]) -> Any:
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as archive:
                return take(archive)
        # Of torch too: a shape that no tensor has, a dtype that this version does not know.
        except Exception as error:
            reason = "it is truncated, or not what its name says; write it again"
            if isinstance(error, OSError) and error.strerror:
                reason = error.strerror
            raise InputError(f"codes={text} cannot be read: {reason}.") from None

    names = read(lambda archive: tuple(archive.keys()))
    return Arrays(names, lambda name: read(lambda archive: archive.get_tensor(name)))
