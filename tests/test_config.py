"""Settings: ranges, the hash of what changes the science, names of run directories."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vaeq.config import (
    DataConfig,
    RunConfig,
    SweepConfig,
    config_hash,
    identified,
    keys_of,
    run_name,
    science,
)
from vaeq.errors import InputError


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latent_dim": -3}, "latent_dim must be an integer between 1 and 4096, got -3."),
        ({"latent_dim": 0}, "latent_dim must be an integer between 1 and 4096, got 0."),
        ({"epochs": 0}, "epochs must be an integer between 1 and 1000000, got 0."),
        ({"learning_rate": float("nan")}, "learning_rate must be a number > 0 and <= 10, got nan."),
        ({"learning_rate": float("inf")}, "learning_rate must be a number > 0 and <= 10, got inf."),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0 and <= 10, got 0.0."),
        ({"beta": -0.1}, "beta must be a number between 0 and 1000000, got -0.1."),
        ({"early_stopping": 0}, "early_stopping must be an integer >= 1, or null, got 0."),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got gpu."),
        ({"kl_warmup_epochs": 11}, "kl_warmup_epochs must be at most epochs=10, got 11."),
    ],
)
def test_a_value_out_of_range_gives_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        RunConfig(**changes)
    assert str(caught.value) == sentence


def test_choices_are_listed() -> None:
    with pytest.raises(InputError, match=r"activation must be one of relu, .*, tanh, got step"):
        RunConfig(activation="step")
    with pytest.raises(InputError, match=r"data\.binarize must be one of none, dynamic, static"):
        DataConfig(binarize="maybe")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 101])
def test_an_experiment_stays_a_folder_of_outputs(name: str) -> None:
    with pytest.raises(InputError, match="experiment must be a plain folder name"):
        RunConfig(experiment=name)


def test_depth_zero_is_legal() -> None:
    assert RunConfig(encoder_depth=0, decoder_depth=0).encoder_depth == 0


def test_the_hash_knows_every_setting_that_changes_the_science() -> None:
    config = RunConfig()
    base = config_hash(config)
    different: dict[str, Any] = {
        "latent_dim": 3,
        "encoder_depth": 1,
        "encoder_width": 1,
        "decoder_depth": 1,
        "decoder_width": 1,
        "activation": "tanh",
        "initialization": "torch",
        "beta": 2.0,
        "kl_warmup_epochs": 1,
        "epochs": 11,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "learning_rate_warmup_steps": 1,
        "schedule": "cosine",
        "early_stopping": 1,
        "seed": 1,
        "precision": "bf16",
        "data": DataConfig(binarize="static"),
        "measure": replace(config.measure, n_samples=3),
        "generation": replace(config.generation, quality=False),
        "model": "ppca",
    }
    same: dict[str, Any] = {
        "device": "cpu",
        "threads": 2,
        "outputs": "elsewhere",
        "experiment": "other",
        "logger": "tensorboard",
        "kernels": "torch",
    }
    # A new setting must be put on one side or the other, here.
    assert different.keys() | same.keys() == asdict(config).keys()
    hashes = {config_hash(replace(config, **{name: value})) for name, value in different.items()}
    assert len(hashes) == len(different)
    assert base not in hashes
    assert all(config_hash(replace(config, **{n: v})) == base for n, v in same.items())
    elsewhere = replace(config, data=DataConfig(root="/tmp", download=True))
    assert config_hash(elsewhere) == base


def test_a_run_on_files_is_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    grey = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4)
    configs = []
    for i, images in enumerate((grey, grey + np.uint8(1), grey)):
        file = tmp_path / f"{i}.npz"
        np.savez(file, train_images=images, test_images=grey)
        configs.append(RunConfig(data=DataConfig(name="npz", path=str(file))))
    first, other, copy = identified(configs)
    assert config_hash(first) == config_hash(copy) != config_hash(other)
    assert first.data.path != copy.data.path
    # Once known it is not looked for again, and data sets that ship with vaeq need none.
    Path(str(first.data.path)).unlink()
    assert identified([first, RunConfig()]) == [first, RunConfig()]
    with pytest.raises(InputError, match=r"0\.npz does not exist"):
        identified(configs)


def test_settings_that_came_later_leave_older_hashes_alone() -> None:
    later = {name for name, (spec, _, _) in keys_of(RunConfig).items() if spec.later}
    assert {"data.md5", "data.split", "data.synthetic_dim"} <= later
    assert not {f"data.{name}" for name in science(DataConfig())} & later
    drawn = DataConfig(name="synthetic_ppca", synthetic_side=9)
    assert science(drawn)["synthetic_side"] == 9


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "npz"}, "data.path is missing; data=npz needs its .npz file there."),
        ({"path": "x"}, "data.path is a setting of data=idx and data=npz, got data=mnist; drop"),
        ({"name": "emnist"}, "data.split is missing; data=emnist has byclass, bymerge, balanced,"),
        ({"synthetic_side": 9}, "data.synthetic_side is a setting of data=synthetic_ppca, got"),
        (
            {"name": "synthetic_ppca", "synthetic_dim": 64},
            "data.synthetic_dim must be below the 64 pixels of its images, got 64",
        ),
        ({"md5": "abc"}, "data.md5 must be 32 hexadecimal digits, or null, got abc."),
    ],
)
def test_settings_of_data_sets_go_together(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        DataConfig(**changes)
    assert sentence in str(caught.value)


def test_run_names_carry_the_axes_and_the_hash() -> None:
    config = RunConfig(latent_dim=8, encoder_depth=3, encoder_width=64, seed=5)
    words = "latent_dim=8,encoder_depth=3,encoder_width=64,seed=5-"
    assert run_name(config) == words + config_hash(config)[:8]
    assert run_name(config) != run_name(replace(config, decoder_depth=1))


def test_a_sweep_config_gives_its_run_config() -> None:
    config = SweepConfig(latent_dim=4, n_jobs=2)
    assert config.run_config() == RunConfig(latent_dim=4)


def test_every_key_is_described() -> None:
    keys = keys_of(SweepConfig)
    assert {"latent_dim", "data.binarize", "measure.panel", "n_jobs"} <= keys.keys()
    assert all(len(spec.help) > 10 for spec, _, _ in keys.values())
