"""Synthetic run folders with the numbers of a real sweep, for the tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vaeq.config import SCHEMA_VERSION
from vaeq.files.checksum import BLANK, digest, file_digest, sealed

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


def full_panel(latent_dim: int, numbers: dict[str, Any]) -> dict[str, dict]:
    """What measure.panel=full and the quality of samples add."""
    moment = numbers["moment"]
    result = {
        "n_curve_slope": estimate(-0.9 if latent_dim > 4 else -0.05, 0.01, "nats/nat"),
        "reverse_marginal_kl": estimate(moment * 1.5, 0.02, "nats"),
        "class_kl_mean": estimate(numbers["kl"] - 2.3, 0.01, "nats"),
        "log_likelihood": estimate(numbers["elbo"] + 4.0, 0.3, "nats"),
        "inference_gap": estimate(4.0, 0.1, "nats"),
        "prior_cost": estimate(0.4 + moment, 0.05, "nats"),
        "ais_gap": estimate(0.3, 0.1, "nats"),
        "quality_mismatch": estimate(3.1, 0.4, "1"),
        "quality_recovered": estimate(2.2, 0.4, "1"),
    }
    for name, value, null, sd in (
        ("sliced_w2", 0.12 + 0.4 / latent_dim, 0.05 + 0.1 / latent_dim, 0.008),
        ("mmd", 0.06, 0.02, 0.004),
        ("energy_distance", 0.16, 0.04, 0.01),
        ("c2st_auc", 0.5 + 0.01 * math.log2(latent_dim), 0.5, 0.006),
    ):
        result[name] = estimate(value, sd / 4, "1")
        result[f"{name}_null"] = estimate(null, sd / 4, "1")
        result[f"{name}_null_sd"] = estimate(sd, sd / 8, "1")
        result[f"{name}_z"] = estimate((value - null) / sd, 0.3, "1")
    for i, source in enumerate(("train", "aggregated", "gmm", "prior", "scaled")):
        result[f"fid_{source}"] = estimate(2.0 + 2.5 * i, 0.2, "1")
        result[f"precision_{source}"] = estimate(0.95 - 0.05 * i, 0.01, "1")
        result[f"recall_{source}"] = estimate(0.94 - 0.06 * i, 0.01, "1")
        result[f"class_balance_{source}"] = estimate(0.001 + 0.01 * i, 0.001, "nats")
        result[f"entropy_{source}"] = estimate(0.05 + 0.06 * i, 0.004, "nats")
        result[f"no_digit_{source}"] = estimate(0.01 + 0.02 * i, 0.003, "1")
    return result


def curves_of(latent_dim: int, numbers: dict[str, Any], bins: int = 20) -> dict[str, Any]:
    """N-curve, classes and PIT histograms as vaeq.measure writes them."""
    n = [1000 * 2**i for i in range(6)] + [60_000]
    floor = [numbers["kl"] - math.log(each) for each in n]
    level = numbers["moment"] * 1.3
    u = [(i + 0.5) / bins for i in range(bins)]
    masses = []
    for j in range(latent_dim):
        tilt = [1 + 0.5 * math.cos(2 * math.pi * x) * (j + 1) / latent_dim for x in u]
        masses.append([each / sum(tilt) for each in tilt])
    return {
        "n_curve": {
            "n": n,
            "marginal_kl": [max(each, 0) + level for each in floor],
            "std_error": [0.01] * len(n),
            "mutual_information_fraction": [0.9] * len(n),
        },
        "by_class": {
            "label": list(range(10)),
            "n": [6000] * 10,
            "kl_per_image": [numbers["kl"]] * 10,
            "marginal_kl": [numbers["kl"] * (0.3 + 0.05 * k) for k in range(10)],
            "std_error": [0.02] * 10,
            "mutual_information_fraction": [0.7] * 10,
        },
        "pit": {"edges": [i / bins for i in range(bins + 1)], "mass": masses},
    }


def history_of(numbers: dict[str, Any], epochs: int = 10, divergence: bool = True) -> dict:
    """History by epoch; old records have no divergence in it."""
    left = [math.exp(-i / 3) for i in range(epochs)]
    history = {
        "epoch": list(range(1, epochs + 1)),
        "train_elbo": [numbers["elbo"] - 40 * each for each in left],
        "test_elbo": [numbers["elbo"] - 42 * each for each in left],
        "seconds": [3.0] * epochs,
    }
    if divergence:
        history["test_marginal_kl"] = [numbers["kl"] - numbers["mi"] + each for each in left]
        history["test_moment_kl"] = [numbers["moment"] + 0.5 * each for each in left]
    return history


def write_pictures(directory: Path, latent_dim: int, side: int = 28, n: int = 64) -> None:
    """Blobs where digits would be, with every key a run may write."""
    rng = np.random.default_rng(latent_dim)
    grid = np.linspace(-1, 1, side)

    def blobs(count: int) -> np.ndarray:
        x, y, width = rng.uniform(-0.4, 0.4, (3, count, 1, 1))
        spot = (grid[None, None, :] - x) ** 2 + (grid[None, :, None] - y) ** 2
        return (255 * np.exp(-spot / (0.08 + 0.1 * width**2))).astype(np.uint8)

    pictures = {name: blobs(n) for name in ("prior", "aggregated", "gmm", "scaled")}
    pictures |= {"originals": blobs(32), "reconstructions": blobs(32), "interpolations": blobs(80)}
    if latent_dim == 2:
        pictures["plane"] = blobs(400)
    save_file(pictures, directory / "pictures.safetensors", {"interpolation_steps": "10"})
    list_files(directory)


def full_sweep(
    folder: Path,
    dims: Sequence[int] = (2, 4, 8, 16, 32),
    depths: Sequence[int] = (1, 2, 3),
    seeds: Sequence[int] = (0, 1, 2),
    samples: int = 4000,
) -> Path:
    """A grid with everything a record may hold, noise over seeds, pictures for the first seed."""
    rng = np.random.default_rng(0)
    for latent_dim in dims:
        for depth in depths:
            for seed in seeds:
                wobble = float(rng.normal(1, 0.03))
                kl = 6.6 + 4.5 * math.log2(latent_dim / 2) * wobble
                mi = min(kl - 0.3 * latent_dim**0.4, LOG_N - 0.25)
                lower = 0.35 * (latent_dim / 2) ** 0.9 * wobble
                numbers = {
                    "kl": kl, "mi": mi, "dim": (0.2 * wobble - 0.008 * depth) / latent_dim,
                    "moment": 0.03 * latent_dim**0.6 * wobble, "active": min(latent_dim, 24),
                    "elbo": -145 + 13 * math.log2(latent_dim / 2) ** 0.7 + 2 * depth,
                    "bracket": (lower, lower * 1.2 + 0.01 * latent_dim),
                }  # fmt: skip
                directory = write_run(
                    folder, latent_dim, seed, numbers, samples if seed == 0 else 0,
                    full=True, encoder_depth=depth,
                )  # fmt: skip
                if seed == 0:
                    write_pictures(directory, latent_dim)
    return folder


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
        "schema_version": SCHEMA_VERSION,
        "state": "complete",
        "config": config,
        # As the names of the folders below have it.
        "config_hash": f"0123abcd{digest(json.dumps(config))[8:]}",
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
            "active": [
                j < (estimates.get("active_units", {}).get("value") or dim) for j in range(dim)
            ],
        },
        "curves": {},
        "files": {},
    }


def write_run(
    folder: Path,
    latent_dim: int,
    seed: int = 0,
    numbers: dict[str, Any] | None = None,
    samples: int = 0,
    full: bool = False,
    **settings: Any,
) -> Path:
    """One complete run directory; ``numbers`` replace those of the default sweep."""
    base = DEFAULT_RUNS.get(latent_dim, DEFAULT_RUNS[8]) | (numbers or {})
    config = config_of(latent_dim, seed, **settings)
    estimates = estimates_of(latent_dim, base)
    extra = ",".join(f"{name}={value}" for name, value in settings.items())
    directory = folder / f"latent_dim={latent_dim},{extra},seed={seed}-0123abcd"
    directory.mkdir(parents=True)
    record = record_of(config, estimates)
    if full:
        record["estimates"] |= full_panel(latent_dim, base)
        record["curves"] = curves_of(latent_dim, base)
        record["history"] = history_of(base)
    write_json(directory / "record.json", record)
    write_status(directory, "complete", 10)
    if samples:
        write_samples(directory, latent_dim, samples)
    return directory


def write_status(directory: Path, state: str, epoch: int, epochs: int = 10, **more: Any) -> None:
    """A status.json."""
    status = {"state": state, "epoch": epoch, "epochs": epochs, "config_hash": "0123abcd"} | more
    write_json(directory / "status.json", status | {"updated_at": "2025-01-01T00:00:00+00:00"})


def write_json(path: Path, content: Any) -> None:
    """JSON, sealed, into a file whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed(json.dumps({"seal": ""} | content | {"seal": BLANK}).encode()))


def list_files(directory: Path) -> None:
    """Let the record vouch for what lies beside it."""
    path = directory / "record.json"
    files = {file.name: file_digest(file) for file in directory.glob("*.safetensors")}
    write_json(path, json.loads(path.read_bytes()) | {"files": files})


def write_samples(directory: Path, latent_dim: int, n: int) -> None:
    """Ten clusters, nearly N(0, I) in sum."""
    rng = np.random.default_rng(latent_dim)
    centres = rng.normal(size=(10, latent_dim)) * 0.95
    label = rng.integers(0, 10, size=n).astype(np.uint8)
    z = centres[label] + 0.45 * rng.normal(size=(n, latent_dim))
    save_file({"z": z.astype(np.float32), "label": label}, directory / "samples.safetensors")
    list_files(directory)


def default_sweep(folder: Path, samples: int = 0) -> Path:
    """The three runs of ``vaeq sweep latent_dim=2,8,32``, one seed."""
    for latent_dim in DEFAULT_RUNS:
        write_run(folder, latent_dim, samples=samples)
    return folder
