"""Codes to decode, from four sources, and pictures of what the decoder makes of them.

prior       z ~ N(0, I), what a variational autoencoder is sampled from
aggregated  z ~ q_N(z) = 1/N Σᵢ q(z|xᵢ), what its decoder was trained on
gmm         z ~ r(z), a Gaussian mixture fitted to q_N after training (Ghosh et al. 2020)
scaled      z ~ N(0, s² I), s < 1: nearer to the mode, where samples are said to look better
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vaeq.divergence.ex_post import ExPost
from vaeq.errors import InputError
from vaeq.posterior.aggregated import AggregatedPosterior

SOURCES = ("prior", "aggregated", "gmm", "scaled")
# Shrinks the volume of the typical set by 0.8^D.
SCALE = 0.8

Decode = Callable[[Tensor], Tensor]
Sampler = Callable[[int, torch.Generator], Tensor]


def samplers(
    training: AggregatedPosterior, ex_post: ExPost, *, scale: float = SCALE
) -> dict[str, Sampler]:
    """A sampler (count, generator) → codes (count, D) for each of ``SOURCES``.

    The generator is on the CPU or on the device of the codes; codes have the dtype of the training
    codes, so that the decoder takes them.

    Args:
        training: codes of the training images.
        ex_post: :func:`vaeq.divergence.ex_post.fit_ex_post` of them.
        scale: s > 0 of the source ``scaled``.
    """
    if not scale > 0:
        raise InputError(f"scale must be > 0, got {scale}; 1 is the prior itself.")

    def prior(count: int, generator: torch.Generator) -> Tensor:
        shape = (count, training.latent_dim)
        z = torch.randn(shape, generator=generator, device=generator.device, dtype=training.dtype)
        return z.to(training.device)

    def aggregated(count: int, generator: torch.Generator) -> Tensor:
        return training.sample(count, generator)[0]

    def gmm(count: int, generator: torch.Generator) -> Tensor:
        return ex_post.density.sample(count, generator).to(training.dtype)

    def scaled(count: int, generator: torch.Generator) -> Tensor:
        return scale * prior(count, generator)

    return dict(zip(SOURCES, (prior, aggregated, gmm, scaled), strict=True))


@torch.no_grad()
def decode_means(decode: Decode, z: Tensor, batch_size: int = 4096) -> Tensor:
    """Bernoulli means, (S, pixels) in [0, 1], of codes (S, D): grey levels, no pixel is drawn."""
    return torch.cat([decode(part).sigmoid() for part in z.split(batch_size)])


def latent_plane(
    decode: Decode, latent_dim: int, n: int = 20, *, device: torch.device | str = "cpu"
) -> Tensor:
    """The learned manifold: means (n², pixels) on a grid of quantiles of N(0, I), row by row.

    Cell (row, column) decodes (Φ⁻¹((column + ½)/n), Φ⁻¹(1 − (row + ½)/n)): every cell has the same
    mass under the prior, the second coordinate points up (Kingma and Welling 2014, appendix A).

    Raises:
        InputError: latent_dim is not 2.
    """
    if latent_dim != 2:
        raise InputError(
            f"latent_plane needs latent_dim = 2, got {latent_dim}; use interpolations."
        )
    if n < 1:
        raise InputError(f"n must be >= 1, got {n}.")
    from scipy.special import ndtri

    quantiles = torch.from_numpy(ndtri((torch.arange(n).double().numpy() + 0.5) / n))
    second, first = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    z = torch.stack([first.flatten(), second.flatten()], 1)
    return decode_means(decode, z.to(device, torch.float32))


def interpolations(decode: Decode, mean_pairs: Tensor, steps: int = 10) -> Tensor:
    """Means (P·steps, pixels) on the way between two codes, pair by pair, ends included.

    Spherical: the direction turns at an even rate while the length changes linearly (Shoemake
    1985; White 2016). Halfway along the straight line between two independent codes the length is
    down by √½, where with many dimensions neither N(0, I) nor q_N has any mass: what the decoder
    shows there says nothing of either. Pairs without one turn between them (opposite codes, or one
    at the origin) take the straight line, as parallel ones do by themselves.

    Args:
        mean_pairs: (P, 2, D).
        steps: >= 2 codes a pair.
    """
    if mean_pairs.ndim != 3 or mean_pairs.shape[1] != 2:
        raise InputError(f"mean_pairs must have shape (P, 2, D), got {tuple(mean_pairs.shape)}.")
    if steps < 2:
        raise InputError(f"steps must be >= 2, got {steps}.")
    return decode_means(decode, spherical(mean_pairs[:, 0], mean_pairs[:, 1], steps).flatten(0, 1))


def spherical(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Codes (P, steps, D) on the way from start to end, each (P, D)."""
    t = torch.linspace(0, 1, steps, dtype=torch.float64, device=start.device)[None, :, None]
    a, b = start.double()[:, None], end.double()[:, None]
    straight = (1 - t) * a + t * b
    norm_a, norm_b = a.norm(dim=2, keepdim=True), b.norm(dim=2, keepdim=True)
    cosine = (a * b).sum(2, keepdim=True) / (norm_a * norm_b)
    angle = torch.acos(cosine.clamp(-1, 1))  # rounding alone takes a cosine past 1
    turned = (torch.sin((1 - t) * angle) * a / norm_a + torch.sin(t * angle) * b / norm_b) / (
        torch.sin(angle)
    )
    length = (1 - t) * norm_a + t * norm_b
    # NaN at the origin compares false.
    turns = torch.sin(angle) > 1e-6
    return torch.where(turns, length * turned, straight).to(start.dtype)


def as_uint8(means: Tensor) -> Tensor:
    """Grey levels 0..255 of means in [0, 1], to the nearest."""
    return (means * 255).round().to(torch.uint8)
