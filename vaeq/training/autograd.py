"""One VAE of any layers as a program of its own: the gradient by autograd, the rest as an ensemble.

:class:`vaeq.training.ensemble.Ensemble` writes out the gradient of linear layers for many members;
this is what :mod:`vaeq.training.loop` takes in its place for networks of other layers, one at a
time. Its methods, their shapes and what they promise are the same: first axes of length 1 stand for
the one member.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from vaeq.models.elbo import gaussian_kl, reconstruction
from vaeq.models.mlp import VAE
from vaeq.training.ensemble import Moments


class Autograd:
    """The weights of one VAE in training, apart from the model they came from.

    Args:
        vaes: one.
        moments: Adam's state of it; an empty one starts at 0.
        learning_rates: its own.
        precision: of the products and convolutions, one of ``vaeq.training.ensemble.PRECISIONS``.
    """

    def __init__(
        self,
        vaes: Sequence[VAE],
        moments: Sequence[Moments],
        learning_rates: Sequence[float],
        precision: str = "fp32",
    ) -> None:
        (vae,), (own,), (self._base_rate,) = vaes, moments, learning_rates
        self._vae = copy.deepcopy(vae)
        self._rate = self._base_rate
        self._names, parameters = zip(*self._vae.named_parameters(), strict=True)
        self._parameters = list(parameters)
        self.device = self._parameters[0].device
        self.latent_dims = [vae.latent_dim]
        self.widest = vae.latent_dim
        self._exp_avg, self._exp_avg_sq = (
            [part[name].clone() if part else torch.zeros_like(p) for name, p in self._named()]
            for part in (own.exp_avg, own.exp_avg_sq)
        )
        self._steps_done = [
            torch.tensor(float(own.step), device=self.device) for _ in self._parameters
        ]
        self._low = precision == "bf16"
        self.totals = torch.zeros(2, 1, dtype=torch.float64, device=self.device)

    def __len__(self) -> int:
        return 1

    def _named(self) -> list[tuple[str, Tensor]]:
        return list(zip(self._names, self._parameters, strict=True))

    def scale_learning_rates(self, factor: float) -> None:
        """The learning rate, as a multiple of the member's own."""
        self._rate = self._base_rate * factor

    def step(self, x: Tensor, noise: Tensor, kl_weight: Tensor) -> None:
        """One step of Adam on −mean(log p(x|z) − w KL(q(z|x) ‖ p)).

        Args:
            x: (1, B, pixels) uint8.
            noise: (1, B, D) standard normal.
            kl_weight: (1, 1, 1), w.

        Adds the sums over the batch of log p(x|z) and KL, as before the step, to ``totals``.
        """
        with torch.enable_grad():
            unit = x[0].float().div_(255)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._low):
                mean, logvar = (part.float() for part in self._vae.encode(unit))
                z = mean + torch.exp(0.5 * logvar) * noise[0]
                logits = self._vae.decode(z).float()
            log_px, kl = reconstruction(logits, unit), gaussian_kl(mean, logvar)
            loss = (kl_weight[0, 0, 0] * kl - log_px).mean()
            grads = torch.autograd.grad(loss, self._parameters)
        self.totals[:, 0] += torch.stack([log_px.detach().sum(), kl.detach().sum()])
        with torch.no_grad():
            # Torch's functional form: its Optimizer class imports the compiler, 0.8 s.
            adam(
                self._parameters,
                list(grads),
                self._exp_avg,
                self._exp_avg_sq,
                [],
                self._steps_done,
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=self._rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar, (1, B, D) float32, of images (1, B, pixels) in [0, 1]."""
        mean, logvar = self._vae.encode(x[0])
        return mean[None], logvar[None]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Logits (1, B, pixels) in float32 of codes (1, B, D)."""
        return self._vae.decode(z[0])[None]

    def member(self, i: int) -> tuple[dict[str, Tensor], Moments]:
        """Copies of the weights, by parameter name, and of Adam's state; i is 0."""
        del i
        copies = [
            {name: value.detach().clone() for name, value in zip(self._names, part, strict=True)}
            for part in (self._parameters, self._exp_avg, self._exp_avg_sq)
        ]
        return copies[0], Moments(int(self._steps_done[0]), copies[1], copies[2])
