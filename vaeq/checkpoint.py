"""The state of a training run in one safetensors file: weights, Adam's moments, history.

One file, renamed into place, so that weights and history can never come from different epochs, and
sealed, so that no bit of them changes unnoticed. No pickle is read or written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vaeq.checksum import BLANK, DamagedFile, check_seal, sealed
from vaeq.ensemble import Moments
from vaeq.errors import InputError
from vaeq.record import CHECKPOINT, write_listed
from vaeq.train import HISTORY_COLUMNS, State


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
        "step": json.dumps(state.moments.step),
        "final": json.dumps(final),
    }
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
    try:
        check_seal(path.read_bytes())
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("config_hash") != config_hash:
            raise ValueError("it belongs to another configuration")
        history = json.loads(metadata["history"])
        if not all(tuple(row) == HISTORY_COLUMNS for row in history):
            raise ValueError("its history has other columns")
        state.vae.load_state_dict(_part(tensors, "model."))
        state.best = _part(tensors, "best.") or None
        if not json.loads(metadata["final"]):
            state.moments = _moments(state, tensors, int(metadata["step"]))
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    except DamagedFile as error:
        raise DamagedFile(f"{path} {error}.") from None
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedFile(f"{path} cannot be used: {reason}.") from None
    state.history = history


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _moments(state: State, tensors: dict[str, Tensor], step: int) -> Moments:
    """Adam's state, on the device of the weights."""
    parts = []
    for prefix in ("exp_avg.", "exp_avg_sq."):
        part = _part(tensors, prefix)
        parts.append({name: part[name].to(p) for name, p in state.vae.named_parameters()})
    return Moments(step, *parts)
