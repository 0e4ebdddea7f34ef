"""A variational autoencoder of two independent multilayer perceptrons (Kingma and Welling 2014).

    q(z|x) = N(μ(x), diag σ²(x)),  p(x|z) = Π Bernoulli(x_k; sigmoid(logits_k(z))),  p(z) = N(0, I)

Encoder and decoder have a depth and a width each: sweeping one must leave the other alone.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
# Units that keep only half of the signal want He's variance 2/fan_in (He et al. 2015, eq. 10); the
# others Glorot's 2/(fan_in + fan_out) (Glorot and Bengio 2010, eq. 12).
RECTIFIERS = ("relu", "leaky_relu", "elu", "gelu", "silu")
# What ``mean_image`` leaves of the last layers' weights.
_SMALL = 0.1


def mlp(
    sizes: list[int],
    activation: str,
    generator: torch.Generator,
    initialization: str = "he_glorot",
) -> nn.Sequential:
    """Linear layers of the given sizes with the activation between them, none after the last.

    ``initialization`` is ``he_glorot`` or ``mean_image`` (He before a rectifier, else Glorot;
    biases 0; the model adds to the second, see :meth:`VAE.start_at`) or ``torch``, the default of
    torch.nn.Linear: weights and biases uniform within ±1/√fan_in, a sixth of He's variance. It is
    no detail: with many latent dimensions it decides how many of them collapse.
    """
    layers: list[nn.Module] = []
    last = len(sizes) - 2
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)  # skip_init would import half a second of torch
        rectified = activation in RECTIFIERS and i < last
        variance = 2 / fan_in if rectified else 2 / (fan_in + fan_out)
        bound = 1 / math.sqrt(fan_in)
        with torch.no_grad():
            if initialization == "torch":
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.uniform_(-bound, bound, generator=generator)
            else:
                linear.weight.normal_(0, math.sqrt(variance), generator=generator)
                linear.bias.zero_()
        layers.append(linear)
        if i < last:
            layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


class VAE(nn.Module):
    """Encoder, decoder and the reparameterised sample between them.

    Args:
        pixels: number of observed Bernoulli variables in an image.
        latent_dim: D, the dimension of z.
        encoder_depth, encoder_width: hidden layers and their units; depth 0 is a linear map.
        decoder_depth, decoder_width: likewise.
        activation: a name of ``ACTIVATIONS``.
        initialization: ``he_glorot``, ``mean_image`` or ``torch``, see :func:`mlp`.
        generator: source of the initial weights.
    """

    def __init__(
        self,
        pixels: int,
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
        super().__init__()
        self.latent_dim = latent_dim
        self.activation = activation
        # One last layer carries both heads, mean and logvar: one matrix product instead of two.
        # Glorot's rule sees each head by itself, so their fan_out is D, as two layers would have.
        sizes = [pixels, *[encoder_width] * encoder_depth]
        self.encoder = mlp([*sizes, 2 * latent_dim], activation, generator, initialization)
        if initialization != "torch":
            head = self.encoder[-1].get_parameter("weight")
            with torch.no_grad():
                head.mul_(math.sqrt((sizes[-1] + 2 * latent_dim) / (sizes[-1] + latent_dim)))
        sizes = [latent_dim, *[decoder_width] * decoder_depth]
        self.decoder = mlp([*sizes, pixels], activation, generator, initialization)

    @torch.no_grad()
    def start_at(self, mean_image: Tensor) -> None:
        """Begin near the model without a code: p(x|z) at the mean image, q(z|x) at the prior.

        The decoder's last bias becomes the log odds of ``mean_image`` (pixels,) in (0, 1), which
        Adam's bounded steps take an epoch to find, and the last layers of both networks shrink, so
        that the first steps neither fight random images nor collapse dimensions for their KL.
        """
        decoder_last, encoder_last = self.decoder[-1], self.encoder[-1]
        decoder_last.get_parameter("bias").copy_(torch.logit(mean_image))
        decoder_last.get_parameter("weight").mul_(_SMALL)
        encoder_last.get_parameter("weight").mul_(_SMALL)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), each (B, D), for images (B, pixels) in [0, 1]."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Logits of p(x|z), (B, pixels), for codes (B, D) of any precision.

        The samples of narrow posteriors come in float64.
        """
        logits: Tensor = self.decoder(z.to(next(self.decoder.parameters()).dtype))
        return logits

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, mean and logvar for images (B, pixels) and standard normal noise (B, D)."""
        mean, logvar = self.encode(x)
        z = mean + torch.exp(0.5 * logvar) * noise
        return self.decode(z), mean, logvar
