"""The state of a training run in one safetensors file: weights, Adam's moments, history.

One file, renamed into place, so that weights and history can never come from different epochs, and
sealed, so that no bit of them changes unnoticed. No pickle is read or written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vaeq.errors import InputError, one_line
from vaeq.files.checksum import BLANK, DamagedFile, check_seal, sealed
from vaeq.files.foreign import require_regular
from vaeq.runs.record import CHECKPOINT, write_listed
from vaeq.training.ensemble import Moments
from vaeq.training.loop import HISTORY_COLUMNS, State


def save_checkpoint(directory: Path, state: State, config_hash: str, *, final: bool) -> str:
    """Write the state after an epoch; a final one keeps the weights and drops the optimizer.

    Returns the SHA-256 of the file.
    """
    tensors = {f"model.{name}": value for name, value in state.vae.state_dict().items()}
    if not final:
        parts = {
            "exp_avg.": state.moments.exp_avg,
            "exp_avg_sq.": state.moments.exp_avg_sq,
            "best.": state.best or {},
        }
        tensors |= {prefix + name: v for prefix, part in parts.items() for name, v in part.items()}
    metadata = {
        "history": json.dumps(state.history),
        "final": json.dumps(final),
    }
    if not final:
        # With the moments: one that is finished again after a kill has none, and the same bits.
        metadata["step"] = json.dumps(state.moments.step)
    return save_weights(directory, tensors, config_hash, metadata)


def save_weights(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config_hash: str,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write tensors as a sealed checkpoint of a configuration; returns the SHA-256 of the file."""
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    head = {"seal": BLANK, "config_hash": config_hash, **(metadata or {})}
    return write_listed(directory / CHECKPOINT, sealed(save(contiguous, head)))


def load_checkpoint(directory: Path, state: State, config_hash: str) -> None:
    """Bring ``state`` to where the checkpoint in ``directory`` stands; no file leaves it as it is.

    Raises:
        DamagedFile: its content is not what was written, or belongs to another configuration or
            model.
        InputError: the system does not hand it out.
    """
    path = directory / CHECKPOINT
    like = state.vae.state_dict()
    try:
        require_regular(path)
        check_seal(path.read_bytes())
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: _tensor(file, name, like) for name in file.keys()}  # noqa: SIM118
        if metadata.get("config_hash") != config_hash:
            raise ValueError("it belongs to another configuration")
        history = _history(json.loads(metadata["history"]))
        state.vae.load_state_dict(_part(tensors, "model."))
        state.best = _part(tensors, "best.") or None
        if state.best is not None and state.best.keys() != like.keys():
            raise ValueError("its best weights are not all there")
        if not json.loads(metadata["final"]):
            state.moments = _moments(state, tensors, int(metadata["step"]))
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    except DamagedFile as error:
        raise DamagedFile(f"{path} {error}.") from None
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedFile(f"{path} cannot be used: {one_line(str(error), 100)}.") from None
    state.history = history


def _tensor(file: Any, name: str, like: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the file, read only where the model has one of its name and shape."""
    part, _, rest = name.partition(".")
    known = like.get(rest) if part in ("model", "exp_avg", "exp_avg_sq", "best") else None
    if known is None or list(known.shape) != file.get_slice(name).get_shape():
        raise ValueError("it belongs to another network")
    tensor: Tensor = file.get_tensor(name)
    if tensor.dtype != known.dtype:
        raise ValueError(f"its weights are {tensor.dtype}, not {known.dtype}")
    return tensor


def _history(rows: Any) -> list[dict[str, float]]:
    """The rows, if each has the columns of an epoch and a number in every one."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("its history is no list of epochs")
    if not all(tuple(row) == HISTORY_COLUMNS for row in rows):
        raise ValueError("its history has other columns")
    if not all(type(value) in (int, float) for row in rows for value in row.values()):
        raise ValueError("its history holds something else than numbers")
    return rows


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _moments(state: State, tensors: dict[str, Tensor], step: int) -> Moments:
    """Adam's state, on the device of the weights."""
    if step < 0:
        raise ValueError("it has done fewer steps than none")
    parts = []
    for prefix in ("exp_avg.", "exp_avg_sq."):
        part = _part(tensors, prefix)
        parts.append({name: part[name].to(p) for name, p in state.vae.named_parameters()})
    return Moments(step, *parts)
