"""Gaussian mixtures fitted to codes by stepwise EM (Cappé & Moulines 2009), several as one stack.

The sufficient statistics of all components are one matrix product of the responsibilities with
:func:`vaeq.divergence.densities.features`; their running average forgets at the rate (t + 2)^-0.6.
Each batch has fresh draws of z: redrawing it at every visit uses what is known of each image, its
whole posterior, and keeps the components from fitting the noise.

Mixtures of as many components, for as many images, are fitted as one stack where
:mod:`vaeq.lockstep` has them meet. Those of fewer dimensions are padded: there z and the means are
0 and the variances 1, which adds nothing to any log density.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vaeq.divergence.densities import GaussianMixture, features, full_rank, natural, normal
from vaeq.errors import InputError
from vaeq.lockstep import made, stacked

# In each component's covariance: this many images' worth of 0.15 times the overall covariance.
_PRIOR_IMAGES = 10.0
_PRIOR_SCALE = 0.15
# Draws for the overall covariance, and for Lloyd's algorithm, where to begin.
_FIRST_DRAWS = 10_000
_LLOYD_STEPS = 5


def fit_gaussian_mixture(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    components: int,
    *,
    diagonal: bool,
    passes: float = 4,
    batch: int = 4096,
    generator: torch.Generator | None = None,
) -> GaussianMixture:
    """Fit Σ_k w_k N(m_k, C_k) to z ~ q_N by stepwise EM.

    Args:
        mean, logvar: codes (n, d), about standardized, float32.
        components: K >= 1, at most n.
        diagonal: C_k diagonal.
        passes: over the codes.
        batch: images in a step.
        generator: source of randomness.
    """
    source = _Source(mean, logvar, generator)
    (mixture,) = _fit_all([source], components, diagonal, passes, batch)
    return mixture


def fit_gaussian_mixtures(
    count: int,
    mean: torch.Tensor,
    logvar: torch.Tensor,
    components: int,
    *,
    diagonal: bool,
    passes: float = 4,
    batch: int = 4096,
    generator: torch.Generator | None = None,
) -> list[GaussianMixture]:
    """So many independent fits, as :func:`fit_gaussian_mixture` makes one.

    Each has draws of its own, from a generator that the one given seeds, so that none has to wait
    for those of another.
    """
    device = mean.device if generator is None else generator.device
    seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    sources = [_Source(mean, logvar, torch.Generator(device).manual_seed(seed)) for seed in seeds]
    return _fit_all(sources, components, diagonal, passes, batch)


@dataclass(frozen=True)
class _Source:
    """Codes (n, d), and the randomness of a fit to them."""

    mean: torch.Tensor
    logvar: torch.Tensor
    generator: torch.Generator | None

    @property
    def dims(self) -> int:
        return self.mean.shape[1]

    def permutation(self) -> torch.Tensor:
        """The images in a random order."""
        device = self.mean.device if self.generator is None else self.generator.device
        return torch.randperm(len(self.mean), generator=self.generator, device=device)

    def noise(self, count: int) -> torch.Tensor:
        """Standard normal (count, d)."""
        return normal((count, self.dims), self.mean, self.generator)


def _fit_all(
    sources: Sequence[_Source], components: int, diagonal: bool, passes: float, batch: int
) -> list[GaussianMixture]:
    mean = sources[0].mean
    if not 1 <= components <= len(mean):
        raise InputError(f"components must be in [1, {len(mean)}], got {components}.")
    return made(_fit, sources, (components, diagonal, passes, batch), (len(mean), mean.device))


class _Codes:
    """The codes of E fits, (E, n, d), those of fewer dimensions followed by zeros."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = sources
        self._mean = stacked([source.mean for source in sources])
        self._logvar = stacked([source.logvar for source in sources])
        self._fit = torch.arange(len(sources), device=self._mean.device)[:, None]

    def permutations(self) -> torch.Tensor:
        """The images of every fit in an order of its own, (E, n)."""
        orders = torch.stack([source.permutation() for source in self._sources])
        return orders.to(self._mean.device)

    def draw(self, members: torch.Tensor) -> torch.Tensor:
        """One z of each of these images, (E, B) -> (E, B, d)."""
        noise = stacked([source.noise(members.shape[1]) for source in self._sources])
        own = self._fit, members
        return self._mean[own] + torch.exp(0.5 * self._logvar[own]) * noise


def _fit(
    sources: Sequence[_Source], components: int, diagonal: bool, passes: float, batch: int
) -> list[GaussianMixture]:
    codes = _Codes(sources)
    images = len(sources[0].mean)
    some = codes.draw(codes.permutations()[:, : max(components, _FIRST_DRAWS)])
    maximization = _Maximization([source.dims for source in sources], some, images, diagonal)
    statistics = _sums_by_component(
        features(some, diagonal), _lloyd(some, components), components
    ) / some.shape[1]  # fmt: skip

    batch = min(batch, images)
    order = codes.permutations()
    for step in range(max(1, round(passes * images / batch))):
        coefficients = maximization.natural(*maximization(statistics)).float()
        if order.shape[1] < batch:
            order = torch.cat([order, codes.permutations()], 1)
        members, order = order[:, :batch], order[:, batch:]
        z = features(codes.draw(members), diagonal)
        seen = torch.softmax(z @ coefficients, 2).mT @ z / batch
        rate = (step + 2) ** -0.6
        statistics = (1 - rate) * statistics + rate * seen
    name = f"{components} {'diagonal' if diagonal else 'full'} Gaussians"
    parts = zip(sources, *maximization(statistics), strict=True)
    return [_without_padding(name, source.dims, *part) for source, *part in parts]


def _without_padding(
    name: str, dims: int, weight: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor
) -> GaussianMixture:
    own = (slice(None), *[slice(dims)] * (covariance.ndim - 1))
    return GaussianMixture(name, weight, mean[:, :dims], covariance[own])


def _lloyd(points: torch.Tensor, components: int) -> torch.Tensor:
    """The cluster of every point (E, S, d), (E, S), by some steps of k-means from the first."""
    centres = points[:, :components]
    ones = torch.ones_like(points[..., :1])
    for _ in range(_LLOYD_STEPS):
        nearest = torch.cdist(points, centres).argmin(2)
        count = _sums_by_component(ones, nearest, components)
        total = _sums_by_component(points, nearest, components)
        centres = torch.where(count > 0, total / count.clamp_min(1), centres)
    return torch.cdist(points, centres).argmin(2)


def _sums_by_component(
    values: torch.Tensor, component: torch.Tensor, components: int
) -> torch.Tensor:
    """Sums of values (E, S, F) over the points of each component, (E, K, F)."""
    fits = len(values)
    total = values.new_zeros(fits * components, values.shape[2])
    first = components * torch.arange(fits, device=values.device)[:, None]
    total.index_add_(0, (component + first).flatten(), values.flatten(0, 1))
    return total.view(fits, components, -1)


class _Maximization:
    """Weights, means and covariances of E mixtures from the statistics (E, K, F) of their images.

    Args:
        dims: of each fit.
        points: draws (E, S, d) for the overall covariance, which draws small components to it.
        images: n.
    """

    def __init__(
        self, dims: Sequence[int], points: torch.Tensor, images: int, diagonal: bool
    ) -> None:
        self._images = images
        self._diagonal = diagonal
        self._widest = points.shape[2]
        centred = (points - points.mean(1, keepdim=True)).double()
        # Images in a plane: the draws alone need not span all directions.
        if diagonal:
            self._scatter = centred.square().mean(1, keepdim=True) + 1e-6
        else:
            self._scatter = (centred.mT @ centred / points.shape[1])[:, None]
            self._scatter.diagonal(dim1=2, dim2=3).add_(1e-6)
        self._dims = torch.tensor(dims, device=points.device)[:, None]
        self._padded: torch.Tensor | None = None
        if min(dims) < self._widest:
            self._padded = torch.arange(self._widest, device=points.device) >= self._dims

    def __call__(self, statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """w (E, K), m (E, K, d) and C, (E, K, d) or (E, K, d, d), float64."""
        moments = statistics.double()
        share = moments[..., :1]
        found = moments[..., 1:] / share.clamp_min(1e-12)
        centre, square = found[..., : self._widest], found[..., self._widest :]
        count = self._images * share
        if self._diagonal:
            spread = square - centre.square()
        else:
            row, column = torch.triu_indices(self._widest, self._widest, device=square.device)
            spread = square.new_empty(*centre.shape, self._widest)
            spread[..., row, column] = square
            spread[..., column, row] = square
            spread = spread - centre[..., :, None] * centre[..., None, :]
            count = count[..., None]
        spread = (count * spread + _PRIOR_IMAGES * _PRIOR_SCALE * self._scatter) / (
            count + _PRIOR_IMAGES
        )
        if self._padded is not None:
            variances = spread if self._diagonal else spread.diagonal(dim1=2, dim2=3)
            variances.masked_fill_(self._padded[:, None], 1.0)
        share = share[..., 0]
        weight = (self._images * share + 1) / (
            self._images * share.sum(1, keepdim=True) + share.shape[1]
        )
        return weight, centre, spread

    def natural(
        self, weight: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor
    ) -> torch.Tensor:
        """Coefficients (E, F, K) on the features of z."""
        if not self._diagonal:
            covariance = full_rank(covariance)
        return natural(weight.log(), mean, covariance, self._dims)
