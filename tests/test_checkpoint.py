"""Checkpoints: everything comes back, nothing foreign or broken is taken in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.test_train import fresh, train, weights
from vaeq.data.images import Images
from vaeq.errors import InputError
from vaeq.runs.record import CHECKPOINT
from vaeq.training.checkpoint import load_checkpoint, save_checkpoint


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, small: Images) -> None:
    whole = train(small, epochs=4)
    save_checkpoint(tmp_path, train(small, epochs=2), "hash", final=False)
    resumed = fresh(seed=99)
    load_checkpoint(tmp_path, resumed, "hash")
    assert resumed.epoch == 2
    train(small, resumed, epochs=4)
    assert torch.equal(weights(whole), weights(resumed))


def test_the_best_weights_of_early_stopping_come_back(tmp_path: Path, small: Images) -> None:
    state = train(small, epochs=2, early_stopping=1)
    save_checkpoint(tmp_path, state, "hash", final=False)
    again = fresh(seed=99)
    load_checkpoint(tmp_path, again, "hash")
    assert state.best is not None
    assert again.best is not None
    assert again.best.keys() == state.best.keys()
    assert all(torch.equal(again.best[name], value) for name, value in state.best.items())


def metadata(path: Path) -> dict[str, str]:
    """What a checkpoint says of itself, but for the seal, which hangs on the order of it."""
    with safe_open(path, framework="pt") as file:
        return {name: value for name, value in file.metadata().items() if name != "seal"}


def test_a_final_checkpoint_has_the_weights_alone(tmp_path: Path, small: Images) -> None:
    state = train(small)
    save_checkpoint(tmp_path, state, "hash", final=False)
    size = (tmp_path / CHECKPOINT).stat().st_size
    save_checkpoint(tmp_path, state, "hash", final=True)
    # Weights and two moments of the same shapes become weights.
    assert (tmp_path / CHECKPOINT).stat().st_size < 0.4 * size
    again = fresh(seed=99)
    load_checkpoint(tmp_path, again, "hash")
    assert torch.equal(weights(again), weights(state))
    assert again.history == state.history
    # Finished once more, after a kill before its record was written, it says the same.
    before = metadata(tmp_path / CHECKPOINT)
    save_checkpoint(tmp_path, again, "hash", final=True)
    assert metadata(tmp_path / CHECKPOINT) == before


def test_no_checkpoint_leaves_the_state_as_it_is(tmp_path: Path) -> None:
    state = fresh()
    before = weights(state)
    load_checkpoint(tmp_path, state, "hash")
    assert state.epoch == 0
    assert torch.equal(before, weights(state))


def test_a_foreign_or_broken_checkpoint_is_refused(tmp_path: Path, small: Images) -> None:
    save_checkpoint(tmp_path, train(small, epochs=1), "hash", final=False)
    with pytest.raises(InputError, match="it belongs to another configuration"):
        load_checkpoint(tmp_path, fresh(), "other")
    file = tmp_path / CHECKPOINT
    content = file.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"\xff" * 100):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=r"checkpoint\.safetensors is (damaged|empty)"):
            load_checkpoint(tmp_path, fresh(), "hash")
