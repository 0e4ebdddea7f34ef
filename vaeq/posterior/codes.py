"""Codes from anybody's encoder: arrays or files of means and variances, checked once, at the edge.

    FILE.npz, FILE.safetensors    arrays mean and logvar (or std, or var) of shape (N, D); optional
                                  test_mean, test_logvar (or test_std, test_var), labels (N,)
    DIR                           the same, one file an array: mean.npy, logvar.npy, ...
    PREFIXmean.npy                the same, beside it: PREFIXlogvar.npy, PREFIXtest_mean.npy, ...
    mean.npy,logvar.npy,...       the same, listed; the end of a file's name says which array it is

Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vaeq.errors import InputError, one_line
from vaeq.files.foreign import require_regular
from vaeq.files.npy import npz_names, read_npy, read_npz
from vaeq.posterior.aggregated import LARGEST_LOGVAR

if TYPE_CHECKING:
    from vaeq.measurement import Measurement
    from vaeq.posterior.shards import ShardedPosterior

SPREADS = ("logvar", "std", "var")
# Longest first: test_mean.npy is test_mean, and not the mean of something called test_.
_NAMES = ("test_logvar", "test_mean", "test_std", "test_var", "logvar", "labels", "mean", "std",
          "var")  # fmt: skip
_LARGEST_MEAN = 1e9
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Fewer values than this can be positive by chance.
_FEWEST_TO_SUSPECT = 10


class CodesWarning(UserWarning):
    """Codes that can be measured and are probably not what they are said to be."""


@dataclass(frozen=True)
class Codes:
    """Checked codes: float32 or float64, finite, of matching shapes, on one device."""

    mean: torch.Tensor  # (N, D)
    logvar: torch.Tensor  # (N, D)
    test_mean: torch.Tensor | None = None  # (M, D)
    test_logvar: torch.Tensor | None = None
    labels: torch.Tensor | None = None  # (N,), int64
    suspicions: tuple[str, ...] = ()


def as_codes(
    mean: Any,
    logvar: Any,
    test_mean: Any = None,
    test_logvar: Any = None,
    labels: Any = None,
) -> Codes:
    """Check arrays and make tensors of them.

    Args:
        mean, logvar: torch tensors or NumPy arrays, floating point, (N, D).
        test_mean, test_logvar: likewise (M, D), both or none.
        labels: integers (N,), or None.

    Raises:
        InputError: on what cannot be measured, naming the array, what it holds and the remedy.
    """
    tensors = {"mean": _tensor("mean", mean), "logvar": _tensor("logvar", logvar)}
    if (test_mean is None) != (test_logvar is None):
        given, lacking = ("test_mean", "test_logvar")[:: 1 if test_logvar is None else -1]
        raise InputError(f"{given} was given without {lacking}; give both or none.")
    if test_mean is not None:
        tensors["test_mean"] = _tensor("test_mean", test_mean)
        tensors["test_logvar"] = _tensor("test_logvar", test_logvar)
    for prefix in ("", "test_") if test_mean is not None else ("",):
        _check_pair(f"{prefix}mean", f"{prefix}logvar", tensors)
    dims = tensors["mean"].shape[1]
    if test_mean is not None and tensors["test_mean"].shape[1] != dims:
        raise InputError(
            f"test_mean must have as many dimensions as mean, {dims}, "
            f"got {tensors['test_mean'].shape[1]}."
        )
    dtype = torch.float32
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    device = tensors["mean"].device
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    found = [
        suspicion(name, tensor.numel(), float(tensor.min()), float(tensor.max()))
        for name, tensor in tensors.items()
        if name.endswith("logvar")
    ]
    return Codes(
        tensors["mean"],
        tensors["logvar"],
        tensors.get("test_mean"),
        tensors.get("test_logvar"),
        None if labels is None else _labels(labels, len(tensors["mean"])).to(device),
        tuple(text for text in found if text),
    )


def _tensor(name: str, values: Any) -> torch.Tensor:
    """A floating-point matrix as a tensor, finite and in range."""
    if not isinstance(values, torch.Tensor):
        array = np.asarray(values)
        if array.dtype.hasobject:
            raise InputError(
                f"{name} holds Python objects, which are not read; save it as a float array."
            )
        if array.dtype.kind != "f":
            raise InputError(_not_float(name, array.dtype))
        # Native byte order and one of torch's widths; a copy, since the array may be read-only.
        array = np.array(array, np.float64 if array.dtype.itemsize > 4 else np.float32, order="C")
        values = torch.from_numpy(array)
    values = values.detach()
    if values.dtype not in _FLOATS:  # those of 8 bits know no arithmetic
        raise InputError(_not_float(name, str(values.dtype).removeprefix("torch.")))
    if values.ndim != 2:
        raise InputError(
            f"{name} must have shape (N, D), a row an image, got shape {tuple(values.shape)}."
        )
    for letter, length in zip("ND", values.shape, strict=True):
        if length == 0:
            what = "images" if letter == "N" else "latent dimensions"
            raise InputError(
                f"{name} must have {letter} >= 1 {what}, got shape {tuple(values.shape)}."
            )
    # Both ends are NaN where a value is, and no mask as large as the codes is made of good ones.
    low, high = (float(end) for end in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = ~torch.isfinite(values)
        raise InputError(
            f"{name} must be finite, got {int(bad.sum())} NaN or infinite of {values.numel()} "
            f"values, the first at {_first(bad)}; drop or mend those rows."
        )
    largest = _LARGEST_MEAN if name.endswith("mean") else LARGEST_LOGVAR
    if name.endswith(("mean", "logvar")) and max(-low, high) > largest:
        row, column = _first(values.abs() > largest)
        raise InputError(
            f"{name} must be in [-{largest:g}, {largest:g}], got {values[row, column]:g} at "
            f"[{row}, {column}]; check its scale."
        )
    return values


def _not_float(name: str, dtype: object) -> str:
    return f"{name} must be floating point, got {dtype}; convert it, e.g. with astype('float32')."


def _first(mask: torch.Tensor) -> list[int]:
    found: list[int] = mask.nonzero()[0].tolist()
    return found


def _check_pair(mean: str, logvar: str, tensors: Mapping[str, torch.Tensor]) -> None:
    if tensors[mean].shape != tensors[logvar].shape:
        raise InputError(
            f"{mean} and {logvar} must have the same shape, got "
            f"{tuple(tensors[mean].shape)} and {tuple(tensors[logvar].shape)}."
        )


def _labels(labels: Any, images: int) -> torch.Tensor:
    if not isinstance(labels, torch.Tensor):
        array = np.asarray(labels)
        if array.dtype.kind not in "iub":
            raise InputError(
                f"labels must be integers, got {array.dtype}; "
                "number the classes 0, 1, 2, ... or leave labels out."
            )
        labels = torch.from_numpy(array.astype(np.int64))
    if labels.is_floating_point() or labels.is_complex():
        raise InputError(f"labels must be integers, got {labels.dtype}; convert them.")
    if labels.shape != (images,):
        raise InputError(
            f"labels must have shape ({images},), one an image of mean, got {tuple(labels.shape)}."
        )
    return labels.detach().to(torch.int64)


def suspicion(name: str, count: int, smallest: float, largest: float) -> str | None:
    """A log variance that is positive everywhere is probably a variance or a standard deviation.

    KL(q(z|x) ‖ p) is least at variance 1, so a trained encoder has log variances of 0 (collapsed
    dimensions, on either side of it) and below, and positive ones throughout only by mistake.
    """
    if count < _FEWEST_TO_SUSPECT or smallest <= 0:
        return None
    prefix = name.removesuffix("logvar")
    return (
        f"{name} is positive everywhere ({smallest:.3g} to {largest:.3g}), as a variance or a "
        f"standard deviation is and a log variance seldom; if it is one, pass its logarithm "
        f"(in a file, name it {prefix}var or {prefix}std)."
    )


def read_codes(source: str | os.PathLike[str]) -> Codes:
    """Codes from a file, a folder or a list of .npy files, as the module's first lines say.

    Raises:
        InputError: one sentence: what is missing or wrong, and what was found.
    """
    arrays = _read(str(source))
    text = one_line(str(source))
    if "mean" not in arrays.found:
        raise InputError(
            f"codes={text} has no array named mean; found {_listed(arrays.found)}. "
            "Name the means mean and the log variances logvar (or std, or var)."
        )
    spread = _spread(arrays, "", text)
    if spread is None:
        raise InputError(
            f"codes={text} has no array named logvar, std or var; found {_listed(arrays.found)}."
        )
    test_mean = arrays.get("test_mean") if "test_mean" in arrays.found else None
    labels = arrays.get("labels") if "labels" in arrays.found else None
    return as_codes(arrays.get("mean"), spread, test_mean, _spread(arrays, "test_", text), labels)


@dataclass(frozen=True)
class _Arrays:
    """Names of what a source holds, and how to read one of them."""

    found: tuple[str, ...]
    get: Callable[[str], Any]


def _spread(arrays: _Arrays, prefix: str, text: str) -> Any:
    """log σ² from whichever of logvar, std and var is there; None where none is."""
    given = [prefix + name for name in SPREADS if prefix + name in arrays.found]
    if not given:
        return None
    if len(given) > 1:
        raise InputError(f"codes={text} has {_listed(given)}; keep one of them.")
    return log_variance(given[0], arrays.get(given[0]))


def log_variance(name: str, values: Any) -> Any:
    """log σ² from the array of this name, which ends in logvar, std or var.

    Raises:
        InputError: a standard deviation or a variance is not positive.
    """
    if name.endswith("logvar"):
        return values
    values = _tensor(name, values)
    bad = values <= 0
    if bad.any():
        row, column = _first(bad)
        prefix = name.removesuffix("std").removesuffix("var")
        raise InputError(
            f"{name} must be > 0, got {values[row, column]:g} at [{row}, {column}]; "
            f"if it holds log variances, name it {prefix}logvar."
        )
    return values.double().log().to(values.dtype) * (2 if name.endswith("std") else 1)


def _listed(names: Any) -> str:
    shown = [one_line(str(name), 40) for name in names]
    if len(shown) > 8:
        shown = [*shown[:8], f"and {len(shown) - 8} more"]
    return ", ".join(shown) or "none"


def _read(source: str) -> _Arrays:
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


def _npy_files(files: Mapping[str, Path]) -> _Arrays:
    def get(name: str) -> Any:
        return read_npy(files[name], f"codes={one_line(str(files[name]))}")

    return _Arrays(tuple(files), get)


def _npz(path: Path, text: str) -> _Arrays:
    label = f"codes={text}"
    return _Arrays(npz_names(path, label), lambda name: read_npz(path, name, label))


def _safetensors(path: Path, text: str) -> _Arrays:
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
    return _Arrays(names, lambda name: read(lambda archive: archive.get_tensor(name)))


def measure_file(
    codes: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    shards: int | None = None,
    **settings: Any,
) -> Measurement:
    """Measure a file of codes, and write what was found as JSON.

    Args:
        codes: as for :func:`read_codes`.
        output: JSON file to write, whole or not at all; None to write none.
        shards: parts in which .npy files are read, each by a worker process; see
            :mod:`vaeq.posterior.shards`. None: 1, or as many as the free memory makes necessary.
        settings: of :func:`vaeq.measure`.

    Raises:
        InputError: on codes or an output that cannot be used; nothing is written then.
    """
    from vaeq.measurement import measure, measure_posterior
    from vaeq.posterior.shards import in_shards

    target = None if output is None else _writable(Path(output))
    with _explaining_memory(str(codes)):
        sharded = in_shards(str(codes), shards)
        if sharded is None:
            read = read_codes(codes)
            found = measure(
                read.mean, read.logvar, read.test_mean, read.test_logvar, read.labels, **settings
            )
        else:
            with sharded as posterior:
                test = _beside_shards(str(codes), posterior)
                found = measure_posterior(posterior, test, **settings)
    if target is not None:
        from vaeq.runs.record import dump, write_atomic

        write_atomic(target, dump(found.to_dict()))
    return found


@contextmanager
def _explaining_memory(source: str) -> Iterator[None]:
    """One sentence for memory that is used up, in the words of NumPy or of torch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(
            f"codes={one_line(source)} need more memory than there is; keep them as .npy files and "
            "add shards=16, or more."
        ) from None


def _beside_shards(source: str, posterior: ShardedPosterior) -> Codes:
    """The codes of held-out images and the labels, with one training image for company."""
    arrays = _read(source)
    test_mean = arrays.get("test_mean") if "test_mean" in arrays.found else None
    test_logvar = _spread(arrays, "test_", one_line(source))
    found = as_codes(*posterior.rows(torch.tensor([0])), test_mean, test_logvar)
    labels = _labels(arrays.get("labels"), posterior.n) if "labels" in arrays.found else None
    doubt = suspicion("logvar", posterior.n * posterior.latent_dim, *posterior.logvar_range)
    own = [text for text in found.suspicions if text.startswith("test_")]
    return replace(found, labels=labels, suspicions=tuple([doubt] if doubt else []) + tuple(own))


def _writable(path: Path) -> Path:
    """The path, if a file can be written there: asked before minutes are spent on its content."""
    text = one_line(str(path))
    if path.is_dir():
        raise InputError(f"output={text} is a folder; give a file, e.g. {text}/measure.json.")
    if not path.parent.is_dir():
        raise InputError(
            f"output={text} is in a folder that does not exist; make {path.parent} first."
        )
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"output={text} is in a folder that cannot be written; choose another.")
    return path


def warn_of(codes: Codes, stacklevel: int = 2) -> None:
    """Give the suspicions about some codes as warnings."""
    for text in codes.suspicions:
        warnings.warn(text, CodesWarning, stacklevel=stacklevel + 1)
