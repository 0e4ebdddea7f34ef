"""Every estimate for one set of codes: the joint decomposition and the exact marginals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaeq.divergence import decompose, marginals
from vaeq.estimate import Estimate
from vaeq.posterior import AggregatedPosterior


@dataclass(frozen=True)
class Measurement:
    """What was found about one aggregated posterior, and with which settings."""

    estimates: dict[str, Estimate]
    per_dimension: dict[str, list[Any]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "estimates": {name: value.to_dict() for name, value in self.estimates.items()},
            "per_dimension": self.per_dimension,
            "settings": self.settings,
        }


def measure(mean: Tensor, logvar: Tensor, *, n_samples: int = 10_000, seed: int = 0) -> Measurement:
    """Measure the aggregated posterior of the codes N(mean, diag exp(logvar)), each (N, D).

    Args:
        mean, logvar: means and log variances of q(z|x), shape (N, D), N >= 1, D >= 1.
        n_samples: Monte Carlo samples of q_N for the joint quantities.
        seed: of those samples.

    Raises:
        InputError: wrong shapes, NaN or infinity.
    """
    posterior = AggregatedPosterior(mean, logvar)
    generator = torch.Generator(mean.device).manual_seed(seed)
    return Measurement(
        decompose(posterior, n_samples, generator),
        dict(marginals(posterior)),
        {"n_samples": n_samples, "seed": seed, "path": posterior.path},
    )
