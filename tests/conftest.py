"""Shared by the tests: small real MNIST, small configs, and the program as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.warm import Warm
from vaeq.config import DataConfig, GenerationConfig, MeasureConfig, RunConfig
from vaeq.data.images import Images, load_images
from vaeq.training.kernels import resolve_kernels

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # A second OpenMP thread that is not scheduled stalls every step.
    torch.set_num_threads(1)


@pytest.fixture(params=["torch", "compiled"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Both implementations of a step's operations, where this machine has both."""
    if request.param == "compiled" and resolve_kernels("auto", torch.device("cpu")) != "compiled":
        pytest.skip("nothing compiles C here")
    return str(request.param)


@pytest.fixture(scope="session")
def mnist() -> Images:
    """All of MNIST, once."""
    return load_images()


@pytest.fixture(scope="session")
def small(mnist: Images) -> Images:
    """Real digits, few of them."""
    return replace(
        mnist,
        train=mnist.train[:600],
        train_labels=mnist.train_labels[:600],
        test=mnist.test[:200],
        test_labels=mnist.test_labels[:200],
    )


@pytest.fixture
def tiny(tmp_path: Path) -> RunConfig:
    """A run of a second."""
    return RunConfig(
        encoder_depth=1,
        encoder_width=16,
        decoder_depth=1,
        decoder_width=16,
        epochs=2,
        outputs=str(tmp_path / "outputs"),
        device="cpu",
        data=DataConfig(n_train=600, n_test=200),
        measure=MeasureConfig(panel="decomposition", n_samples=200),
        generation=GenerationConfig(n_importance=None, quality=False),
    )


# The overrides that make the smoke preset smaller still.
TINY = (
    "experiment=smoke",
    "encoder_width=16",
    "decoder_width=16",
    "data.n_train=600",
    "data.n_test=200",
    "measure.panel=decomposition",
    "measure.n_samples=200",
    "generation.n_importance=null",
)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Where commands are forked from that import torch at once."""
    warm = Warm()
    yield warm
    warm.close()


@pytest.fixture
def vaeq(tmp_path: Path, warm: Warm) -> Run:
    """Run the program in an empty folder, without a terminal."""

    def run(*words: str, check: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        if words[:1] in (("train",), ("measure",), ("sample",)) and not env:
            done = warm.run(words, tmp_path)
            if check:
                done.check_returncode()
            return done
        return subprocess.run(
            [sys.executable, "-m", "vaeq", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
            check=check,
            timeout=300,
        )

    return run
