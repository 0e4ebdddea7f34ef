"""From YAML to typed settings: presets compose, published ones into what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import open_dict, read_write

from vaeq.compose import register_schemas, typed
from vaeq.config import RunConfig, SweepConfig

FOLDER = Path(__file__).parents[1] / "configs" / "experiment"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset(name: str) -> tuple[RunConfig, dict[str, Any]]:
    """The settings of a preset, and the values that it sweeps over."""
    register_schemas()
    with initialize_config_module("vaeq.configs", version_base="1.3"):
        cfg = compose("sweep", [f"experiment={name}"], return_hydra_config=True)
    swept = dict(cfg.hydra.sweeper.params or {})
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return typed(cfg, SweepConfig).run_config(), swept


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_and_is_kept_in_a_folder_of_its_name(name: str) -> None:
    assert preset(name)[0].experiment == name


def test_the_published_presets_have_the_published_settings() -> None:
    surgery, swept = preset("elbo_surgery")
    assert swept["latent_dim"] == "2,10,20"
    assert surgery.data.n_train == 50_000  # its ceiling is log 50,000
    assert surgery.data.binarize == "static"

    pythae, _ = preset("pythae_vae")
    networks = (pythae.encoder_depth, pythae.encoder_width, pythae.activation)
    assert networks == (pythae.decoder_depth, pythae.decoder_width, "relu") == (1, 400, "relu")
    assert (pythae.latent_dim, pythae.batch_size, pythae.learning_rate) == (40, 100, 1e-4)
    assert (pythae.epochs, pythae.data.binarize) == (500, "static")
    assert pythae.generation.n_importance == 200

    burda, _ = preset("burda_vae")
    networks = (burda.encoder_depth, burda.encoder_width, burda.activation)
    assert networks == (burda.decoder_depth, burda.decoder_width, "tanh") == (2, 200, "tanh")
    assert (burda.latent_dim, burda.batch_size, burda.learning_rate) == (50, 20, 1e-3)
    assert (burda.epochs, burda.schedule, burda.data.binarize) == (3280, "burda", "dynamic")
    assert burda.initialization == "mean_image"
    assert burda.generation.n_importance == 5000
