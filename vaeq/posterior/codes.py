"""Codes from anybody's encoder: means and variances, checked once, at the edge."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vaeq.errors import InputError, one_line
from vaeq.posterior.aggregated import LARGEST_LOGVAR
from vaeq.posterior.sources import SPREADS, Arrays, find_arrays

if TYPE_CHECKING:
    from vaeq.posterior.shards import ShardedPosterior

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
    """Codes from a file, a folder or a list of .npy files, as :mod:`vaeq.posterior.sources` says.

    Raises:
        InputError: one sentence: what is missing or wrong, and what was found.
    """
    arrays = find_arrays(str(source))
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


def read_beside(source: str, posterior: ShardedPosterior) -> Codes:
    """What a source in shards holds beside them: codes of held-out images and labels, of any size.

    One training image keeps them company.
    """
    arrays = find_arrays(source)
    test_mean = arrays.get("test_mean") if "test_mean" in arrays.found else None
    test_logvar = _spread(arrays, "test_", one_line(source))
    found = as_codes(*posterior.rows(torch.tensor([0])), test_mean, test_logvar)
    labels = _labels(arrays.get("labels"), posterior.n) if "labels" in arrays.found else None
    doubt = suspicion("logvar", posterior.n * posterior.latent_dim, *posterior.logvar_range)
    own = [text for text in found.suspicions if text.startswith("test_")]
    return replace(found, labels=labels, suspicions=tuple([doubt] if doubt else []) + tuple(own))


def _spread(arrays: Arrays, prefix: str, text: str) -> Any:
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


def warn_of(codes: Codes, stacklevel: int = 2) -> None:
    """Give the suspicions about some codes as warnings."""
    for text in codes.suspicions:
        warnings.warn(text, CodesWarning, stacklevel=stacklevel + 1)
