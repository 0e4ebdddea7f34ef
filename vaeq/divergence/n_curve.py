"""marginal_kl against the number of images: flat where identified, −log N where saturated."""

from __future__ import annotations

import math
from typing import Any

import torch

from vaeq.divergence.decomposition import kl_per_image, marginal_kl
from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior

_SMALLEST = 1_000
# Larger subsets than this would double the memory that the codes take.
_LARGEST = 256_000
# The slope is fitted over the last factor of eight in N.
_SLOPE_RANGE = 8


def n_curve(
    posterior: AggregatedPosterior,
    n_samples: int = 2_000,
    generator: torch.Generator | None = None,
) -> tuple[Estimate, dict[str, list[Any]]]:
    """KL(q_n ‖ p) of nested random subsets of n = 1000, 2000, 4000, ... images, and of all N.

    Every subset is treated alike: the same estimator with the same number of draws. As n grows the
    curve falls towards the population's KL(q ‖ p). Where mutual_information has reached its ceiling
    it is kl_per_image − log n, a line of slope −1 in log n, and says nothing of the population.

    Args:
        posterior: N components in D dimensions.
        n_samples: draws a subset, >= 2.
        generator: source of randomness, of the subsets too.

    Returns:
        n_curve_slope, the least-squares slope of KL(q_n ‖ p) against log n over the last factor of
        8 in n, in nats per nat: near 0 identified, near −1 saturated. And the curve: n,
        marginal_kl, std_error and mutual_information_fraction, lists of equal length. std_error is
        Monte Carlo error in z for the images at hand, not for the choice of the subset.

    The slope is undefined for fewer than 2000 images, which give one point.
    """
    sizes = [posterior.n]
    size = _SMALLEST
    while size < min(posterior.n, _LARGEST + 1):
        sizes.append(size)
        size *= 2
    sizes.sort()
    source = posterior.device if generator is None else generator.device
    order = torch.randperm(posterior.n, generator=generator, device=source).to(posterior.device)
    curve: dict[str, list[Any]] = {
        "n": sizes,
        "marginal_kl": [],
        "std_error": [],
        "mutual_information_fraction": [],
    }
    for size in sizes:
        part = posterior if size == posterior.n else posterior.subset(order[:size])
        found = marginal_kl(part, n_samples, generator)
        assert found.value is not None
        information = float(kl_per_image(part).mean()) - found.value
        curve["marginal_kl"].append(found.value)
        curve["std_error"].append(found.std_error)
        curve["mutual_information_fraction"].append(
            information / math.log(size) if size > 1 else None
        )
    return _slope(curve), curve


def _slope(curve: dict[str, list[Any]]) -> Estimate:
    """Least squares on log n; every point counts alike, since subsets differ by chance as well."""
    last = curve["n"][-1]
    points = [
        (math.log(n), kl, error)
        for n, kl, error in zip(curve["n"], curve["marginal_kl"], curve["std_error"], strict=True)
        if n * _SLOPE_RANGE >= last
    ]
    if len(points) < 2 or last < 2 * _SMALLEST:
        reason = f"needs at least {2 * _SMALLEST} images, got {last}"
        return Estimate.missing("nats/nat", reason)
    centre = sum(x for x, _, _ in points) / len(points)
    scale = sum((x - centre) ** 2 for x, _, _ in points)
    slope = sum((x - centre) * kl for x, kl, _ in points) / scale
    errors = [error for _, _, error in points]
    if None in errors:
        return Estimate(slope, None, "nats/nat")
    variance = sum(((x - centre) / scale * error) ** 2 for x, _, error in points)
    return Estimate(slope, math.sqrt(variance), "nats/nat")
