"""What a run needs, against what real runs took; what is refused, and how many fit."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.conftest import Run
from tests.soak import times
from vaeq.config import RunConfig
from vaeq.data.images import Images
from vaeq.errors import InputError
from vaeq.experiment import build
from vaeq.launch.pool import Pool
from vaeq.launch.progress import Event
from vaeq.launch.sweep import SweepResult
from vaeq.memory import fitting, needed, networks, require_memory

PEAK = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from vaeq.config import DataConfig, GenerationConfig, MeasureConfig, RunConfig
from vaeq.experiment import run
from vaeq.memory import needed
config = RunConfig(
    outputs=sys.argv[1], device="cpu", epochs=1, encoder_width=int(sys.argv[2]),
    encoder_depth=int(sys.argv[3]), latent_dim=int(sys.argv[4]), model=sys.argv[5],
    data=DataConfig(n_train=300, n_test=100),
    measure=MeasureConfig(panel="decomposition", n_samples=100),
    generation=GenerationConfig(n_importance=None, quality=False),
)
run(config, lambda event: None, 1)
(line,) = (l for l in Path("/proc/self/status").read_text().splitlines() if l[:5] == "VmHWM")
print(needed(config).total / (1024 * int(line.split()[1])))
"""


@pytest.mark.parametrize(
    ("model", "shape", "depths"),
    [
        ("mlp", (28, 28), (3, 0)),
        ("conv", (28, 28), (1, 3)),
        ("conv", (20, 33, 3), (4, 2)),
    ],
)
def test_the_sizes_are_those_of_the_network(
    model: str, shape: tuple[int, ...], depths: tuple[int, int]
) -> None:
    config = RunConfig(
        model=model, latent_dim=5, encoder_depth=depths[0], encoder_width=31,
        decoder_depth=depths[1], decoder_width=50,
    )  # fmt: skip
    blank = torch.zeros(1, math.prod(shape), dtype=torch.uint8)
    vae = build(config, Images("blank", "", blank, None, blank, None, shape=shape)).vae
    parts = zip((vae.encoder, vae.decoder), networks(config, shape), strict=True)
    for part, (network, sizes) in enumerate(parts):
        assert sizes.weights == sum(value.numel() for value in network.parameters())
        x = torch.zeros(1, (math.prod(shape), 5)[part])
        units, products = [x.numel()], 0
        for layer in network:
            before, x = x, layer(x)
            if any(True for _ in layer.parameters()):
                units.append(x.numel())
                # A kernel is applied at every place of the smaller image; a matrix once.
                places = min(math.prod(before.shape[2:]), math.prod(x.shape[2:]))
                products += layer.get_parameter("weight").numel() * places
        assert list(sizes.units) == units
        assert sizes.products == products


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "shape", [("16", "1", "2", "mlp"), ("2048", "3", "64", "mlp"), ("2048", "3", "64", "conv")]
)
def test_the_estimate_is_near_the_peak_of_a_real_run(tmp_path: Path, shape: tuple[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), *shape],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 1 / 1.5 < float(done.stdout) < 1.5


def test_more_of_anything_needs_more() -> None:
    config = RunConfig()
    base = needed(config).total
    for changes in (
        {"encoder_width": 4096},
        {"encoder_depth": 60},
        {"decoder_width": 4096},
        {"latent_dim": 4096},
        {"batch_size": 60_000},
    ):
        assert needed(replace(config, **changes)).total > base, changes  # type: ignore[arg-type]
    assert needed(config, members=64).total > base
    assert needed(config, n_train=10_000_000).total > base


def test_a_run_beyond_the_memory_is_refused_in_one_line() -> None:
    config = RunConfig(latent_dim=512, encoder_depth=8, encoder_width=4096)
    with pytest.raises(InputError) as caught:
        require_memory(needed(config), 4 * 2**30, "this machine", config)
    assert str(caught.value) == (
        "a run of encoder_width=4096, encoder_depth=8, latent_dim=512 needs about "
        f"{needed(config).more / 2**30:.1f} GiB of memory, and this machine has 4.0 GiB free; "
        "lower encoder_width, encoder_depth or batch_size."
    )
    require_memory(needed(config), 24 * 2**30, "this machine", config)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_nothing_is_written_of_a_run_that_does_not_fit(
    vaeq: Run, tmp_path: Path, command: str
) -> None:
    words = ("encoder_width=65536", "encoder_depth=64", "device=cpu")
    done = vaeq(command, *words, *(("seed=0,1",) if command == "sweep" else ()))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "encoder_width=65536, encoder_depth=64" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_as_many_runs_side_by_side_as_the_largest_leave_room_for() -> None:
    small, large = RunConfig(), RunConfig(encoder_width=4096, encoder_depth=8)
    room = needed(large).total + 2 * needed(small).total
    assert fitting([small] * 5 + [large], room) == 3
    assert fitting([small] * 5, 3 * needed(small).total) == 3
    assert fitting([large], 0) == 1


def test_a_sweep_takes_no_more_workers_than_fit(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    pool = Pool(Console(file=said), n_jobs=8)
    monkeypatch.setattr("vaeq.launch.pool.available_memory", lambda: 3 * needed(tiny).total)
    pool._limit([replace(tiny, model="ppca", seed=seed) for seed in range(8)])
    assert pool.n_jobs == 8
    pool._limit([replace(tiny, seed=seed) for seed in range(8)])
    assert pool.n_jobs == 3
    assert said.getvalue().startswith("3 of 8 runs at a time: the largest needs about 0.")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_run_after_run_takes_no_more_memory(tiny: RunConfig) -> None:
    """A worker and its parent hold as much after all runs as after half of them, but for caches."""
    runs = times(24, 2000)
    pool = Pool(Console(file=io.StringIO()), n_jobs=1)
    held: dict[int, tuple[float, float]] = {}

    class Watched(SweepResult):
        def note(self, event: Event) -> None:
            super().note(event)
            if event.kind == "complete":
                (worker,) = pool.workers
                held[len(self.complete)] = resident("self"), resident(worker.process.pid)

    result = Watched()
    pool.run([replace(tiny, epochs=1, seed=seed) for seed in range(runs)], result)
    assert len(result.complete) == runs
    for before, after in zip(held[runs // 2], held[runs], strict=True):
        assert after - before < 6 + 0.01 * runs


def resident(process: int | str | None) -> float:
    """Megabytes a process holds now."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
