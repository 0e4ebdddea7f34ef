"""Synthetic run folders with the numbers of a real sweep, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LOG_N = math.log(60_000)

# kl_per_image, mutual_information, moment_kl, active units, bracket: an MLP 2×500 on MNIST.
DEFAULT_RUNS: dict[int, dict[str, Any]] = {
    2: {"kl": 6.62, "mi": 6.289, "dim": 0.1042, "moment": 0.043, "active": 2,
        "elbo": -143.9, "bracket": (0.33, 0.47)},
    8: {"kl": 16.42, "mi": 10.88, "dim": 0.0118, "moment": 0.21, "active": 8,
        "elbo": -105.2, "bracket": (1.6, 6.6)},
    32: {"kl": 19.02, "mi": 10.97, "dim": 0.00412, "moment": 0.32, "active": 21,
         "elbo": -101.3, "bracket": (2.2, 10.2)},
}  # fmt: skip


def estimate(value: float | None, error: float | None, unit: str, reason: str = "") -> dict:
    """One entry of ``estimates``."""
    entry = {"value": value, "std_error": error, "unit": unit}
    return entry | ({"reason": reason} if reason else {})


def estimates_of(latent_dim: int, numbers: dict[str, Any]) -> dict[str, dict]:
    """All estimates of a run from a few, the identities of the decomposition kept."""
    kl, mi, dim = numbers["kl"], numbers["mi"], numbers["dim"]
    active = numbers["active"]
    marginal = kl - mi
    result = {
        "elbo": estimate(numbers["elbo"], 0.31, "nats"),
        "reconstruction": estimate(numbers["elbo"] + kl, 0.3, "nats"),
        "kl_per_image": estimate(kl, 0.0, "nats"),
        "mutual_information": estimate(mi, 0.011, "nats"),
        "mutual_information_fraction": estimate(mi / LOG_N, 0.001, "1"),
        "marginal_kl": estimate(marginal, 0.011, "nats"),
        "total_correlation": estimate(marginal - dim * latent_dim, 0.011, "nats"),
        "dimension_kl_sum": estimate(dim * latent_dim, 0.0, "nats"),
        "dimension_kl_mean": estimate(dim, 0.0, "nats/dimension"),
        "dimension_kl_max": estimate(dim * 1.9, 0.0, "nats"),
        "dimension_kl_mean_active": estimate(dim * 1.2, 0.0, "nats/dimension"),
        "active_units": estimate(active, 0.0, "dimensions"),
        "moment_kl": estimate(numbers["moment"], 0.0, "nats"),
    }
    if active == 0:
        result["dimension_kl_mean_active"] = estimate(
            None, None, "nats/dimension", "no dimension is active"
        )
    if "bracket" in numbers:
        low, high = numbers["bracket"]
        result["population_kl_lower"] = estimate(low, 0.01, "nats")
        result["population_kl_upper"] = estimate(high, 0.05, "nats")
    return result


def config_of(latent_dim: int, seed: int, **more: Any) -> dict[str, Any]:
    """A resolved config with the default settings."""
    config: dict[str, Any] = {
        "latent_dim": latent_dim,
        "encoder_depth": 2,
        "encoder_width": 500,
        "decoder_depth": 2,
        "decoder_width": 500,
        "activation": "relu",
        "beta": 1.0,
        "epochs": 10,
        "batch_size": 128,
        "learning_rate": 0.001,
        "seed": seed,
        "device": "cpu",
        "threads": 1,
        "precision": "fp32",
        "experiment": "default",
        "data": {"name": "mnist", "root": None, "binarize": "none"},
    }
    return config | more


def record_of(config: dict[str, Any], estimates: dict[str, dict]) -> dict[str, Any]:
    """A complete record."""
    dim = config["latent_dim"]
    mean = estimates.get("dimension_kl_mean", {}).get("value") or 0.01
    return {
        "schema_version": 1,
        "state": "complete",
        "config": config,
        "config_hash": f"{abs(hash(json.dumps(config))):064x}",
        "provenance": {
            "vaeq": "0.1.0",
            "torch": "2.9.0",
            "python": "3.11.2",
            "device": "cpu",
            "threads": 1,
            "data": {"name": "mnist", "md5": "0" * 32, "n_train": 60000, "n_test": 10000},
        },
        "timing": {"train_seconds": 30.0, "measure_seconds": 5.0, "total_seconds": 36.0},
        "history": {"epoch": [1, 2], "train_elbo": [-160.0, -150.0]},
        "estimates": estimates,
        "per_dimension": {
            "kl": [mean * (0.1 + 1.8 * j / max(dim - 1, 1)) for j in range(dim)],
            "active": [True] * dim,
        },
        "curves": {},
    }


def write_run(
    folder: Path,
    latent_dim: int,
    seed: int = 0,
    numbers: dict[str, Any] | None = None,
    samples: int = 0,
    **settings: Any,
) -> Path:
    """One complete run directory; ``numbers`` replace those of the default sweep."""
    base = DEFAULT_RUNS.get(latent_dim, DEFAULT_RUNS[8])
    config = config_of(latent_dim, seed, **settings)
    estimates = estimates_of(latent_dim, base | (numbers or {}))
    extra = ",".join(f"{name}={value}" for name, value in settings.items())
    directory = folder / f"latent_dim={latent_dim},{extra},seed={seed}-0123abcd"
    directory.mkdir(parents=True)
    write_json(directory / "record.json", record_of(config, estimates))
    write_status(directory, "complete", 10)
    if samples:
        write_samples(directory, latent_dim, samples)
    return directory


def write_status(directory: Path, state: str, epoch: int, epochs: int = 10, **more: Any) -> None:
    """A status.json."""
    status = {"state": state, "epoch": epoch, "epochs": epochs} | more
    write_json(directory / "status.json", status | {"updated_at": "2025-01-01T00:00:00+00:00"})


def write_json(path: Path, content: Any) -> None:
    """JSON into a file whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_samples(directory: Path, latent_dim: int, n: int) -> None:
    """Ten clusters, nearly N(0, I) in sum."""
    rng = np.random.default_rng(latent_dim)
    centres = rng.normal(size=(10, latent_dim)) * 0.95
    label = rng.integers(0, 10, size=n).astype(np.uint8)
    z = centres[label] + 0.45 * rng.normal(size=(n, latent_dim))
    save_file({"z": z.astype(np.float32), "label": label}, directory / "samples.safetensors")


def default_sweep(folder: Path, samples: int = 0) -> Path:
    """The three runs of ``vaeq sweep latent_dim=2,8,32``, one seed."""
    for latent_dim in DEFAULT_RUNS:
        write_run(folder, latent_dim, samples=samples)
    return folder
