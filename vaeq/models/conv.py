"""A convolutional variational autoencoder of the common kind: strides down, transposed strides up.

Kernels of 4 x 4 at stride 2, as in DCGAN (Radford, Metz and Chintala 2016), and one dense layer on
each side of the code, as in Burgess et al. (2018), "Understanding disentangling in β-VAE". With
``depth`` d and ``width`` w, the keys of the multilayer perceptron,

    encoder   d convolutions of c, 2c, 4c, ... channels, c = w/16, then a dense layer of w units
    decoder   a dense layer of w units, then d transposed convolutions back, mirrored

so that a wider network is wider throughout, and a deeper one sees more of the image at once. The
model itself is that of :mod:`vaeq.models.mlp`: a Gaussian q(z|x), Bernoulli pixels.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from vaeq.errors import InputError
from vaeq.models.mlp import ACTIVATIONS, RECTIFIERS, VAE
from vaeq.models.sizes import KERNEL, PADDING, STRIDE, convolutions

# Weights that reach one output, of a kernel's 16, when the stride spreads it: (kernel/stride)².
_OVERLAP = (KERNEL // STRIDE) ** 2


def require_depth(shape: tuple[int, ...], encoder_depth: int, decoder_depth: int) -> None:
    """Refuse more convolutions than there are halvings of an image's shorter side, or none."""
    most = min(shape[:2]).bit_length() - 1
    for name, depth in (("encoder_depth", encoder_depth), ("decoder_depth", decoder_depth)):
        if not 1 <= depth <= most:
            raise InputError(
                f"{name} must be between 1 and {most}, how often images of {shape[0]} x {shape[1]} "
                f"can be halved, with model=conv, got {depth}."
            )


class ConvVAE(VAE):
    """Convolutional encoder and decoder of images that come and go as rows of pixels.

    Args:
        shape: height, width and, of colour images, channels; see ``vaeq.data.images.Images``.
        latent_dim: D, the dimension of z.
        encoder_depth, encoder_width: see the module and :func:`require_depth`.
        decoder_depth, decoder_width: likewise.
        activation: a name of ``ACTIVATIONS``.
        initialization: ``he_glorot`` or ``torch``, see :func:`vaeq.models.mlp.mlp`.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latent_dim: int,
        *,
        encoder_depth: int,
        encoder_width: int,
        decoder_depth: int,
        decoder_width: int,
        activation: str,
        generator: torch.Generator,
        initialization: str = "he_glorot",
    ) -> None:
        nn.Module.__init__(self)
        require_depth(shape, encoder_depth, decoder_depth)
        self.latent_dim = latent_dim
        self.activation = activation
        nonlinear = ACTIVATIONS[activation]
        sizes, channels = convolutions(shape, encoder_depth, encoder_width)
        flat = channels[-1] * math.prod(sizes[-1])
        layers: list[nn.Module] = [_Channels(shape)]
        for fan_in, fan_out in pairwise(channels):
            layers += [nn.Conv2d(fan_in, fan_out, KERNEL, STRIDE, PADDING), nonlinear()]
        layers += [nn.Flatten(), nn.Linear(flat, encoder_width), nonlinear()]
        self.encoder = nn.Sequential(*layers, nn.Linear(encoder_width, 2 * latent_dim))

        sizes, channels = convolutions(shape, decoder_depth, decoder_width)
        flat = channels[-1] * math.prod(sizes[-1])
        layers = [nn.Linear(latent_dim, decoder_width), nonlinear(), nn.Linear(decoder_width, flat)]
        layers += [nonlinear(), nn.Unflatten(1, (channels[-1], *sizes[-1]))]
        for i in range(decoder_depth, 0, -1):
            # A side of 7 was halved to 3; one more row brings back 7 and not 6.
            height, width = sizes[i - 1]
            lost = height % STRIDE, width % STRIDE
            layers.append(
                nn.ConvTranspose2d(
                    channels[i], channels[i - 1], KERNEL, STRIDE, PADDING, output_padding=lost
                )
            )
            layers += [nonlinear()] if i > 1 else [_Pixels()]
        self.decoder = nn.Sequential(*layers)
        _initialize(self.encoder, activation, generator, initialization, heads=2)
        _initialize(self.decoder, activation, generator, initialization, heads=1)


def _initialize(
    net: nn.Sequential, activation: str, generator: torch.Generator, name: str, heads: int
) -> None:
    """The rules of :func:`vaeq.models.mlp.mlp`, with the fans of convolutions.

    Of a convolution's weights kernel² x channels reach one output; a transposed one's are spread
    over stride² outputs.
    """
    layers = [
        layer for layer in net if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    ]
    for layer in layers:
        rows, columns = layer.weight.shape[:2]
        if isinstance(layer, nn.ConvTranspose2d):
            fan_in, fan_out = rows * _OVERLAP, columns * KERNEL**2
        elif isinstance(layer, nn.Conv2d):
            fan_in, fan_out = columns * KERNEL**2, rows * _OVERLAP
        else:
            fan_in, fan_out = columns, rows
        last = layer is layers[-1]
        if last:
            fan_out //= heads  # mean and logvar are two layers in one
        rectified = activation in RECTIFIERS and not last
        variance = 2 / fan_in if rectified else 2 / (fan_in + fan_out)
        bound = 1 / math.sqrt(layer.weight[0].numel())
        assert layer.bias is not None
        with torch.no_grad():
            if name == "torch":
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            else:
                layer.weight.normal_(0, math.sqrt(variance), generator=generator)
                layer.bias.zero_()


class _Channels(nn.Module):
    """Rows of pixels (B, H·W·C) as images (B, C, H, W)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape if len(shape) == 3 else (*shape, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, *self._shape).permute(0, 3, 1, 2)


class _Pixels(nn.Module):
    """Images (B, C, H, W) as rows of pixels (B, H·W·C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)
