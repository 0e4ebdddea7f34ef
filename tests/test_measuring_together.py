"""Codes measured in lockstep, as on a GPU: the numbers that each has alone, by one program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.operations import operations, tiles_of_a_gpu
from vaeq import measurement
from vaeq.divergence.densities import stack_weights
from vaeq.divergence.stepwise_em import fit_gaussian_mixture
from vaeq.errors import InputError
from vaeq.lockstep import in_lockstep
from vaeq.measurement import Measurement, measure
from vaeq.posterior import log_density
from vaeq.posterior.log_density import MixtureLogDensity

N, M = 1_300, 200
Codes = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(dims: int, seed: int, spread: float = -3.0) -> Codes:
    """Ten clusters, and a last dimension that says nothing."""
    source = generator(seed)
    centres = 0.6 * torch.randn(10, dims, generator=source)
    label = torch.randint(10, (N + M,), generator=source)
    mean = centres[label] + 0.7 * torch.randn(N + M, dims, generator=source)
    logvar = spread + 0.3 * torch.randn(N + M, dims, generator=source)
    mean[:, -1], logvar[:, -1] = 0.01 * mean[:, -1], -0.01
    return mean[:N], logvar[:N], mean[N:], logvar[N:], label[:N]


def measured(member: Codes) -> Measurement | str:
    try:
        return measure(*member, n_samples=500)
    except InputError as error:
        return str(error)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "N_SAMPLES", 120)
    monkeypatch.setattr(measurement, "REPEATS", 3)
    monkeypatch.setattr(measurement, "CURVE_SAMPLES", 300)


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """Equal, but for numbers: they may differ by what float32 rounds in sums in another order."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_alike(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_alike(a, b, f"{where}[{i}]")
    elif isinstance(one, float):
        # The weights of a stack come of a thousand steps of EM, where the objective is flat.
        rounding = 1e-5 if ".weight[" in where else 1e-6
        assert other == pytest.approx(one, rel=30 * rounding, abs=3 * rounding), where
    else:
        assert one == other, where


@pytest.mark.usefixtures("quick")
def test_each_has_the_numbers_it_has_alone() -> None:
    narrow = codes(3, 2, spread=-24.0)  # float64, and in part by differences
    narrow[0][: N // 2] *= 50
    wrong = codes(4, 3)
    wrong[0][7, 1] = torch.nan
    unlabelled = (*codes(6, 4)[:4], None)
    collapsed = torch.zeros(N, 2), torch.zeros(N, 2), torch.zeros(M, 2), torch.zeros(M, 2), None
    members: list[Any] = [codes(2, 0), codes(5, 1), narrow, wrong, unlabelled, collapsed]
    alone = [measured(member) for member in members]
    together = in_lockstep(measured, members)
    assert "must be finite" in str(alone[3])
    for i, (one, other) in enumerate(zip(alone, together, strict=True)):
        if isinstance(one, str):
            assert other == one
        else:
            assert isinstance(other, Measurement)
            assert_alike(one.to_dict(), other.to_dict(), f"member {i}")


@pytest.mark.usefixtures("quick")
def test_a_further_one_takes_half_of_the_operations_at_most() -> None:
    with tiles_of_a_gpu():
        one = operations(measured, [codes(4, 0)])
        six = operations(measured, [codes(4, seed) for seed in range(6)])
    assert six - one < 0.55 * 5 * one


def test_densities_of_other_sizes_are_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_density, "_BLOCK_BYTES", 1 << 14)  # keys and points in parts
    problems = []
    for dims, count, spread in ((1, 900, 0.0), (7, 300, -2.0), (4, 1, -1.0), (3, 500, -25.0)):
        mean = torch.randn(count, dims, generator=generator(dims))
        mixture = MixtureLogDensity(mean, torch.full_like(mean, spread))
        # Far from the first components: the shift is outgrown.
        z = 3 * torch.randn(70, dims, generator=generator(dims + 1))
        problems.append((mixture, z))
    found = in_lockstep(lambda one: one[0](one[1]), problems)
    for (mixture, z), together in zip(problems, found, strict=True):
        torch.testing.assert_close(together, mixture(z), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("diagonal", [False, True])
def test_mixtures_of_other_dimensions_are_fitted_as_one_stack(diagonal: bool) -> None:
    problems = []
    for dims in (1, 4, 2):
        mean = torch.randn(700, dims, generator=generator(dims))
        problems.append((mean, torch.full_like(mean, -2.0)))

    def fitted(problem: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        found = fit_gaussian_mixture(
            *problem, 6, diagonal=diagonal, batch=200, generator=generator(9)
        )
        return found.weight, found.mean, found.covariance

    for problem, together in zip(problems, in_lockstep(fitted, problems), strict=True):
        for part, alone in zip(together, fitted(problem), strict=True):
            torch.testing.assert_close(part, alone, rtol=1e-4, atol=1e-5)


def test_tables_of_other_widths_are_weighed_as_one_stack() -> None:
    tables = [
        torch.randn(50, width, generator=generator(width), dtype=torch.float64)
        for width in (1, 4, 2)
    ]
    for table, together in zip(tables, in_lockstep(stack_weights, tables), strict=True):
        torch.testing.assert_close(together, stack_weights(table))
