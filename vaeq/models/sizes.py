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
    """Of every layer the units, inputs and outputs included; of all the parameters and products.

    Parameters with the biases; products as multiplications for one image.
    """

    units: tuple[int, ...]
    weights: int
    products: int


def perceptron(inputs: int, depth: int, width: int, outputs: int) -> Sizes:
    """Of :func:`vaeq.models.mlp.mlp`."""
    units = (inputs, *[width] * depth, outputs)
    products = sum(a * b for a, b in pairwise(units))
    return Sizes(units, products + sum(units[1:]), products)


def convolutional_encoder(shape: Sequence[int], depth: int, width: int, latent_dim: int) -> Sizes:
    """Of the encoder of :class:`vaeq.models.conv.ConvVAE`."""
    sides, channels = convolutions(shape, depth, width)
    values = _values(sides, channels)
    dense = perceptron(values[-1], 1, width, 2 * latent_dim)
    weights = sum((a * KERNEL**2 + 1) * b for a, b in pairwise(channels))
    products = _kernel_products(sides, channels)
    return Sizes((*values[:-1], *dense.units), weights + dense.weights, products + dense.products)


def convolutional_decoder(shape: Sequence[int], depth: int, width: int, latent_dim: int) -> Sizes:
    """Of the decoder of :class:`vaeq.models.conv.ConvVAE`."""
    sides, channels = convolutions(shape, depth, width)
    values = _values(sides, channels)[::-1]
    dense = perceptron(latent_dim, 1, width, values[0])
    weights = sum((a * KERNEL**2 + 1) * b for a, b in pairwise(channels[::-1]))
    products = _kernel_products(sides, channels)
    return Sizes((*dense.units, *values[1:]), weights + dense.weights, products + dense.products)


def convolutions(
    shape: Sequence[int], depth: int, width: int
) -> tuple[list[tuple[int, int]], list[int]]:
    """Height and width, and channels, of the image and after each convolution."""
    sides = [(shape[0] >> i, shape[1] >> i) for i in range(depth + 1)]
    first = max(1, width // UNITS_A_CHANNEL)
    return sides, [*(shape[2:] or (1,)), *(first << i for i in range(depth))]


def _values(sides: list[tuple[int, int]], channels: list[int]) -> list[int]:
    return [height * width * c for (height, width), c in zip(sides, channels, strict=True)]


def _kernel_products(sides: list[tuple[int, int]], channels: list[int]) -> int:
    """Every kernel at every place of its smaller image, whichever way it goes."""
    places = [height * width for height, width in sides[1:]]
    pairs = zip(pairwise(channels), places, strict=True)
    return sum(KERNEL**2 * a * b * count for (a, b), count in pairs)
