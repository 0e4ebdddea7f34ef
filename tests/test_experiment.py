"""One run from configuration to record, in this process, on real digits."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file

from vaeq import hardware
from vaeq.config import DataConfig, RunConfig, SampleConfig, identified
from vaeq.errors import InputError, TrainingDiverged
from vaeq.experiment import measuring, run
from vaeq.generation.sample import sample
from vaeq.hardware import resolve_device, resolve_precision
from vaeq.launch.progress import Event
from vaeq.report import write_report
from vaeq.runs.record import RECORD, RunRecord, read_record, run_directory
from vaeq.training.kernels import resolve_kernels

FILES = {
    ".lock",
    "checkpoint.safetensors",
    "config.yaml",
    "history.csv",
    "pictures.safetensors",
    "record.json",
    "samples.safetensors",
    "status.json",
}


def events_of(config: RunConfig) -> tuple[RunRecord, list[Event]]:
    events: list[Event] = []
    return run(config, events.append, threads=1), events


def test_a_run_leaves_its_files_and_tells_its_story(tiny: RunConfig) -> None:
    record, events = events_of(tiny)
    directory = run_directory(tiny)
    assert set(os.listdir(directory)) == FILES
    assert read_record(directory / RECORD) == record
    kinds = [event.kind for event in events]
    assert kinds[0] == "start"
    assert kinds.count("epoch") == 2
    assert kinds[-2:] == ["stage", "complete"]
    last = [event for event in events if event.kind == "epoch"][-1]
    assert (last.epoch, last.epochs, last.images, last.total_images) == (2, 2, 1200, 1200)
    assert last.elbo == record.history["test_elbo"][-1]


def test_the_measures_fit_together(tiny: RunConfig) -> None:
    record, _ = events_of(replace(tiny, epochs=4))
    value = {name: entry["value"] for name, entry in record.estimates.items()}
    parts = value["mutual_information"] + value["total_correlation"] + value["dimension_kl_sum"]
    assert value["kl_per_image"] == pytest.approx(parts, abs=1e-6)
    assert value["elbo"] < value["reconstruction"] < 0
    assert value["elbo"] == pytest.approx(record.history["test_elbo"][-1], abs=5)
    assert len(record.per_dimension["kl"]) == tiny.latent_dim
    assert value["dimension_kl_sum"] == pytest.approx(sum(record.per_dimension["kl"]), rel=1e-9)
    for name, entry in record.estimates.items():
        assert entry["unit"], name
        assert entry["value"] is not None or entry["reason"], name


def test_the_kept_samples_are_draws_of_the_aggregated_posterior(tiny: RunConfig) -> None:
    record, _ = events_of(tiny)
    kept = load_file(run_directory(tiny) / "samples.safetensors")
    assert kept["z"].shape == (600, 2)
    assert kept["label"].shape == (600,)
    mean = torch.tensor(record.per_dimension["mean"])
    std = torch.tensor(record.per_dimension["std"])
    drawn = torch.tensor(kept["z"])
    # 600 draws, one an image: the mean has at most the mixture's standard error.
    assert ((drawn.mean(0) - mean).abs() < 4 * std / 600**0.5).all()
    torch.testing.assert_close(drawn.std(0).double(), std.double(), rtol=0.2, atol=0)


def test_provenance_names_what_made_the_numbers(tiny: RunConfig) -> None:
    record, _ = events_of(tiny)
    provenance = record.provenance
    assert provenance["torch"] == torch.__version__
    assert provenance["threads"] == 1
    assert provenance["data"]["n_train"] == 600
    assert provenance["data"]["name"] == "mnist"
    assert record.timing["total_seconds"] > 0


def test_an_interrupted_run_resumes_at_its_last_epoch(
    tiny: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, epochs=4)

    def interrupt(event: Event) -> None:
        if event.kind == "epoch" and event.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, interrupt, threads=1)
    assert RECORD not in os.listdir(run_directory(config))
    record, events = events_of(config)
    assert events[0] == replace(events[0], kind="start", epoch=2, epochs=4)
    whole, _ = events_of(replace(config, outputs=str(tmp_path / "whole")))
    assert record.estimates == whole.estimates


def test_a_broken_checkpoint_is_said_and_trained_afresh(tiny: RunConfig, tmp_path: Path) -> None:
    whole, _ = events_of(replace(tiny, outputs=str(tmp_path / "whole")))
    directory = run_directory(tiny)
    directory.mkdir(parents=True)
    (directory / "checkpoint.safetensors").write_bytes(b"garbage")
    record, events = events_of(tiny)
    assert events[0].kind == "note"
    words = "checkpoint.safetensors is damaged: it has no checksum of its own."
    assert events[0].message == f"{words} The run is trained again."
    assert record.estimates == whole.estimates


def test_a_failure_is_recorded_and_raised(tiny: RunConfig) -> None:
    config = replace(tiny, learning_rate=10.0, beta=1e6)
    with pytest.raises(TrainingDiverged):
        events_of(config)
    record = read_record(run_directory(config) / RECORD)
    assert record.state == "failed"
    assert record.failure is not None
    assert record.failure["type"] == "TrainingDiverged"
    assert "epoch 1" in record.failure["message"]


def test_a_bug_is_recorded_with_its_traceback(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(measuring, "measure", broken)
    with pytest.raises(ZeroDivisionError):
        events_of(tiny)
    failure = read_record(run_directory(tiny) / RECORD).failure
    assert failure is not None
    assert failure["message"] == "ZeroDivisionError: a bug"
    assert "Traceback" in failure["traceback"]
    monkeypatch.undo()
    # The next attempt heals it, and trains nothing again.
    record, events = events_of(tiny)
    assert record.state == "complete"
    assert [event.kind for event in events] == ["start", "stage", "complete"]


def test_a_finished_run_is_not_touched(tiny: RunConfig) -> None:
    first, _ = events_of(tiny)
    second, events = events_of(tiny)
    assert first == second
    assert [event.kind for event in events] == ["skipped"]


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match=r"device=cuda:63 is not available.*use device=cpu"):
        resolve_device("cuda:63")


def test_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32"
    assert resolve_precision("bf16", cpu) == "bf16"
    with pytest.raises(InputError, match="precision=tf32 needs a GPU; use precision=auto"):
        resolve_precision("tf32", cpu)
    for flags, expected in ({"avx2"}, "fp32"), ({"avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"):
        monkeypatch.setattr(hardware, "cpu_flags", lambda flags=flags: flags)
        assert resolve_precision("auto", cpu) == expected


def test_kernels_change_the_time_and_not_the_result(tiny: RunConfig, tmp_path: Path) -> None:
    found = {}
    for kernels in ("torch", "auto"):
        own = replace(tiny, precision="fp32", kernels=kernels, outputs=str(tmp_path / kernels))
        found[kernels], _ = events_of(own)
        assert found[kernels].state == "complete"
    expected = resolve_kernels("auto", torch.device("cpu"))
    assert found["torch"].provenance["kernels"] == "torch"
    assert found["auto"].provenance["kernels"] == expected
    assert found["torch"].config_hash == found["auto"].config_hash
    for name, ours in found["auto"].estimates.items():
        # What is drawn from the codes is drawn from the same ones, to some digits.
        value, other = ours["value"], found["torch"].estimates[name]["value"]
        assert value == pytest.approx(other, rel=1e-2, abs=1e-3), name


def test_without_a_compiler_a_run_is_made_by_torch_or_refused_if_it_must_not(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaeq.training.kernels.compiled", lambda *sources: None)
    with pytest.raises(InputError, match="kernels=compiled cannot be had: no C compiler works"):
        events_of(replace(tiny, kernels="compiled"))
    assert not Path(tiny.outputs).exists()
    record, _ = events_of(tiny)
    assert (record.state, record.provenance["kernels"]) == ("complete", "torch")
    # Layers of another kind go by autograd.
    with pytest.raises(InputError, match="kernels=compiled needs model=mlp; use kernels=auto"):
        replace(tiny, model="conv", kernels="compiled")


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_depth": 0, "decoder_depth": 0},
        {"latent_dim": 1},
        {"precision": "bf16"},
        {"schedule": "cosine", "kl_warmup_epochs": 1, "early_stopping": 1},
        {"activation": "softplus", "batch_size": 1000},
    ],
)
def test_settings_of_every_kind_run_to_the_end(tiny: RunConfig, changes: dict[str, object]) -> None:
    record, _ = events_of(replace(tiny, **changes))  # type: ignore[arg-type]
    assert record.state == "complete"
    assert record.estimates["marginal_kl"]["value"] is not None


def test_codes_so_narrow_that_they_need_float64_are_drawn_from_and_decoded(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measuring.encode_all

    def narrow(*arguments: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(mean, logvar - 30) for mean, logvar in real(*arguments)]

    monkeypatch.setattr(measuring, "encode_all", narrow)
    record, _ = events_of(tiny)
    assert record.state == "complete"


@pytest.mark.parametrize(("model", "colours"), [("mlp", ()), ("conv", (3,)), ("ppca", (3,))])
def test_images_of_another_size_go_all_the_way_to_the_report(
    tiny: RunConfig, tmp_path: Path, model: str, colours: tuple[int, ...]
) -> None:
    # Five rows of seven pixels that get brighter, without labels.
    generator = np.random.default_rng(0)
    ramp = np.linspace(40, 200, 35).reshape(5, 7, *(1 for _ in colours))
    images = (ramp + generator.integers(-40, 40, (300, 5, 7, *colours))).astype(np.uint8)
    file = tmp_path / "images.npz"
    np.savez(file, train_images=images[:200], test_images=images[200:])
    config = replace(
        tiny,
        model=model,
        data=DataConfig(name="npz", path=str(file)),
        generation=replace(tiny.generation, quality=True, n_importance=5),
    )
    record, _ = events_of(config)
    (config,) = identified([config])
    assert record.provenance["data"] == {
        "name": "npz",
        "md5": config.data.md5,
        "n_train": 200,
        "n_test": 100,
    }
    assert record.config["data"]["md5"] == config.data.md5
    quality = record.estimates["fid_prior"]
    assert quality["value"] is None
    folder = run_directory(config)
    assert set(load_file(folder / "samples.safetensors")) == {"z"}
    if model == "ppca":
        assert "samples of ppca are grey levels" in quality["reason"]
        return
    size = " x ".join(map(str, images.shape[1:]))
    assert quality["reason"].endswith(f"28 x 28 pixels, and these are {size}")
    pictures = load_file(folder / "pictures.safetensors")
    assert pictures["prior"].shape == (64, 5, 7, *colours)
    assert (pictures["originals"] == images[200:220]).all()
    # Two epochs are enough to find the mean image.
    assert np.abs(pictures["prior"].mean(0) - images.mean(0)).max() < 100

    png, npz = sample(SampleConfig(run=str(folder), n=4))
    with Image.open(png) as shown, np.load(npz) as arrays:
        assert shown.mode == ("RGB" if colours else "L")
        assert shown.size == (2 * 9 + 2, 2 * 7 + 2)
        assert arrays["images"].shape == (4, 5, 7, *colours)
        assert (np.asarray(shown)[2:7, 2:9] == arrays["images"][0]).all()
    if colours:
        write_report([folder.parent], tmp_path / "report", Console(quiet=True))
        for figure in ("samples", "decoder"):
            with Image.open(tmp_path / "report" / f"{figure}.png") as drawn:
                pixels = np.asarray(drawn.convert("RGB")).astype(int)
                # No two channels of the drawn text and lines differ by so much.
                assert (np.ptp(pixels, axis=2) > 60).any()


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_binarized_images(tiny: RunConfig, binarize: str) -> None:
    config = replace(tiny, data=replace(tiny.data, binarize=binarize))
    record, _ = events_of(config)
    assert record.estimates["elbo"]["value"] < 0


def test_no_log_variance_of_ours_is_taken_for_a_variance(tiny: RunConfig) -> None:
    # One step: logvar is positive everywhere, and the tests turn warnings into errors.
    config = replace(tiny, epochs=1, batch_size=600, initialization="he_glorot", seed=3)
    with pytest.MonkeyPatch.context() as patch:
        real = measuring.measure
        positive = lambda mean, logvar, *rest, **more: real(  # noqa: E731
            mean, logvar.abs() + 0.5, *rest, **more
        )
        patch.setattr(measuring, "measure", positive)
        assert run(config, lambda event: None, threads=1).state == "complete"
