"""Normalized densities r(z) fitted to codes: E_q[log r − log p] is a lower bound of KL(q ‖ p).

Gaussian, Gaussian mixtures (fitted in :mod:`vaeq.divergence.stepwise_em`), mixtures of every
image's own posterior shrunk towards and smoothed by its cluster (West 1993), and stacks Σ_k w_k r_k
of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.nn.functional import pad

from vaeq.lockstep import made
from vaeq.posterior.aggregated import AggregatedPosterior
from vaeq.posterior.log_density import MixtureLogDensity

_LOG_2PI = math.log(2 * math.pi)
# A covariance of D(D+1)/2 numbers a component pays up to here; beyond, components are diagonal.
FULL_MIXTURE_DIMS = 40
# A covariance from float32 sums is known to this share of its mean variance.
_ROUNDED = 1e-5
_TILE = 1 << 22


class Density(Protocol):
    """A density on R^D that integrates to one."""

    @property
    def name(self) -> str:
        """What it is, as tables show it."""

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log r(z) of z (S, D) in nats, float64, shape (S,)."""


class Gaussian:
    """N(m, C); where C is singular in float64, as of few codes that are narrow, N(m, C + ε I).

    ε is 1e-10 of the mean variance: a density may be wider than what it was fitted to.
    """

    def __init__(self, name: str, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        self.name = name
        self._mean = mean.double()
        covariance = covariance.double()
        self._factor, singular = torch.linalg.cholesky_ex(covariance)
        if singular:
            wider = covariance.clone()
            wider.diagonal().add_(1e-10 * covariance.diagonal().mean())
            self._factor = torch.linalg.cholesky(wider)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log N(z; m, C)."""
        offset = (z.double() - self._mean).T
        white = torch.linalg.solve_triangular(self._factor, offset, upper=False)
        log_det = 2 * self._factor.diagonal().log().sum()
        return -0.5 * (white.square().sum(0) + log_det + len(offset) * _LOG_2PI)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Independent draws (count, D), float64."""
        return self._mean + normal((count, len(self._mean)), self._mean, generator) @ self._factor.T


class Chart:
    """Coordinates for the fits: active dimensions standardized, the others N(mean, variance) each.

    A dimension is active where the means carry over 1 % of its variance. The others hold no
    structure worth a parameter, and a density need not be right to be normalized.
    """

    def __init__(self, posterior: AggregatedPosterior) -> None:
        mean, covariance = posterior.moments()
        within = torch.zeros_like(mean)
        for _, logvar in posterior.chunks():
            within += logvar.exp().sum(0)
        variance = covariance.diagonal()
        active = within / posterior.n < 0.99 * variance
        self._mean = mean.to(posterior.device)
        self._std = variance.sqrt().to(posterior.device)
        self.active = active.nonzero()[:, 0].to(posterior.device)
        self._passive = (~active).nonzero()[:, 0].to(posterior.device)

    @property
    def dims(self) -> int:
        """Number of active dimensions."""
        return len(self.active)

    def codes(self, posterior: AggregatedPosterior) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of every image in the active coordinates, float32."""
        std = self._std[self.active]
        mean = (posterior.mean[:, self.active] - self._mean[self.active]) / std
        logvar = posterior.logvar[:, self.active] - 2 * std.log()
        return mean.float(), logvar.float()

    def split(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Active coordinates of z, and the log density of the rest with the Jacobian's term."""
        x = (z.double() - self._mean) / self._std
        rest = x[:, self._passive]
        log_rest = -0.5 * (rest.square().sum(1) + rest.shape[1] * _LOG_2PI)
        return x[:, self.active], log_rest - self._std.log().sum()

    def join(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """z (S, D) of active coordinates x, the passive ones drawn."""
        full = normal((len(x), len(self._mean)), self._mean, generator)
        full[:, self.active] = x.double()
        return self._mean + self._std * full


class Charted:
    """A density of the active coordinates, extended to all of R^D by its chart."""

    def __init__(self, name: str, chart: Chart, inner: Density) -> None:
        self.name = name
        self.inner = inner
        self._chart = chart

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log r(x_active) + Σ_passive log N + log |Jacobian|."""
        x, log_rest = self._chart.split(z)
        return self.inner.log_prob(x) + log_rest

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Independent draws (count, D), float64; the inner density must have a ``sample``."""
        if not isinstance(self.inner, GaussianMixture):
            raise TypeError(f"{self.inner.name} cannot be sampled")
        return self._chart.join(self.inner.sample(count, generator), generator)


class GaussianMixture:
    """Σ_k w_k N(m_k, C_k), C_k full (K, d, d) or diagonal (K, d)."""

    def __init__(
        self, name: str, weight: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor
    ) -> None:
        self.name = name
        self.weight = weight
        self.mean = mean
        self.covariance = covariance if covariance.ndim == 2 else full_rank(covariance)
        self.natural = natural(weight.log(), mean, self.covariance, mean.shape[1])

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log Σ_k w_k N(z; m_k, C_k)."""
        return torch.cat([part.logsumexp(1) for part in self._joint(z)])

    def assign(self, z: torch.Tensor) -> torch.Tensor:
        """The component most responsible for each z (S, d), shape (S,)."""
        return torch.cat([part.argmax(1) for part in self._joint(z)])

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Independent draws (count, d), float64: a component by its weight, then its normal."""
        weight = self.weight.to(generator.device)
        which = torch.multinomial(weight, count, replacement=True, generator=generator)
        which = which.to(self.mean.device)
        noise = normal((count, self.mean.shape[1]), self.mean, generator)
        if self.covariance.ndim == 2:
            return self.mean[which] + self.covariance.sqrt()[which] * noise
        factor = torch.linalg.cholesky(self.covariance)
        result = torch.empty_like(noise)
        # Component by component: a factor for each draw would take D² numbers a draw.
        for k in which.unique().tolist():
            members = which == k
            result[members] = self.mean[k] + noise[members] @ factor[k].T
        return result

    def _joint(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        """log w_k + log N(z; m_k, C_k), some rows at a time: all of them need not fit in memory."""
        diagonal = self.covariance.ndim == 2
        rows = max(1, _TILE // sum(self.natural.shape))
        for part in z.split(rows):
            yield features(part.double(), diagonal) @ self.natural


class SmoothedMixture:
    """1/n Σᵢ N(m_k + √(1−h²)(μᵢ − m_k), diag(σᵢ² + h² C_k)), k = k(i) the cluster of image i.

    Every training image keeps a component. h² = 0 is q_N itself, h² = 1 the mixture of the
    clusters, without their correlations; in between each posterior is widened along its cluster
    and drawn to its centre, so that the cluster's variances stay what they were (West 1993).
    """

    def __init__(
        self, smoothing: float, clusters: GaussianMixture, mean: torch.Tensor, logvar: torch.Tensor
    ) -> None:
        self.name = f"smoothed training mixture, h2 = {smoothing:g}"
        which = clusters.assign(mean)
        centre = clusters.mean[which].to(mean.dtype)
        spread = clusters.covariance
        if spread.ndim == 3:
            spread = spread.diagonal(dim1=1, dim2=2)
        variance = logvar.double().exp() + smoothing * spread[which]
        self._mixture = MixtureLogDensity(
            centre + math.sqrt(1 - smoothing) * (mean - centre), variance.log().to(mean.dtype)
        )

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log of the average of the widened posteriors at z (S, d)."""
        return self._mixture(z).double()


class Stack:
    """Σ_k w_k r_k(z), a convex combination of densities and so a density."""

    def __init__(self, name: str, densities: Sequence[Density], weight: torch.Tensor) -> None:
        self.name = name
        self.densities = list(densities)
        self.weight = weight

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log Σ_k w_k r_k(z)."""
        return self.combine(torch.stack([r.log_prob(z) for r in self.densities], 1))

    def combine(self, log_densities: torch.Tensor) -> torch.Tensor:
        """The same from the log densities of the parts, (S, K)."""
        return (log_densities + self.weight.log()).logsumexp(1)


def stack_weights(log_densities: torch.Tensor, iterations: int = 1000) -> torch.Tensor:
    """Weights w (K,) that maximize the mean of log Σ_k w_k r_k over the rows, by EM.

    The objective is concave in w, so EM from the uniform weights reaches its maximum.

    Args:
        log_densities: log r_k(z_s) on points that no r_k was fitted to, (S, K).
        iterations: of EM; what is left to gain falls as 1/iterations.
    """
    (weight,) = made(_stack_weights, [log_densities], (iterations,), len(log_densities))
    return weight


def _stack_weights(log_densities: Sequence[torch.Tensor], iterations: int) -> list[torch.Tensor]:
    """Of several tables (S, K). A density that one lacks is 0 everywhere, and gets no weight."""
    counts = [table.shape[1] for table in log_densities]
    tables = torch.stack(
        [pad(table, (0, max(counts) - table.shape[1]), value=-math.inf) for table in log_densities]
    )
    own = torch.tensor(counts, device=tables.device)[:, None, None]
    weight = (torch.arange(max(counts), device=tables.device) < own).to(tables.dtype) / own
    for _ in range(iterations):
        weight = (tables + weight.log()).softmax(2).mean(1, keepdim=True)
    return [row[0, :count] for row, count in zip(weight, counts, strict=True)]


def features(z: torch.Tensor, diagonal: bool) -> torch.Tensor:
    """[1, z, z²] or [1, z, z_i z_j (i <= j)]: a Gaussian's log density is linear in them.

    Args:
        z: (..., S, d).
    """
    ones = torch.ones_like(z[..., :1])
    if diagonal:
        return torch.cat([ones, z, z.square()], -1)
    if z.device.type != "cpu":
        row, column = torch.triu_indices(z.shape[-1], z.shape[-1], device=z.device)
        return torch.cat([ones, z, z[..., row] * z[..., column]], -1)
    # Slices, in the same order: on a CPU indexing columns would take three times as long.
    products = [z[..., i : i + 1] * z[..., i:] for i in range(z.shape[-1])]
    return torch.cat([ones, z, *products], -1)


def full_rank(covariance: torch.Tensor) -> torch.Tensor:
    """Full covariances (..., d, d), those that are singular thickened.

    Moments of float32 sums: what is flat may come out below 0 by their rounding.
    """
    singular = torch.linalg.cholesky_ex(covariance).info > 0
    if not singular.any():
        return covariance
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    thickness = _ROUNDED * variance.mean(-1) * singular
    return covariance + torch.diag_embed(thickness[..., None].expand(variance.shape))


def natural(
    log_weight: torch.Tensor,
    mean: torch.Tensor,
    covariance: torch.Tensor,
    dims: int | torch.Tensor,
) -> torch.Tensor:
    """Coefficients (..., F, K) of log w_k + log N(z; m_k, C_k) on features(z).

    Args:
        log_weight: (..., K).
        mean: (..., K, d).
        covariance: (..., K, d) or, full, (..., K, d, d).
        dims: how many of the d dimensions count; the others have mean 0 and variance 1, and z is 0
            there. One number, or one a mixture, (..., 1).
    """
    if covariance.ndim == mean.ndim:
        precision = 1 / covariance
        linear = precision * mean
        square = -0.5 * precision
        log_det = covariance.log().sum(-1)
    else:
        factor = torch.linalg.cholesky(covariance)
        inverse = torch.cholesky_inverse(factor)
        linear = (inverse @ mean[..., None])[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        row, column = torch.triu_indices(*inverse.shape[-2:], device=mean.device)
        square = torch.where(row == column, -0.5, -1.0) * inverse[..., row, column]
    constant = log_weight - 0.5 * (log_det + (mean * linear).sum(-1) + dims * _LOG_2PI)
    return torch.cat([constant[..., None], linear, square], -1).mT.contiguous()


def normal(
    shape: tuple[int, int], like: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Standard normal numbers, drawn where the generator is."""
    source = like.device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, device=source, dtype=like.dtype)
    return noise.to(like.device)


def draw(
    mean: torch.Tensor, logvar: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """One z ~ N(mean, diag exp(logvar)) for every row."""
    return mean + torch.exp(0.5 * logvar) * normal((len(mean), mean.shape[1]), mean, generator)
