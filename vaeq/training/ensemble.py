"""Many VAEs of one architecture as one program: stacked weights, batched products, one Adam.

A network of this size is bound by overhead, not by arithmetic: autograd's bookkeeping, a cast of
every weight at every call, one launch an operation. Here the gradient of the ELBO is written out by
hand over E members at once, so that a step is a few dozen operations whatever E is; one run is an
ensemble of one. Members share shape and batch size; seeds, β and learning rates are their own.

Latent dimensions may differ: a member of fewer is padded with weights and noise of 0. The code of a
padded dimension is then 0 and its KL 0, so that every gradient into it is exactly 0 and Adam leaves
it there: padding changes no number of the member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vaeq.models.conv import ConvVAE
from vaeq.models.mlp import VAE
from vaeq.training.kernels import Compiled, operations
from vaeq.training.operations import PIXEL, Linear, Operations, Stretch

# What a product is computed in. Weights, moments, sums and every measure are float32 or better.
PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass
class Moments:
    """Adam's state of one model: steps done, and both moments by parameter name."""

    step: int = 0
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)


class Ensemble:
    """The weights of E VAEs, stacked to be trained as one.

    Args:
        vaes: one or more of equal depths, widths and activation; latent dimensions may differ.
        moments: Adam's state of each; an empty one starts at 0.
        learning_rates: one a member.
        precision: of the matrix products, one of ``PRECISIONS``; tf32 needs a GPU.
        kernels: what takes the steps, ``compiled`` or ``torch``, see ``kernels.resolve_kernels``.
    """

    def __init__(
        self,
        vaes: Sequence[VAE],
        moments: Sequence[Moments],
        learning_rates: Sequence[float],
        precision: str = "fp32",
        kernels: str = "torch",
    ) -> None:
        first = vaes[0]
        self._kernels = operations(kernels, precision)
        self._exact_kernels = operations(kernels)
        self.latent_dims = [vae.latent_dim for vae in vaes]
        self.widest = max(self.latent_dims)
        self.device = next(first.parameters()).device
        self._activation = first.activation
        self._head = f"encoder.{len(first.encoder) - 1}."
        self._shapes = {
            name: self._padded_shape(name, p.shape, first.latent_dim)
            for name, p in first.named_parameters()
        }
        # Biases last: Adam's step of the weights may be part of the product that is their gradient.
        places = sorted(self._shapes, key=lambda name: name.endswith(".bias"))
        ends = [0]
        for name in places:
            ends.append(ends[-1] + self._shapes[name].numel())
        self._spans = dict(zip(places, pairwise(ends), strict=True))
        # Member by member, so that the members of one learning rate are one tensor to Adam.
        self._weights = torch.zeros(len(vaes), ends[-1], device=self.device)
        self._grads = torch.zeros_like(self._weights)
        self._exp_avg = torch.zeros_like(self._weights)
        self._exp_avg_sq = torch.zeros_like(self._weights)
        for i, (vae, own) in enumerate(zip(vaes, moments, strict=True)):
            self._put(self._weights[i], dict(vae.named_parameters()), vae.latent_dim)
            self._put(self._exp_avg[i], own.exp_avg, vae.latent_dim)
            self._put(self._exp_avg_sq[i], own.exp_avg_sq, vae.latent_dim)
        # What the products read; a copy is made once a step, where autocast makes one a call.
        self._low = self._weights.to(self._kernels.dtype)
        self._encoder, self._decoder = (self._layers(self._low, net) for net in _networks(first))
        self._exact = [self._layers(self._weights, net) for net in _networks(first)]
        self.totals = torch.zeros(2, len(vaes), dtype=torch.float64, device=self.device)
        self._log_px_total, self._kl_total = self.totals
        self._stretches = self._in_stretches([own.step for own in moments], learning_rates)
        self._descending: Compiled | None = None
        if isinstance(self._kernels, Compiled) and self._kernels.multiplies(self._low.dtype):
            self._descending = self._kernels
        # What is left to Adam: where weights descend as their gradient is made, the biases.
        biases = min(self._spans[name][0] for name in self._shapes if name.endswith(".bias"))
        rest = slice(biases if self._descending else 0, None)
        self._rest = (
            self._weights[:, rest],
            self._grads[:, rest],
            self._exp_avg[:, rest],
            self._exp_avg_sq[:, rest],
        )

    def __len__(self) -> int:
        return len(self.latent_dims)

    def _padded_shape(self, name: str, shape: torch.Size, latent_dim: int) -> torch.Size:
        if name.startswith(self._head):
            return torch.Size([2 * self.widest, *shape[1:]])
        if name == "decoder.0.weight":
            return torch.Size([shape[0], self.widest])
        return shape

    def _place(self, name: str, latent_dim: int) -> Any:
        """Where the parameter of a member lies in its padded one."""
        if name.startswith(self._head):
            rows = torch.arange(latent_dim, device=self.device)
            return torch.cat([rows, rows + self.widest])  # mean and logvar
        return (slice(None), slice(latent_dim)) if name == "decoder.0.weight" else ...

    def _put(self, row: Tensor, values: dict[str, Tensor], latent_dim: int) -> None:
        for name, value in values.items():
            padded = row[slice(*self._spans[name])].view(self._shapes[name])
            padded[self._place(name, latent_dim)] = value.detach()

    def _get(self, row: Tensor, latent_dim: int) -> dict[str, Tensor]:
        found = {}
        for name, shape in self._shapes.items():
            padded = row[slice(*self._spans[name])].view(shape)
            found[name] = padded[self._place(name, latent_dim)].clone()
        return found

    def _layers(self, weights: Tensor, names: Sequence[str]) -> list[Linear]:
        def view(stack: Tensor, name: str) -> Tensor:
            shape = self._shapes[name]
            rows = stack[:, slice(*self._spans[name])]
            return rows.view(len(self), *((1, *shape) if len(shape) == 1 else shape))

        layers = []
        for name in names:
            weight, bias = f"{name}.weight", f"{name}.bias"
            layers.append(
                Linear(
                    weight=view(weights, weight),
                    bias=view(weights, bias),
                    weight_grad=view(self._grads, weight),
                    bias_grad=view(self._grads, bias),
                    exp_avg=view(self._exp_avg, weight),
                    exp_avg_sq=view(self._exp_avg_sq, weight),
                )
            )
        return layers

    def _in_stretches(self, steps: Sequence[int], learning_rates: Sequence[float]) -> list[Stretch]:
        """Members side by side with equal step and learning rate, for Adam to take as one."""
        stretches = []
        start = 0
        own, graph = isinstance(self._kernels, Compiled), self.device.type == "cuda"
        device = self.device if graph else None
        for end in range(1, len(self) + 1):
            kind = steps[start], learning_rates[start]
            if end < len(self) and (steps[end], learning_rates[end]) == kind:
                continue
            stretches.append(
                Stretch(
                    rows=slice(start, end),
                    steps_done=kind[0] if own else torch.tensor(float(kind[0]), device=device),
                    base_rate=kind[1],
                    # A captured step reads the rate where it lies.
                    rate=torch.tensor(kind[1], device=self.device) if graph else kind[1],
                )
            )
            start = end
        return stretches

    def scale_learning_rates(self, factor: float) -> None:
        """Every member's learning rate, as a multiple of its own."""
        for stretch in self._stretches:
            if isinstance(stretch.rate, Tensor):
                stretch.rate.fill_(stretch.base_rate * factor)
            else:
                stretch.rate = stretch.base_rate * factor

    @torch.no_grad()
    def step(self, x: Tensor, noise: Tensor, kl_weight: Tensor) -> None:
        """One step of Adam on −mean(log p(x|z) − w KL(q(z|x) ‖ p)) of every member.

        Args:
            x: (E, B, pixels) uint8.
            noise: (E, B, widest) standard normal, 0 in padded dimensions.
            kl_weight: (E, 1, 1), w.

        Adds the sums over the batch of log p(x|z) and KL, as before the step, to ``totals``.
        """
        levels = self._kernels.levels(x)
        if self._descending is None:
            self.gradient(levels, noise, kl_weight)
            self._kernels.adam(*self._rest, self._stretches)
        else:
            sizes = self._descending.step_sizes(self._stretches)
            descend = partial(self._descending.descend, sizes)
            self._differentiate(levels, noise, kl_weight, descend)
            self._descending.take(sizes, *self._rest)
        if self._low is not self._weights:
            self._low.copy_(self._weights)

    @torch.no_grad()
    def gradient(self, x: Tensor, noise: Tensor, kl_weight: Tensor) -> None:
        """Writes the gradient of a step's loss; x (E, B, pixels) are levels 0 to 255 in float32."""
        self._differentiate(x, noise, kl_weight, self._kernels.weight_gradient)

    def _differentiate(
        self,
        x: Tensor,
        noise: Tensor,
        kl_weight: Tensor,
        receive: Callable[[Tensor, Tensor, Linear, float], None],
    ) -> None:
        """Writes the gradient of the biases; ``receive`` is given what makes that of the weights.

        It may change them: that is the last use of a layer's weights in a step.

        Factors, 1/255 of a pixel and 1/B of an image, are left to the products, which cost the
        same with one.
        """
        kernels, share = self._kernels, 1 / x.shape[1]
        low = self._low.dtype
        encoded, head = self._forward(kernels, self._encoder, x.to(low), PIXEL)
        head = head.float()
        z, deviation = kernels.code(head, noise, self._kl_total)
        decoded, logits = self._forward(kernels, self._decoder, z.to(low))
        grad = kernels.likelihood(
            logits.float(), x, self._log_px_total, self._decoder[-1].bias_grad, share
        )
        grad_z = self._backward(self._decoder, decoded, grad.to(low), receive, scale=share)
        assert grad_z is not None
        grad = kernels.code_gradient(
            head, grad_z.float(), deviation, kl_weight, share, self._encoder[-1].bias_grad
        )
        self._backward(self._encoder, encoded, grad.to(low), receive, unit=PIXEL, to_input=False)

    def _forward(
        self, kernels: Operations, layers: Sequence[Linear], h: Tensor, unit: float = 1
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Input of every layer, before and after the activation, and the last output.

        Args:
            h: the first input, in this unit.
        """
        seen = [(h, h)]
        for layer in layers[:-1]:
            seen.append(kernels.hidden(self._activation, seen[-1][1], layer, unit))
            unit = 1
        return seen, kernels.linear(seen[-1][1], layers[-1], unit)

    def _backward(
        self,
        layers: Sequence[Linear],
        seen: Sequence[tuple[Tensor, Tensor]],
        grad: Tensor,
        receive: Callable[[Tensor, Tensor, Linear, float], None],
        *,
        scale: float = 1,
        unit: float = 1,
        to_input: bool = True,
    ) -> Tensor | None:
        """Has every layer's gradient taken in, but for that of the last one's biases.

        Args:
            grad: of the last output, to be taken ``scale`` times.
            unit: of the first input.

        Returns:
            The gradient of the input, if it is wanted.
        """
        for i in reversed(range(1, len(layers))):
            layer, bias_grad = layers[i], layers[i - 1].bias_grad
            below = self._kernels.hidden_gradient(
                self._activation, grad, layer, scale, seen[i], bias_grad
            )
            receive(grad, seen[i][1], layer, scale)
            grad, scale = below, 1
        to = self._kernels.input_gradient(grad, layers[0], scale) if to_input else None
        receive(grad, seen[0][1], layers[0], scale * unit)
        return to

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar, (E, B, widest) float32, of images (E or 1, B, pixels) in [0, 1]."""
        x = x.expand(len(self), -1, -1)
        head = self._forward(self._exact_kernels, self._exact[0], x)[1]
        mean, logvar = head.chunk(2, dim=2)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Logits (E, B, pixels) in float32 of codes (E, B, widest), differentiable by torch."""
        return self._forward(self._exact_kernels, self._exact[1], z)[1]

    def changing(self) -> list[Tensor]:
        """Everything a step writes to that outlasts it."""
        steps = [s.steps_done for s in self._stretches if isinstance(s.steps_done, Tensor)]
        own = [self._weights, self._low, self._exp_avg, self._exp_avg_sq, self.totals]
        return [*own, *steps]

    def member(self, i: int) -> tuple[dict[str, Tensor], Moments]:
        """Copies of the weights of member i, by parameter name, and of Adam's state."""
        latent_dim = self.latent_dims[i]
        (stretch,) = (s for s in self._stretches if s.rows.start <= i < s.rows.stop)
        moments = Moments(
            int(stretch.steps_done),
            self._get(self._exp_avg[i], latent_dim),
            self._get(self._exp_avg_sq[i], latent_dim),
        )
        return self._get(self._weights[i], latent_dim), moments


def _networks(vae: VAE) -> tuple[list[str], list[str]]:
    """Names of the linear layers of encoder and decoder."""
    encoder, decoder = (
        [f"{part}.{i}" for i, layer in enumerate(net) if isinstance(layer, torch.nn.Linear)]
        for part, net in (("encoder", vae.encoder), ("decoder", vae.decoder))
    )
    return encoder, decoder


@torch.no_grad()
def encode_all(
    vaes: Sequence[VAE], images: Tensor, batch_size: int = 4096
) -> list[tuple[Tensor, Tensor]]:
    """Mean and log variance of q(z|x) of every model, for all images (N, pixels) uint8.

    Args:
        vaes: of one shape but for the latent dimension.

    Returns:
        Two (N, D) float32 a model.
    """
    if isinstance(vaes[0], ConvVAE):
        return [_encode(vae, images, batch_size) for vae in vaes]
    ensemble = Ensemble(vaes, [Moments() for _ in vaes], [0.0] * len(vaes))
    codes = [torch.empty(2, len(images), d, device=images.device) for d in ensemble.latent_dims]
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        mean, logvar = ensemble.encode(images[part].float().div_(255)[None])
        for e, own in enumerate(codes):
            own[0, part], own[1, part] = (v[e, :, : own.shape[2]] for v in (mean, logvar))
    return [(own[0], own[1]) for own in codes]


def _encode(vae: VAE, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and log variance of q(z|x), (N, D) float32 each, of one model by itself."""
    parts = [vae.encode(part.float().div_(255)) for part in images.split(batch_size)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([logvar for _, logvar in parts])


class CapturedSteps:
    """``Ensemble.step`` as a CUDA graph: one launch a step instead of some sixty.

    The graph of a batch size is captured when first met, after a few ordinary steps on a side
    stream whose effect on weights and moments is undone.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def __call__(self, *inputs: Tensor) -> None:
        batch = inputs[0].shape[1]
        if batch not in self._graphs:
            self._graphs[batch] = self._capture([value.clone() for value in inputs])
        graph, static = self._graphs[batch]
        for place, value in zip(static, inputs, strict=True):
            place.copy_(value)
        graph.replay()

    def _capture(self, static: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        kept = [(place, place.clone()) for place in self._ensemble.changing()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._ensemble.step(*static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._ensemble.step(*static)
        for place, value in kept:
            place.copy_(value)
        return graph, static
