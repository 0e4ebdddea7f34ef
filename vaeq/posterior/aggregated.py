"""The empirical aggregated posterior q_N(z) = 1/N Σᵢ N(z; μᵢ, diag σᵢ²) of N encoded images."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from vaeq.errors import InputError
from vaeq.posterior.log_density import MixtureLogDensity, chunk_rows, path_words, sum_rows

# Where |μ|/σ passes the first, float32 draws would be rounded by a hundredth of their σ; past the
# second, float64 draws by a thousandth.
_SINGLE_RESOLVES = 1e5
_DOUBLE_RESOLVES = 1e12
# float32 holds exp of no more than 88, and a sum of such variances needs room.
LARGEST_LOGVAR = 80.0

T = TypeVar("T")


class AggregatedPosterior:
    """The mixture of the N Gaussian posteriors q(z|xᵢ) = N(μᵢ, diag σᵢ²), with equal weights.

    This is the *empirical* aggregated posterior of the images it is given, not the population one.

    Args:
        mean: μ, shape (N, D), N >= 1, D >= 1, float32 or float64, on the CPU or a GPU.
        logvar: log σ², the same shape, dtype and device, within ±80.
        centre: origin of the arithmetic of log_prob, (D,), float64; None: the mean of the codes.

    float32 codes with |μ|/σ above 1e5 are converted to float64, so that draws of z resolve σ.

    Raises:
        InputError: on a wrong type or shape; on a NaN or an infinity (how many, and where first);
            on a logvar out of range; on |μ|/σ above 1e12, which float64 does not resolve either.
    """

    def __init__(
        self, mean: torch.Tensor, logvar: torch.Tensor, *, centre: torch.Tensor | None = None
    ) -> None:
        _check_codes(mean, logvar)
        self.mean = mean.detach()
        self.logvar = logvar.detach()
        if _check_resolution(self.mean, self.logvar) > _SINGLE_RESOLVES:
            self.mean = self.mean.double()
            self.logvar = self.logvar.double()
        self._centre = centre

    @functools.cached_property
    def _density(self) -> MixtureLogDensity:
        return MixtureLogDensity(self.mean, self.logvar, self._centre)

    @property
    def n(self) -> int:
        """Number of components (images)."""
        return self.mean.shape[0]

    @property
    def latent_dim(self) -> int:
        """Number of latent dimensions."""
        return self.mean.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 where the codes came so or are too narrow for float32."""
        return self.mean.dtype

    @property
    def path(self) -> str:
        """Which arithmetic :meth:`log_prob` takes, e.g. ``"tiled float32"``."""
        found: Counter[str] = Counter()
        for part in self.over_parts(_arithmetic):
            found.update(part)
        return path_words(found)

    def sample(
        self, n_samples: int, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw (xᵢ, z) pairs: i uniform over the images, with replacement, then z ~ q(z|xᵢ).

        The pairs are independent, also where an image repeats (``n_samples`` may exceed N), so the
        standard error of a mean over them is sd/√S, with no clustering to correct for.

        Args:
            n_samples: S >= 1.
            generator: source of randomness; on the CPU, or on the device of the codes.

        Returns:
            z, shape (S, D), and the index of each draw's image, shape (S,).
        """
        if n_samples < 1:
            raise InputError(f"n_samples must be >= 1, got {n_samples}.")
        source = self.device if generator is None else generator.device
        index = torch.randint(self.n, (n_samples,), generator=generator, device=source)
        shape = (n_samples, self.latent_dim)
        noise = torch.randn(shape, generator=generator, device=source, dtype=self.dtype)
        index = index.to(self.device)
        mean, logvar = self.rows(index)
        return mean + torch.exp(0.5 * logvar) * noise.to(self.device), index

    def rows(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """μ and log σ² of some images, by their numbers, in that order."""
        return self.mean[index], self.logvar[index]

    def over_parts(self, function: Callable[..., T], *arguments: Any) -> list[T]:
        """``function(part, *arguments)`` for each part of the components that is held together.

        Here there is one part, all of them. Sums over components are written with this, so that
        :class:`vaeq.posterior.shards.ShardedPosterior` can hold its parts elsewhere.

        Args:
            function: of a module's top level; it takes and gives tensors, numbers, dataclasses.
        """
        return [function(self, *arguments)]

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Exact log q_N(z) over all N components, in nats, in bounded memory.

        Args:
            z: points, shape (S, D).

        Returns:
            Shape (S,), in the dtype of the codes, within 1e-3 nats of float64 (see ``path``).
        """
        z = torch.as_tensor(z, device=self.device).to(self.dtype)
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise InputError(f"z must have shape (S, {self.latent_dim}), got {tuple(z.shape)}.")
        return self._density(z).to(self.dtype) if len(z) else z.new_empty(0)

    def log_sum(self, z: torch.Tensor) -> torch.Tensor:
        """log Σᵢ q(z|xᵢ), float64, shape (S,): what these components add to a larger sum."""
        return self._density(z) + math.log(self.n)

    def log_prob_conditional(self, z: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """log q(z_s|x_{index_s}) of each draw under its own component, shape (S,)."""
        mean, logvar = self.rows(index)
        square = (z - mean).square() * torch.exp(-logvar)
        return -0.5 * (square + logvar + math.log(2 * math.pi)).sum(1)

    def log_prob_marginal(self, z: torch.Tensor) -> torch.Tensor:
        """log q_{N,j}(z_j) of every dimension by itself, shape (S, D), in nats, exact.

        S·N·D exponentials: for the KL of a dimension prefer ``marginals``, which needs none.
        """
        columns = [
            MixtureLogDensity(self.mean[:, j : j + 1], self.logvar[:, j : j + 1])(z[:, j : j + 1])
            for j in range(self.latent_dim)
        ]
        return torch.stack(columns, dim=1).to(self.dtype)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact mean (D,) and covariance Cov(μ) + diag mean(σ²) (D, D) of q_N, float64, CPU."""
        centre = torch.stack(self.over_parts(_column_sums)).sum(0) / self.n
        return centre, torch.stack(self.over_parts(_second_moments, centre)).sum(0) / self.n

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The codes a few rows at a time, float64, on the CPU: for passes in bounded memory."""
        rows = chunk_rows(self.latent_dim)
        for mean, logvar in zip(self.mean.split(rows), self.logvar.split(rows), strict=True):
            yield mean.to("cpu", torch.float64), logvar.to("cpu", torch.float64)

    def subset(self, index: torch.Tensor) -> AggregatedPosterior:
        """The aggregated posterior of some of the images (indices or a boolean mask)."""
        return AggregatedPosterior(self.mean[index], self.logvar[index])

    def __repr__(self) -> str:
        return f"AggregatedPosterior(n={self.n}, latent_dim={self.latent_dim}, path={self.path!r})"


def _arithmetic(part: AggregatedPosterior) -> dict[str, int]:
    return part._density.arithmetic


def _column_sums(part: AggregatedPosterior) -> torch.Tensor:
    return sum_rows(part.mean).cpu()


def _second_moments(part: AggregatedPosterior, centre: torch.Tensor) -> torch.Tensor:
    """Σᵢ (μᵢ − centre)(μᵢ − centre)ᵀ + diag σᵢ², (D, D)."""
    variance = torch.zeros_like(centre)
    scatter = torch.zeros(len(centre), len(centre), dtype=torch.float64)
    for mean, logvar in part.chunks():
        variance += logvar.exp().sum(0)
        offset = mean - centre
        scatter += offset.T @ offset
    return scatter + torch.diag(variance)


def _check_codes(mean: torch.Tensor, logvar: torch.Tensor) -> None:
    for name, codes in (("mean", mean), ("logvar", logvar)):
        if not isinstance(codes, torch.Tensor):
            raise InputError(f"{name} must be a torch.Tensor, got {type(codes).__name__}.")
        if codes.dtype not in (torch.float32, torch.float64):
            raise InputError(f"{name} must be float32 or float64, got {codes.dtype}; convert it.")
        if codes.ndim != 2 or codes.shape[0] < 1 or codes.shape[1] < 1:
            raise InputError(
                f"{name} must have shape (N, D) with N >= 1 and D >= 1, got {tuple(codes.shape)}."
            )
    if mean.shape != logvar.shape:
        raise InputError(
            "mean and logvar must have the same shape, "
            f"got {tuple(mean.shape)} and {tuple(logvar.shape)}."
        )
    if mean.dtype != logvar.dtype or mean.device != logvar.device:
        raise InputError(
            "mean and logvar must have the same dtype and device, "
            f"got {mean.dtype} on {mean.device} and {logvar.dtype} on {logvar.device}."
        )
    rows = chunk_rows(mean.shape[1])
    for name, codes in (("mean", mean), ("logvar", logvar)):
        count, first = 0, (0, 0)
        for start, part in enumerate(codes.split(rows)):
            bad = (~torch.isfinite(part)).nonzero()
            if not count and len(bad):
                first = (start * rows + int(bad[0, 0]), int(bad[0, 1]))
            count += len(bad)
        if count:
            raise InputError(
                f"{name} must be finite, got {count} NaN or infinite of {codes.numel()} values, "
                f"the first at [{first[0]}, {first[1]}]."
            )
    low, high = float(logvar.min()), float(logvar.max())
    if low < -LARGEST_LOGVAR or high > LARGEST_LOGVAR:
        raise InputError(
            f"logvar must be within ±{LARGEST_LOGVAR:g}, got values from {low:.4g} to {high:.4g}; "
            "is it log σ², natural logarithm?"
        )


def _check_resolution(mean: torch.Tensor, logvar: torch.Tensor) -> float:
    """The largest |μ|/σ."""
    rows = chunk_rows(mean.shape[1])
    largest = max(
        float((part.double().abs() * torch.exp(-0.5 * spread.double())).max())
        for part, spread in zip(mean.split(rows), logvar.split(rows), strict=True)
    )
    if largest > _DOUBLE_RESOLVES:
        raise InputError(
            f"|mean|/std must be at most {_DOUBLE_RESOLVES:g}, got {largest:.3g}: float64 cannot "
            "resolve so narrow a posterior; centre the codes or raise the variance."
        )
    return largest
