"""The uniform view: u = Φ(z_j) is uniform on [0, 1] exactly where q_N,j = N(0, 1) (the PIT)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vaeq.errors import InputError
from vaeq.posterior.aggregated import AggregatedPosterior

_CHUNK = 1 << 20


@dataclass(frozen=True)
class UniformView:
    """Histograms of u = Φ(z_j), and how far each is from flat."""

    edges: list[float]  # B + 1, from 0 to 1
    mass: list[list[float]]  # (D, B), each row sums to 1; flat is 1/B
    total_variation: list[float]  # (D,), ½ Σ_b |mass_b − 1/B|


def uniform_view(posterior: AggregatedPosterior, bins: int = 20) -> UniformView:
    """Mass of u = Φ(z_j), z_j ~ q_N,j, in equal bins of [0, 1]: F_j(Φ⁻¹(b)) − F_j(Φ⁻¹(a)).

    F_j(t) = 1/N Σᵢ Φ((t − μᵢⱼ)/σᵢⱼ) is the exact CDF of the mixture, so nothing is sampled.
    total_variation is the share of the mass that would have to move for the histogram to be flat,
    in [0, 1 − 1/B]. Bins lose what is finer than they are: 2 total_variation² is at most
    the KL of the dimension (Pinsker), and ``kl`` in per_dimension sees all of it.

    Args:
        posterior: N components in D dimensions.
        bins: B >= 2.

    Returns:
        Deterministic masses, in shares of 1. Always defined.

    References:
        Rosenblatt (1952); Diebold, Gunther & Tay (1998) for the histogram as a diagnostic.
    """
    if bins < 2:
        raise InputError(f"bins must be >= 2, got {bins}.")
    from scipy.special import ndtri

    edges = np.linspace(0, 1, bins + 1)
    inner = torch.from_numpy(ndtri(edges[1:-1]))  # (B − 1,)
    cumulative = torch.stack(posterior.over_parts(_cumulative, inner)).sum(0)
    cumulative /= posterior.n
    ends = torch.zeros(posterior.latent_dim, 1, dtype=torch.float64)
    mass = torch.diff(torch.cat([ends, cumulative, ends + 1], 1), dim=1)
    return UniformView(
        edges.tolist(),
        mass.tolist(),
        (0.5 * (mass - 1 / bins).abs().sum(1)).tolist(),
    )


def _cumulative(part: AggregatedPosterior, points: torch.Tensor) -> torch.Tensor:
    """Σᵢ Φ((t − μᵢⱼ)/σᵢⱼ) at points t (B,), shape (D, B)."""
    result = torch.zeros(part.latent_dim, len(points), dtype=torch.float64)
    for mean, logvar in part.chunks():
        precision = torch.exp(-0.5 * logvar)
        # A few images at a time again: every one makes D B numbers.
        rows = max(1, _CHUNK // (part.latent_dim * len(points)))
        for centre, scale in zip(mean.split(rows), precision.split(rows), strict=True):
            standardized = (points - centre[:, :, None]) * scale[:, :, None]
            result += torch.special.ndtr(standardized).sum(0)
    return result
