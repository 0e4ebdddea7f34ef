"""Images drawn from a probabilistic PCA model: for ``model=ppca`` everything about them is known.

    x = μ + W z + s ε,  z ~ N(0, I_D),  ε ~ N(0, I),  μ = ½,  WᵀW = signal · s² I

Of the population KL(q ‖ p) = 0, and in closed form E KL(q(z|x) ‖ p) = ½ D log(1 + signal) and
E log p(x) = −½ (pixels log 2πe + log|WWᵀ + s² I|); see :mod:`vaeq.models.ppca`.

The grey levels are kept in 8 bits, as those of every other image are, and that changes the model by
as much as can be said: s is so small that no pixel comes near black or white (6.5 standard
deviations), hence nothing is clipped, and rounding adds the variance 1/(12 · 255²) (Sheppard 1898),
which is a part of s². A Bernoulli model takes them for grey levels like any other; it is not the
model that they were drawn from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaeq.errors import InputError
from vaeq.models.ppca import PPCA
from vaeq.seeds import derive_seed

# As many as MNIST has.
N_TRAIN, N_TEST = 60_000, 10_000
_MARGIN = 6.5
_ROUNDING = 1 / (12 * 255**2)
_ROWS = 4096


def true_model(dim: int, side: int, signal: float, seed: int) -> PPCA:
    """The model that the images come from, rounding included.

    Args:
        dim: D, below side².
        side: height and width of an image.
        signal: ‖w_j‖²/s² of every column of W.
        seed: of W's directions.
    """
    pixels = side * side
    generator = torch.Generator().manual_seed(derive_seed(seed, "synthetic", "weight"))
    raw = torch.randn(pixels, dim, generator=generator, dtype=torch.float64)
    directions, _ = torch.linalg.qr(raw)
    largest = float((1 + signal * directions.square().sum(1)).max())
    noise_variance = (0.5 / _MARGIN) ** 2 / largest
    mean = torch.full((pixels,), 0.5, dtype=torch.float64)
    weight = directions * math.sqrt(signal * noise_variance)
    return PPCA(mean, weight, noise_variance, 0, [], 0.0, 0.0, True)


def draw_images(dim: int, side: int, signal: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training images (60,000, side²) and held-out ones (10,000, side²), uint8."""
    model = true_model(dim, side, signal, seed)
    noise = math.sqrt(model.noise_variance - _ROUNDING)
    parts = []
    for name, count in (("train", N_TRAIN), ("test", N_TEST)):
        generator = torch.Generator().manual_seed(derive_seed(seed, "synthetic", name))
        images = torch.empty(count, side * side, dtype=torch.uint8)
        for rows in images.split(_ROWS):
            x = model.sample_images(len(rows), generator, noise=False)
            x += noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            levels = x.mul_(255).round_()
            if not 0 <= float(levels.min()) <= float(levels.max()) <= 255:
                raise InputError(
                    f"data.synthetic_seed={seed} draws a pixel beyond black or white, which "
                    "happens once in a thousand data sets; take another."
                )
            rows.copy_(levels)
        parts.append(images)
    return parts[0], parts[1]
