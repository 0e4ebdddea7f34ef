"""One sweep point, end to end: the only place that joins data, model and measures."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save

from vaeq import __version__
from vaeq.checkpoint import load_checkpoint, save_checkpoint
from vaeq.config import RunConfig, config_hash, run_name
from vaeq.data import Images, load_images
from vaeq.elbo import held_out_elbo
from vaeq.errors import InputError, VaeqError
from vaeq.measurement import measure
from vaeq.model import VAE, encode_all
from vaeq.progress import Event
from vaeq.record import (
    SAMPLES,
    RunRecord,
    columns,
    complete_record,
    require_writable,
    run_directory,
    write_atomic,
    write_config,
    write_history,
    write_record,
    write_status,
)
from vaeq.seeds import derive_seed
from vaeq.train import State, fit

Notify = Callable[[Event], None]
# Samples of q(z|x) kept for the pictures of the report.
_KEPT_SAMPLES = 10_000


def resolve_device(name: str) -> torch.device:
    """The torch device of a config's ``device``.

    Raises:
        InputError: a GPU was asked for by name and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={name} is not available: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; use device=cpu or device=auto."
        )
    return device


def prepare(config: RunConfig) -> tuple[torch.device, Images]:
    """What a run needs from outside; every InputError about it comes before anything is written."""
    device = resolve_device(config.device)
    return device, load_images(**asdict(config.data))


def build(config: RunConfig, pixels: int, device: torch.device) -> State:
    """A model with its initial weights and a fresh optimizer."""
    vae = VAE(
        pixels,
        config.latent_dim,
        encoder_depth=config.encoder_depth,
        encoder_width=config.encoder_width,
        decoder_depth=config.decoder_depth,
        decoder_width=config.decoder_width,
        activation=config.activation,
        initialization=config.initialization,
        generator=torch.Generator().manual_seed(derive_seed(config.seed, "weights")),
    ).to(device)
    return State(vae, torch.optim.Adam(vae.parameters(), lr=config.learning_rate, fused=True))


def run(config: RunConfig, notify: Notify, threads: int) -> RunRecord:
    """Train, measure and record one configuration, or return the record it already has.

    A run that was killed goes on from its last epoch. A failure is recorded and raised again.

    Args:
        notify: receives an Event a step; it must be quick.
        threads: CPU threads of this process; part of what makes weights bit-identical.

    Raises:
        InputError: the device, the data or the folder cannot be used; nothing is written.
        TrainingDiverged: the loss is not finite; the run is recorded as failed.
    """
    torch.set_num_threads(threads)
    directory = run_directory(config)
    found = complete_record(directory, config)
    if found is not None:
        notify(Event("skipped", run_name(config), message="finished before"))
        return found
    device, images = prepare(config)
    images = images.to(device)
    require_writable(directory.parent)
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):
        # Another process may have finished it while this one waited for the lock.
        found = complete_record(directory, config)
        if found is not None:
            notify(Event("skipped", run_name(config), message="finished by another process"))
            return found
        write_config(directory, config)
        state = _resume(config, directory, images.pixels, device, notify)
        provenance = _provenance(device, images, threads)
        try:
            _train(config, directory, state, images, notify)
            record = _measure(config, directory, state, images, notify, provenance)
        except Exception as error:
            _fail(config, directory, state, provenance, error)
            raise
        write_record(directory, record)
        write_status(directory, "complete", state.epoch, config.epochs)
    notify(Event("complete", run_name(config), message=_summary(record)))
    return record


def _provenance(device: torch.device, images: Images, threads: int) -> dict[str, Any]:
    return {
        "vaeq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.machine(),
        "threads": threads,
        "data": {
            "name": images.name,
            "md5": images.md5,
            "n_train": len(images.train),
            "n_test": len(images.test),
        },
    }


def _resume(
    config: RunConfig, directory: Path, pixels: int, device: torch.device, notify: Notify
) -> State:
    """The state at the last epoch on disk, or at the beginning."""
    state = build(config, pixels, device)
    try:
        load_checkpoint(directory, state, config_hash(config))
    except InputError as error:
        notify(Event("note", run_name(config), message=f"{error} Training afresh."))
        return build(config, pixels, device)
    return state


def _train(
    config: RunConfig, directory: Path, state: State, images: Images, notify: Notify
) -> None:
    name, identity, n = run_name(config), config_hash(config), len(images.train)
    first = state.epoch

    def event(kind: str, epoch: int, seen: int, elbo: float | None = None) -> None:
        total = (config.epochs - first) * n
        notify(Event(kind, name, epoch, config.epochs, seen, total, elbo))

    def on_images(epoch: int, done: int) -> None:
        event("images", epoch, (epoch - 1 - first) * n + done)

    def on_epoch(state: State) -> None:
        save_checkpoint(directory, state, identity, final=False)
        write_history(directory, state.history)
        write_status(directory, "running", state.epoch, config.epochs)
        event("epoch", state.epoch, (state.epoch - first) * n, state.history[-1]["test_elbo"])

    write_status(directory, "running", first, config.epochs)
    event("start", first, 0)
    # Adam's moments of pixels that are never lit decay into denormals, which cost 100 cycles each.
    torch.set_flush_denormal(True)
    try:
        fit(
            state,
            images,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=config.seed,
            beta=config.beta,
            kl_warmup_epochs=config.kl_warmup_epochs,
            schedule=config.schedule,
            early_stopping=config.early_stopping,
            bf16=config.precision == "bf16",
            on_images=on_images,
            on_epoch=on_epoch,
        )
    finally:
        torch.set_flush_denormal(False)
    save_checkpoint(directory, state, identity, final=True)


def _measure(
    config: RunConfig,
    directory: Path,
    state: State,
    images: Images,
    notify: Notify,
    provenance: dict[str, Any],
) -> RunRecord:
    began = time.perf_counter()
    notify(Event("stage", run_name(config), message="measuring"))
    mean, logvar = encode_all(state.vae, images.observed("train"))
    held_out = images.observed("test")
    test_mean, test_logvar = encode_all(state.vae, held_out)
    generator = torch.Generator(mean.device).manual_seed(derive_seed(config.seed, "measure"))
    elbo = held_out_elbo(state.vae.decode, test_mean, test_logvar, held_out, generator)
    found = measure(
        mean,
        logvar,
        test_mean,
        test_logvar,
        images.train_labels,
        n_samples=config.measure.n_samples,
        seed=derive_seed(config.seed, "codes"),
        panel=config.measure.panel,
        flow=config.measure.flow,
    ).to_dict()
    kept = slice(_KEPT_SAMPLES)
    noise = torch.randn(mean[kept].shape, generator=generator, device=mean.device)
    z = mean[kept] + torch.exp(0.5 * logvar[kept]) * noise
    label = images.train_labels[kept].contiguous()
    write_atomic(directory / SAMPLES, save({"z": z.cpu(), "label": label}))
    train_seconds = sum(row["seconds"] for row in state.history)
    measure_seconds = time.perf_counter() - began
    return RunRecord(
        "complete",
        asdict(config),
        config_hash(config),
        provenance,
        timing={
            "train_seconds": train_seconds,
            "measure_seconds": measure_seconds,
            "total_seconds": train_seconds + measure_seconds,
        },
        history=columns(state.history),
        estimates={name: value.to_dict() for name, value in elbo.items()} | found["estimates"],
        per_dimension=found["per_dimension"],
        curves=found["curves"],
        settings=found["settings"],
    )


def _fail(
    config: RunConfig,
    directory: Path,
    state: State,
    provenance: dict[str, Any],
    error: Exception,
) -> None:
    """Leave word of a failure where the report and the next sweep look for it."""
    kind = type(error).__name__
    expected = isinstance(error, VaeqError)
    failure = {"type": kind, "message": str(error) if expected else f"{kind}: {error}"}
    if not expected:
        failure["traceback"] = traceback.format_exc()
    record = RunRecord(
        "failed",
        asdict(config),
        config_hash(config),
        provenance,
        history=columns(state.history),
        failure=failure,
    )
    write_record(directory, record)
    write_status(directory, "failed", state.epoch, config.epochs, failure=failure)


def _summary(record: RunRecord) -> str:
    value = {name: entry["value"] for name, entry in record.estimates.items()}
    return (
        f"ELBO {value['elbo']:.2f} nats, KL per dimension {value['dimension_kl_mean']:.4f}, "
        f"joint {value['marginal_kl']:.3f}, in {record.timing['total_seconds']:.0f} s"
    )
