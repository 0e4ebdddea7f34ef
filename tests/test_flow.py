"""The neural spline flow, where zuko is installed, and its absence where it is not."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from vaeq.divergence import flow as module
from vaeq.divergence.bracket import population_bracket
from vaeq.divergence.densities import GaussianMixture
from vaeq.divergence.flow import fit_flow, flow_missing
from vaeq.posterior.aggregated import AggregatedPosterior


def codes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means along a bent line, so that one Gaussian is not enough."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    return torch.stack([x, 0.7 * (x.square() - 1)], 1), torch.full((n, 2), 2 * math.log(0.3))


def base() -> GaussianMixture:
    mean, logvar = codes(4000, 0)
    covariance = mean.T.cov() + torch.diag(logvar[0].exp())
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(
        "1 Gaussian", one, mean.mean(0)[None].double(), covariance[None].double()
    )


def test_an_untrained_flow_is_its_base_and_training_improves_it() -> None:
    pytest.importorskip("zuko")
    mean, logvar = codes(4000, 0)
    generator = torch.Generator().manual_seed(1)
    start = base()
    before = torch.random.get_rng_state()
    identity = fit_flow(start, mean, logvar, generator=generator, steps=0)
    fresh_mean, fresh_logvar = codes(2000, 2)
    z = fresh_mean + torch.exp(0.5 * fresh_logvar) * torch.randn(2000, 2, generator=generator)
    torch.testing.assert_close(identity.log_prob(z), start.log_prob(z), atol=1e-4, rtol=1e-4)
    trained = fit_flow(start, mean, logvar, generator=generator, steps=60)
    gain = trained.log_prob(z) - start.log_prob(z)
    assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(2000)
    assert torch.equal(before, torch.random.get_rng_state())
    axis = torch.linspace(-9, 9, 361)
    grid = torch.cartesian_prod(axis, axis)
    mass = float(trained.log_prob(grid).exp().sum()) * float(axis[1] - axis[0]) ** 2
    assert mass == pytest.approx(1, abs=2e-3)


def test_a_flow_takes_part_in_the_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zuko")
    monkeypatch.setattr(module, "_STEPS", 3)
    found = population_bracket(
        AggregatedPosterior(*codes(300, 0)),
        AggregatedPosterior(*codes(100, 1)),
        flow=True,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.settings["flow"] == "tried"
    assert any(candidate.name.startswith("flow") for candidate in found.candidates)


def test_without_zuko_the_bracket_says_that_no_flow_was_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert flow_missing() == "zuko is not installed; pip install 'vaeq[flow]'"
    found = population_bracket(
        AggregatedPosterior(*codes(100, 0)),
        AggregatedPosterior(*codes(50, 1)),
        flow=True,
        generator=torch.Generator().manual_seed(0),
    )
    assert found.settings["flow"] == f"not tried: {flow_missing()}"
    assert found.lower.value is not None
    assert [c.reason for c in found.candidates if c.name == "flow"] == [flow_missing()]
