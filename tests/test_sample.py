"""vaeq sample: pictures from a finished run, and words where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Run
from vaeq.config import RunConfig, SampleConfig
from vaeq.errors import InputError, TrainingDiverged
from vaeq.experiment import run
from vaeq.generation.sample import load_decoder, sample
from vaeq.runs.record import run_directory


@pytest.fixture
def finished(tiny: RunConfig) -> Path:
    run(tiny, lambda event: None, threads=1)
    return run_directory(tiny)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("source", ["prior", "aggregated", "gmm", "scaled"])
def test_samples_of_every_source(finished: Path, tmp_path: Path, source: str) -> None:
    config = SampleConfig(run=str(finished), source=source, n=30, output=str(tmp_path / "new"))
    png, npz = sample(config)
    assert png == tmp_path / "new" / f"samples-{source}.png"
    found = arrays(npz)
    assert found["images"].shape == (30, 28, 28)
    assert found["images"].dtype == np.uint8
    assert found["z"].shape == (30, 2)
    # Six by six cells of 28 pixels and a frame of 2.
    with Image.open(png) as shown:
        assert shown.size == (6 * 30 + 2, 5 * 30 + 2)
    # What the decoder makes of these codes, and nothing else.
    decoder = load_decoder(finished)
    with torch.no_grad():
        means = decoder.decode(torch.from_numpy(found["z"]).float()).sigmoid()
    expected = (means * 255).round().view(-1, 28, 28)
    assert np.abs(found["images"] - expected.numpy()).max() <= 1
    assert arrays(sample(config)[1])["images"].tobytes() == found["images"].tobytes()
    other = arrays(sample(replace(config, seed=1))[1])
    assert other["images"].tobytes() != found["images"].tobytes()


def test_codes_come_from_where_they_are_said_to(finished: Path, tmp_path: Path) -> None:
    def codes(source: str, scale: float = 0.8) -> np.ndarray:
        config = SampleConfig(str(finished), "samples", source, scale, 4000, 0, str(tmp_path))
        return arrays(sample(config)[1])["z"]

    error = 4 / 4000**0.5
    assert codes("prior").std() == pytest.approx(1, abs=error)
    assert codes("scaled", 0.5).std() == pytest.approx(0.5, abs=error)
    mean, covariance = load_decoder(finished).posterior.moments()
    deviation = covariance.diagonal().sqrt().numpy()
    for source in ("aggregated", "gmm"):
        drawn = codes(source)
        assert (np.abs(drawn.mean(0) - mean.numpy()) < 4 * deviation / 4000**0.5 + 0.02).all()


def test_the_other_pictures(finished: Path) -> None:
    def images(picture: str, n: int) -> np.ndarray:
        png, npz = sample(SampleConfig(run=str(finished), picture=picture, n=n))
        assert png.parent == finished
        with Image.open(png) as shown:
            assert shown.mode == "L"
        return arrays(npz)["images"]

    assert images("plane", 30).shape == (25, 28, 28)
    assert images("interpolations", 35).shape == (30, 28, 28)
    pairs = images("reconstructions", 25)
    assert pairs.shape == (50, 28, 28)
    decoder = load_decoder(finished)
    originals = decoder.images.test[:25].view(-1, 28, 28).numpy()
    # A row of twenty originals, their reconstructions, and the rest likewise.
    assert (pairs[:20] == originals[:20]).all()
    assert (pairs[40:45] == originals[20:]).all()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "run is missing; give run=FOLDER of a finished run."),
        (("run=nowhere",), "nowhere holds no finished run"),
        (("run=nowhere", "source=posterior"), "source must be one of prior, aggregated, gmm"),
        (("run=nowhere", "scale=0"), "scale must be a number > 0"),
        (("run=nowhere", "n=0"), "n must be an integer between 1 and"),
    ],
)
def test_bad_input_gets_one_line(vaeq: Run, words: tuple[str, ...], sentence: str) -> None:
    done = vaeq("sample", *words)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_runs_without_a_decoder_are_refused(tiny: RunConfig, finished: Path) -> None:
    (finished / "checkpoint.safetensors").unlink()
    with pytest.raises(InputError, match="has no checkpoint"):
        sample(SampleConfig(run=str(finished)))
    linear = replace(tiny, model="ppca")
    run(linear, lambda event: None, threads=1)
    with pytest.raises(InputError, match="is a ppca run"):
        sample(SampleConfig(run=str(run_directory(linear))))
    wide = replace(tiny, latent_dim=3)
    run(wide, lambda event: None, threads=1)
    with pytest.raises(InputError, match="latent_plane needs latent_dim = 2, got 3"):
        sample(SampleConfig(run=str(run_directory(wide)), picture="plane"))
    bad = replace(tiny, learning_rate=10.0, beta=1e6)
    with pytest.raises(TrainingDiverged):
        run(bad, lambda event: None, threads=1)
    with pytest.raises(InputError, match="failed run"):
        sample(SampleConfig(run=str(run_directory(bad))))
