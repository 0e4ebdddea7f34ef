"""Probabilistic PCA by EM (Tipping & Bishop 1999): its aggregated posterior is N(0, I).

    z ~ N(0, I_D),  x|z ~ N(W z + μ, s² I);   p(z|x) = N(M⁻¹ Wᵀ(x − μ), s² M⁻¹),  M = WᵀW + s² I

At the maximum of the likelihood q_N, the average of the exact posteriors p(z|xᵢ), has mean 0 and
covariance M⁻¹ Wᵀ S W M⁻¹ + s² M⁻¹ = I: what is left of KL(q_N ‖ p) is shape alone, and on data from
the model it vanishes with N.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.models.elbo import gaussian_kl

_LOG_2PI = math.log(2 * math.pi)
_ROWS = 4096
# Eigenvalues of the covariance below this share of the largest are rounding.
_RANK = 1e-12


@dataclass(frozen=True)
class PPCA:
    """A fitted model, and how EM came to it; all float64."""

    mean: Tensor  # (pixels,)
    weight: Tensor  # (pixels, D), columns orthogonal, the longest first
    noise_variance: float  # s²
    iterations: int
    log_likelihood: list[float]  # nats per image before each iteration, and after the last
    closed_form_gap: float  # maximum of the log-likelihood, in closed form, less the last of them
    covariance_gap: float  # ‖WWᵀ + s² I − closed form‖ over the closed form, Frobenius
    converged: bool

    @property
    def latent_dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    @functools.cached_property
    def _precision(self) -> Tensor:
        """The diagonal of M, (D,): with orthogonal columns it has no other part."""
        return self.weight.square().sum(0) + self.noise_variance

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the exact p(z|x), (N, D) each, of images (N, pixels).

        The covariance is diagonal since WᵀW is, and the same for every image.
        """
        parts = [(_unit(part) - self.mean) @ self.weight for part in x.split(_ROWS)]
        mean = torch.cat(parts) / self._precision
        variance = self.noise_variance / self._precision
        return mean, variance.log().expand_as(mean).contiguous()

    def decode(self, z: Tensor) -> Tensor:
        """E[x|z] = W z + μ, (B, pixels); grey levels that may leave [0, 1]."""
        return z.double() @ self.weight.T + self.mean

    def observation(self, decoded: Tensor, x: Tensor) -> Tensor:
        """log p(x|z) (B, K) of decoded (B, K, pixels), x (B, pixels): the likelihood's."""
        square = (x.double()[:, None] - decoded).square().sum(2)
        constant = decoded.shape[2] * (_LOG_2PI + math.log(self.noise_variance))
        return -0.5 * (square / self.noise_variance + constant)

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; μ, WWᵀ + s² I), nats an image (N,), in closed form.

        A density of grey levels in [0, 1], which may be positive: not to be compared with the
        Bernoulli ELBO of a VAE, which is the log of a probability.
        """
        pixels = len(self.mean)
        log_det = (pixels - self.latent_dim) * math.log(self.noise_variance)
        log_det += float(self._precision.log().sum())
        squares = []
        for part in x.split(_ROWS):
            offset = _unit(part) - self.mean
            explained = ((offset @ self.weight).square() / self._precision).sum(1)
            squares.append((offset.square().sum(1) - explained) / self.noise_variance)
        return -0.5 * (torch.cat(squares) + log_det + pixels * _LOG_2PI)

    def evaluate(self, x: Tensor) -> dict[str, Estimate]:
        """``log_likelihood``, ``elbo``, ``reconstruction``, ``inference_gap``, nats an image.

        The ELBO is computed as E_q log p(x|z) − KL(q ‖ p) and equals the log-likelihood to
        rounding. The gap is E KL(q(z|x) ‖ p(z|x)) of two equal distributions: 0, by definition.
        As for :meth:`log_prob`, these are densities of grey levels.
        """
        pixels, s2 = len(self.mean), self.noise_variance
        mean, logvar = self.encode(x)
        # E_q ‖x − μ − W z‖² = ‖x − μ − W m‖² + Σ_j v_j ‖W_j‖².
        spread = float((logvar[0].exp() * self.weight.square().sum(0)).sum())
        total = 0.0
        for part, m in zip(x.split(_ROWS), mean.split(_ROWS), strict=True):
            total += float((_unit(part) - self.decode(m)).square().sum())
        square = total / len(x) + spread
        reconstruction = -0.5 * (square / s2 + pixels * (_LOG_2PI + math.log(s2)))
        elbo = reconstruction - float(gaussian_kl(mean, logvar).mean())
        return {
            "log_likelihood": Estimate(float(self.log_prob(x).mean()), 0.0, "nats"),
            "elbo": Estimate(elbo, 0.0, "nats"),
            "reconstruction": Estimate(reconstruction, 0.0, "nats"),
            "inference_gap": Estimate(0.0, 0.0, "nats"),
        }

    def sample_images(
        self, count: int, generator: torch.Generator, *, noise: bool = True
    ) -> Tensor:
        """Images (count, pixels) from the model; without noise E[x|z] of z ~ N(0, I)."""
        z = _normal((count, self.latent_dim), self.mean, generator)
        images = self.decode(z)
        if noise:
            shape = (count, len(self.mean))
            images += math.sqrt(self.noise_variance) * _normal(shape, self.mean, generator)
        return images


def fit_ppca(
    x: Tensor,
    latent_dim: int,
    *,
    max_iterations: int = 20_000,
    tolerance: float = 1e-10,
    generator: torch.Generator,
) -> PPCA:
    """Fit probabilistic PCA by parameter-expanded EM from random weights.

    With S the sample covariance (over N), one iteration is Tipping and Bishop's EM on it,

        W ← S W (s² I + M⁻¹ Wᵀ S W)⁻¹,   s² ← tr(S − S W M⁻¹ W_newᵀ)/pixels      (eqs. 29, 30)

    followed by W ← W Φ^½, Φ = s² M⁻¹ + M⁻¹ Wᵀ S W M⁻¹ the covariance of q_N under the old
    parameters: the prior's covariance is estimated too and folded into W (PX-EM; Liu, Rubin & Wu
    1998). The likelihood still never falls, while the lengths of W's columns converge at the rate
    (s²/λ_j)² instead of 1 − 2 s²(λ_j − s²)/λ_j², which takes thousands of steps where s² is small.
    The directions converge at λ_{D+1}/λ_D of the eigenvalues of S. All in the eigenbasis of S, of
    which EM is told nothing: it costs pixels·D² an iteration, whatever N.

    The closed form, W = U (Λ − s² I)^½ and s² the mean of the eigenvalues left out (eqs. 7, 8),
    is the check and not the fit: ``closed_form_gap`` and ``covariance_gap``. Last, W is rotated so
    that WᵀW is diagonal, which changes nothing of p(x).

    Args:
        x: (N, pixels), uint8 or floating point. Pixels that never vary are no trouble.
        latent_dim: D >= 1, below the rank of S: else s² → 0 and the likelihood has no maximum.
        max_iterations: >= 1.
        tolerance: of the largest relative change of W and s² in an iteration.
        generator: of the first weights.
    """
    mean, covariance = _moments(x)
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding alone makes an eigenvalue negative.
    values = values.flip(0).clamp_min(0)
    vectors = vectors.flip(1)
    rank = int((values > _RANK * values[0]).sum()) if float(values[0]) > 0 else 0
    if not 1 <= latent_dim < rank:
        if rank < 2:
            raise InputError(
                f"model=ppca needs images that vary in two directions at least; these {len(x)} "
                f"have rank {rank}."
            )
        raise InputError(
            f"latent_dim must be >= 1 and below the rank of the images, {rank}, got {latent_dim}."
        )
    if max_iterations < 1:
        raise InputError(f"max_iterations must be >= 1, got {max_iterations}.")
    pixels = len(values)
    total = float(values.sum())
    weight = _normal((pixels, latent_dim), mean, generator) * math.sqrt(total / pixels)
    s2 = total / pixels
    identity = torch.eye(latent_dim, dtype=weight.dtype, device=weight.device)
    trace: list[float] = []
    converged = False
    for _ in range(max_iterations):
        trace.append(_log_likelihood(values, weight, s2))
        m = weight.T @ weight + s2 * identity
        scattered = values[:, None] * weight  # S W
        inner = torch.linalg.solve(m, weight.T @ scattered)  # M⁻¹ Wᵀ S W
        new = torch.linalg.solve(s2 * identity + inner, scattered, left=False)
        explained = (scattered * torch.linalg.solve(m, new.T).T).sum()
        phi = torch.linalg.solve(m, s2 * identity + inner, left=False)
        new = new @ torch.linalg.cholesky((phi + phi.T) / 2)
        new_s2 = (total - float(explained)) / pixels
        change = max(float((new - weight).norm() / new.norm()), abs(new_s2 / s2 - 1))
        weight, s2 = new, new_s2
        if change < tolerance:
            converged = True
            break
    trace.append(_log_likelihood(values, weight, s2))
    best_s2 = float(values[latent_dim:].sum()) / (pixels - latent_dim)
    best = torch.zeros_like(weight)
    best.diagonal().copy_((values[:latent_dim] - best_s2).sqrt())
    closed_form = (best @ best.T).fill_diagonal_(0) + torch.diag(best.square().sum(1) + best_s2)
    found = weight @ weight.T
    found.diagonal().add_(s2)
    left, lengths, _ = torch.linalg.svd(vectors @ weight, full_matrices=False)
    canonical = left * lengths
    # The largest entry of a column positive: a sign for every machine.
    largest = canonical.abs().argmax(0, keepdim=True)
    canonical = canonical * canonical.gather(0, largest).sign()
    return PPCA(
        mean,
        canonical,
        s2,
        len(trace) - 1,
        trace,
        _log_likelihood(values, best, best_s2) - trace[-1],
        float((found - closed_form).norm() / closed_form.norm()),
        converged,
    )


def _log_likelihood(values: Tensor, weight: Tensor, s2: float) -> float:
    """−½ (pixels log 2π + log|C| + tr C⁻¹S), C = WWᵀ + s² I, S = diag(values); nats per image."""
    pixels, dims = weight.shape
    m = weight.T @ weight
    m.diagonal().add_(s2)
    log_det = (pixels - dims) * math.log(s2) + float(m.logdet())
    inner = torch.linalg.solve(m, weight.T @ (values[:, None] * weight)).trace()
    return -0.5 * (pixels * _LOG_2PI + log_det + (float(values.sum()) - float(inner)) / s2)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, over N, a few images at a time: no float64 copy of them all."""
    mean = sum((_unit(part).sum(0) for part in x.split(_ROWS)), torch.zeros(())) / len(x)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=x.device)
    for part in x.split(_ROWS):
        offset = _unit(part) - mean
        scatter.addmm_(offset.T, offset)
    return mean, scatter / len(x)


def _unit(images: Tensor) -> Tensor:
    return images.double().div_(255) if images.dtype == torch.uint8 else images.double()


def _normal(shape: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return noise.to(like.device)
