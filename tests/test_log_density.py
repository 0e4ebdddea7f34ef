"""The tiled log density against differences in float64, at every scale and on every path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vaeq import threads as threads_module
from vaeq.posterior import log_density
from vaeq.posterior.log_density import MixtureLogDensity, rounds_products

F64 = torch.float64


def reference(mean: torch.Tensor, logvar: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """log q_N from (z − μ)/σ itself in float64."""
    mean, logvar = mean.double(), logvar.double()
    parts = []
    for point in z.double():
        exponent = -0.5 * ((point - mean).square() * torch.exp(-logvar) + logvar).sum(1)
        parts.append(torch.logsumexp(exponent, 0))
    return torch.stack(parts) - math.log(len(mean)) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def draw(
    n: int, dims: int, scale: float, spread: float, draws: int = 60, dtype: torch.dtype = F64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of σ around scale, |μ| up to spread; draws of z from the mixture, and some far."""
    generator = torch.Generator().manual_seed(7)
    mean = spread * (2 * torch.rand(n, dims, generator=generator, dtype=F64) - 1)
    logvar = 2 * math.log(scale) + 0.5 * torch.randn(n, dims, generator=generator, dtype=F64)
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    index = torch.randint(n, (draws,), generator=generator)
    noise = torch.randn(draws, dims, generator=generator, dtype=F64)
    z = mean[index] + torch.exp(0.5 * logvar[index]) * noise
    z[::10] = torch.randn(len(z[::10]), dims, generator=generator, dtype=F64)
    return mean, logvar, z


@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("dims", [1, 2, 8, 33, 130])
def test_error_is_below_a_thousandth_at_every_scale(dims: int, scale: float, spread: float) -> None:
    mean, logvar, z = draw(300, dims, scale, spread, dtype=torch.float32)
    z = z.float()
    expected = reference(mean, logvar, z)
    error = (MixtureLogDensity(mean, logvar)(z) - expected).abs()
    # Far from every code log q_N is in the millions: there the bound is relative.
    assert float((error / (1e-3 + 1e-6 * expected.abs())).max()) < 1


@pytest.mark.parametrize(
    ("scale", "spread", "dtype", "path"),
    [
        (0.1, 3.0, torch.float32, "tiled float32"),
        (1e-3, 3.0, torch.float32, "tiled float64"),
        (0.1, 3.0, F64, "tiled float64"),
        (1e-4, 2000.0, F64, "direct float64"),
    ],
)
def test_path_follows_the_cancellation(
    scale: float, spread: float, dtype: torch.dtype, path: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    sign = 2 * torch.randint(2, (50, 3), generator=generator) - 1
    mean = (spread * sign + 0.01 * torch.randn(50, 3, generator=generator)).to(dtype)
    logvar = torch.full_like(mean, 2 * math.log(scale))
    assert MixtureLogDensity(mean, logvar).path == path


def test_components_are_split_between_the_paths() -> None:
    mean = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.5, -0.5], [-0.5, 0.5]])
    logvar = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-18.0, -1.0], [-1.0, -1.0]])
    density = MixtureLogDensity(mean, logvar)
    assert density.path == (
        "tiled float32 (3 of 4 components) and tiled float64 (1 of 4 components)"
    )
    z = torch.tensor([[0.5, -0.5], [0.5001, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(density(z), reference(mean, logvar, z), rtol=0, atol=1e-5)


def test_direct_differences_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, logvar, z = draw(30, 3, 1e-5, 5000.0)
    density = MixtureLogDensity(mean, logvar)
    assert "direct float64" in density.path
    expected = reference(mean, logvar, z)
    monkeypatch.setattr(log_density, "chunk_rows", lambda dims: 7)
    torch.testing.assert_close(density(z), expected, rtol=1e-13, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tiles_and_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    mean, logvar, z = draw(2001, 5, 0.2, 2.0, draws=101, dtype=dtype)
    expected = reference(mean, logvar, z)
    atol = 1e-4 if dtype == torch.float32 else 1e-11
    whole = MixtureLogDensity(mean, logvar)(z)
    monkeypatch.setattr(log_density, "_CPU_ROWS", 13)
    monkeypatch.setattr(log_density, "_CPU_TILE", 1)  # the smallest tiles: 512 columns
    monkeypatch.setattr(log_density, "_BLOCK_BYTES", 1600)  # a few rows at a time, one tile a block
    pieces = MixtureLogDensity(mean, logvar)(z)
    torch.testing.assert_close(whole, expected, rtol=0, atol=atol)
    torch.testing.assert_close(pieces, expected, rtol=0, atol=atol)


def test_a_shift_that_is_outgrown_is_raised() -> None:
    # Tiles are 512 wide: the component that matters comes in the 18th, far above the others.
    mean = torch.full((10_000, 2), 30.0)
    mean[9000] = 0.0
    mean[9001] = 0.5
    logvar = torch.zeros(10_000, 2)
    z = torch.tensor([[0.0, 0.0], [0.3, 0.1], [30.0, 30.0]])
    rows = torch.cat([z, z.new_zeros(2048, 2)])  # enough rows for the smallest tiles
    found = MixtureLogDensity(mean, logvar)(rows)[:3]
    torch.testing.assert_close(found, reference(mean, logvar, z), rtol=1e-6, atol=1e-4)


def test_far_points_do_not_overflow() -> None:
    mean, logvar = torch.zeros(3, 2), torch.full((3, 2), -30.0)
    z = torch.tensor([[1e12, 0.0], [1e15, -1e15]])
    found = MixtureLogDensity(mean, logvar)(z)
    torch.testing.assert_close(found, reference(mean, logvar, z), rtol=1e-6, atol=0)


def test_extreme_variances_do_not_overflow() -> None:
    mean = torch.tensor([[0.0], [0.0], [0.0]])
    logvar = torch.tensor([[-99.0], [0.0], [99.0]])
    z = torch.tensor([[0.0], [1e-21], [1.0], [1e9], [1e21]])
    found = MixtureLogDensity(mean, logvar)(z)
    torch.testing.assert_close(found, reference(mean, logvar, z), rtol=1e-6, atol=1e-5)


def test_one_component_one_dimension_one_point() -> None:
    mean, logvar, z = torch.tensor([[0.5]]), torch.tensor([[-1.0]]), torch.tensor([[0.7]])
    expected = -0.5 * (0.2**2 * math.e - 1 + math.log(2 * math.pi))
    assert float(MixtureLogDensity(mean, logvar)(z)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_has_no_effect(precision: str) -> None:
    mean, logvar, z = draw(5000, 32, 0.3, 2.0, draws=200, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = MixtureLogDensity(mean, logvar)(z.float())
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((found - reference(mean, logvar, z.float())).abs().max()) < 1e-3


@pytest.mark.parametrize("threads", [1, 2])
def test_autocast_has_no_effect(threads: int) -> None:
    mean, logvar, z = draw(5000, 8, 0.3, 2.0, draws=200, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = MixtureLogDensity(mean, logvar)(z.float())
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found.dtype == F64
    assert float((found - reference(mean, logvar, z.float())).abs().max()) < 1e-3


def test_threads_and_their_absence_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, logvar, z = draw(3000, 4, 0.3, 2.0, draws=300, dtype=torch.float32)
    mean.requires_grad_(True)  # the workers must not record a graph
    before = torch.get_num_threads()
    results = []
    for threads, openmp in ((1, True), (2, True), (2, False)):
        monkeypatch.setattr(threads_module, "_threads_are_openmp", lambda openmp=openmp: openmp)
        torch.set_num_threads(threads)
        try:
            results.append(MixtureLogDensity(mean, logvar)(z.float()))
        finally:
            torch.set_num_threads(before)
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=0, atol=1e-4)
        assert not found.requires_grad


def test_a_device_that_rounds_products_is_given_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, logvar, z = draw(500, 4, 0.3, 2.0, dtype=torch.float32)
    z = z.float()
    monkeypatch.setattr(log_density, "rounds_products", lambda device: True)
    density = MixtureLogDensity(mean, logvar)
    assert density.path == "tiled float64"
    torch.testing.assert_close(density(z), reference(mean, logvar, z), rtol=0, atol=1e-10)


def test_the_probe_tells_rounded_products_from_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # Run on the "meta" of another device type: the products themselves are made on the CPU.
    class Elsewhere:
        type = "cuda"

    full, ones = torch.full, torch.ones
    rounding: list[torch.dtype] = []

    def on_cpu(make: object) -> object:
        def made(*args: object, device: object = None) -> torch.Tensor:
            tensor = make(*args)  # type: ignore[operator]
            return tensor.to(rounding[0]).to(tensor.dtype) if rounding else tensor

        return made

    monkeypatch.setattr(torch, "full", on_cpu(full))
    monkeypatch.setattr(torch, "ones", on_cpu(ones))
    assert not rounds_products(Elsewhere())  # type: ignore[arg-type]
    rounding.append(torch.bfloat16)  # what TF32 does to operands, with fewer bits still
    assert rounds_products(Elsewhere())  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_gpu_agrees_with_float64(precision: str) -> None:
    mean, logvar, z = draw(20_000, 32, 0.3, 2.0, draws=200, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = MixtureLogDensity(mean.cuda(), logvar.cuda())(z.float().cuda()).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((found - reference(mean, logvar, z.float())).abs().max()) < 1e-3


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    n=st.integers(1, 50),
    dims=st.integers(1, 9),
    scale=st.floats(-9.2, 1.0),
    spread=st.floats(0, 50),
    seed=st.integers(0, 1000),
)
def test_random_codes(n: int, dims: int, scale: float, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = spread * (2 * torch.rand(n, dims, generator=generator) - 1)
    logvar = 2 * scale + 2 * torch.rand(n, dims, generator=generator)
    index = torch.randint(n, (20,), generator=generator)
    z = mean[index] + torch.exp(0.5 * logvar[index]) * torch.randn(20, dims, generator=generator)
    expected = reference(mean, logvar, z)
    error = (MixtureLogDensity(mean, logvar)(z) - expected).abs()
    assert float((error / (1e-3 + 1e-6 * expected.abs())).max()) < 1
