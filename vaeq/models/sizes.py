"""What a network is made of, before it is made: units and weights. No torch in this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Of the convolutions.
KERNEL, STRIDE, PADDING = 4, 2, 1
# Units of the dense layer for each channel of the first convolution.
UNITS_A_CHANNEL = 16


@dataclass(frozen=True)
class Sizes:
    """Units of every layer, inputs and outputs included, and parameters, biases included."""

    units: tuple[int, ...]
    weights: int


def perceptron(inputs: int, depth: int, width: int, outputs: int) -> Sizes:
    """Of :func:`vaeq.models.mlp.mlp`."""
    units = (inputs, *[width] * depth, outputs)
    return Sizes(units, _dense(units))


def convolutional_encoder(shape: Sequence[int], depth: int, width: int, latent_dim: int) -> Sizes:
    """Of the encoder of :class:`vaeq.models.conv.ConvVAE`."""
    sides, channels = convolutions(shape, depth, width)
    dense = _values(sides, channels)[-1], width, 2 * latent_dim
    weights = sum((a * KERNEL**2 + 1) * b for a, b in pairwise(channels))
    return Sizes((*_values(sides, channels), width, 2 * latent_dim), weights + _dense(dense))


def convolutional_decoder(shape: Sequence[int], depth: int, width: int, latent_dim: int) -> Sizes:
    """Of the decoder of :class:`vaeq.models.conv.ConvVAE`."""
    sides, channels = convolutions(shape, depth, width)
    values = _values(sides, channels)[::-1]
    weights = sum((a * KERNEL**2 + 1) * b for a, b in pairwise(channels[::-1]))
    return Sizes((latent_dim, width, *values), weights + _dense((latent_dim, width, values[0])))


def convolutions(
    shape: Sequence[int], depth: int, width: int
) -> tuple[list[tuple[int, int]], list[int]]:
    """Height and width, and channels, of the image and after each convolution."""
    sides = [(shape[0] >> i, shape[1] >> i) for i in range(depth + 1)]
    first = max(1, width // UNITS_A_CHANNEL)
    return sides, [*(shape[2:] or (1,)), *(first << i for i in range(depth))]


def _values(sides: list[tuple[int, int]], channels: list[int]) -> list[int]:
    return [height * width * c for (height, width), c in zip(sides, channels, strict=True)]


def _dense(units: Sequence[int]) -> int:
    return sum((a + 1) * b for a, b in pairwise(units))
