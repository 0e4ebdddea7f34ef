"""What a training step is made of, by torch: layers, code, likelihood, their gradients, Adam.

For every device, activation and precision. :mod:`vaeq.training.kernels` has the same in C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from vaeq.models.elbo import gaussian_kl
from vaeq.models.mlp import ACTIVATIONS

# A grey level of 255 is a pixel of 1.
PIXEL = 1 / 255
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
_FUNCTIONS = {kind: module() for kind, module in ACTIVATIONS.items()}
_aten = torch.ops.aten
# f'(a) g from the gradient g, the input a and the output h = f(a): what autograd calls as well.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "relu": lambda g, a, h: _aten.threshold_backward(g, h, 0),
    "leaky_relu": lambda g, a, h: _aten.leaky_relu_backward(g, a, 0.01, False),
    "elu": lambda g, a, h: _aten.elu_backward(g, 1.0, 1.0, 1.0, True, h),
    "gelu": lambda g, a, h: _aten.gelu_backward(g, a),
    "silu": lambda g, a, h: _aten.silu_backward(g, a),
    "softplus": lambda g, a, h: _aten.softplus_backward(g, a, 1.0, 20.0),
    "tanh": lambda g, a, h: _aten.tanh_backward(g, h),
}


@dataclass(frozen=True)
class Linear:
    """One stacked layer, h (E, B, in) → (E, B, out), and what belongs to it in training.

    Views of stacks in which the members of each lie equally far apart.
    """

    weight: Tensor  # (E, out, in)
    bias: Tensor  # (E, 1, out)
    weight_grad: Tensor  # (E, out, in) float32
    bias_grad: Tensor  # (E, 1, out) float32
    exp_avg: Tensor  # (E, out, in) float32, Adam's moments of the weight
    exp_avg_sq: Tensor


@dataclass
class Stretch:
    """Members side by side that have taken as many steps of Adam, at one learning rate."""

    rows: slice
    steps_done: int | Tensor  # float32 without dimensions, where torch counts them
    base_rate: float
    rate: float | Tensor  # now; a tensor where a captured step reads it


class Operations:
    """E members side by side, B images, D latent dimensions; by operations of torch.

    Weights, activations and their gradients are of ``dtype``; all else is float32, but for the two
    sums, (E,) float64, which are added to. Gradients of biases are overwritten.

    Args:
        precision: of the products, one of ``ensemble.PRECISIONS``.
    """

    def __init__(self, precision: str = "fp32") -> None:
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def levels(self, images: Tensor) -> Tensor:
        """Grey levels (E, B, pixels), uint8, as float32."""
        return images.float()

    def linear(self, h: Tensor, layer: Linear, unit: float = 1) -> Tensor:
        """h Wᵀ + b, (E, B, out), of h (E, B, in) in this unit."""
        return torch.baddbmm(layer.bias, h, layer.weight.mT, alpha=unit)

    def hidden(self, kind: str, h: Tensor, layer: Linear, unit: float = 1) -> tuple[Tensor, Tensor]:
        """a = h Wᵀ + b and f(a), (E, B, out) each; of a rectifier both are f(a).

        Its derivative is told by the output: its input need not be kept.

        Args:
            kind: f, one of ``mlp.ACTIVATIONS``.
        """
        before = self.linear(h, layer, unit)
        if kind == "relu":
            return before, before.relu_()
        return before, _FUNCTIONS[kind](before)

    def input_gradient(self, grad: Tensor, layer: Linear, scale: float = 1) -> Tensor:
        """``scale`` g W, (E, B, in), of the gradient g (E, B, out) of a layer's output."""
        return _product(grad, layer.weight, scale)

    def hidden_gradient(
        self,
        kind: str,
        grad: Tensor,
        layer: Linear,
        scale: float,
        below: tuple[Tensor, Tensor],
        bias_grad: Tensor,
    ) -> Tensor:
        """f'(a) ⊙ ``scale`` g W, (E, B, in): the gradient of what :meth:`hidden` gave this layer.

        Args:
            kind: f.
            grad: g, the gradient (E, B, out) of this layer's output.
            below: a and f(a), as the layer below returned them.
            bias_grad: (E, 1, in), the result's sum over the images.
        """
        grad = _DERIVATIVES[kind](self.input_gradient(grad, layer, scale), *below)
        _sum_over_images(grad, bias_grad)
        return grad

    def weight_gradient(self, grad: Tensor, h: Tensor, layer: Linear, factor: float = 1) -> None:
        """Writes ``factor`` gᵀ h, (E, out, in) float32, of a layer's output and input."""
        if grad.dtype == torch.float32:
            layer.weight_grad.baddbmm_(grad.mT, h, beta=0, alpha=factor)
        else:
            layer.weight_grad.copy_(_product(grad.mT, h, factor))

    def likelihood(
        self, logits: Tensor, x: Tensor, log_px_sum: Tensor, bias_grad: Tensor, share: float
    ) -> Tensor:
        """∂(−log p(x|z))/∂ℓ = sigmoid(ℓ) − x, (E, B, pixels).

        Args:
            logits: ℓ, (E, B, pixels); overwritten.
            x: (E, B, pixels), grey levels from 0 to 255.
            log_px_sum: of log p(x|z) = Σ x ℓ − log(1 + exp ℓ) over the images.
            bias_grad: (E, 1, pixels), ``share`` times the gradient's sum over the images.
        """
        probability = torch.sigmoid(logits)
        log_px_sum += _log_likelihood(logits, probability, x)
        grad = probability.sub_(x, alpha=PIXEL)
        _sum_over_images(grad, bias_grad).mul_(share)
        return grad

    def code(self, head: Tensor, noise: Tensor, kl_sum: Tensor) -> tuple[Tensor, Tensor]:
        """z = μ + σε and σε, (E, B, D) each.

        Args:
            head: μ and log σ², (E, B, 2D).
            noise: ε, (E, B, D).
            kl_sum: of KL(q(z|x) ‖ p) over the images.
        """
        mean, logvar = head.chunk(2, dim=2)
        deviation = torch.exp(0.5 * logvar).mul_(noise)
        kl_sum += gaussian_kl(mean, logvar).sum(1)
        return mean + deviation, deviation

    def code_gradient(
        self,
        head: Tensor,
        grad_z: Tensor,
        deviation: Tensor,
        kl_weight: Tensor,
        share: float,
        bias_grad: Tensor,
    ) -> Tensor:
        """The gradient of μ and log σ², (E, B, 2D).

        With g that of z, it is g + sw μ and ½(g σε + sw (σ² − 1)): ∂z/∂μ = 1 and ∂z/∂log σ² = ½σε;
        ∂KL/∂μ = μ and ∂KL/∂log σ² = ½(σ² − 1).

        Args:
            head: μ and log σ², (E, B, 2D); overwritten.
            grad_z: g, (E, B, D); overwritten.
            deviation: σε, as :meth:`code` returned it.
            kl_weight: w, (E, 1, 1).
            share: s, that of one image in the loss.
            bias_grad: (E, 1, 2D), the gradient's sum over the images.
        """
        mean, logvar = head.chunk(2, dim=2)
        pull = kl_weight * share
        grad_mean = torch.addcmul(grad_z, mean, pull)
        grad_logvar = grad_z.mul_(deviation).addcmul_(torch.expm1(logvar), pull).mul_(0.5)
        grad = torch.cat([grad_mean, grad_logvar], 2)
        _sum_over_images(grad, bias_grad)
        return grad

    def adam(
        self,
        weights: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        stretches: Sequence[Stretch],
    ) -> None:
        """A step of Adam (Kingma and Ba 2015, algorithm 1), in place, and counted.

        Torch's functional form: its Optimizer class imports the compiler, 0.8 s, and keeps books.

        Args:
            weights, grads, exp_avg, exp_avg_sq: (E, n) each.
            stretches: of all members, in order.
        """
        for stretch in stretches:
            assert isinstance(stretch.steps_done, Tensor)
            adam(
                [weights[stretch.rows]],
                [grads[stretch.rows]],
                [exp_avg[stretch.rows]],
                [exp_avg_sq[stretch.rows]],
                [],
                [stretch.steps_done],
                fused=True,
                capturable=isinstance(stretch.rate, Tensor),
                amsgrad=False,
                beta1=BETA1,
                beta2=BETA2,
                lr=stretch.rate,
                weight_decay=0.0,
                eps=EPS,
                maximize=False,
            )


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale`` times a @ b, (E, n, k) and (E, k, m)."""
    if scale == 1:
        return torch.bmm(a, b)
    return torch.baddbmm(b[:, :1], a, b, beta=0, alpha=scale)  # of what is added only the shape


def _sum_over_images(grad: Tensor, out: Tensor) -> Tensor:
    return torch.sum(grad, 1, keepdim=True, dtype=torch.float32, out=out)


def _log_likelihood(logits: Tensor, probability: Tensor, x: Tensor) -> Tensor:
    """Sum over a batch of log p(x|z), (E,) nats, as ``elbo.reconstruction`` has it image by image.

    With ℓ the logits and π = sigmoid(ℓ), which the gradient needs as well, log p(x|z) is
    Σ x ℓ − max(ℓ, 0) + log max(π, 1 − π): half the passes over memory, and no second sigmoid.

    Args:
        logits, probability: (E, B, pixels); the logits are overwritten.
        x: (E, B, pixels), grey levels from 0 to 255.
    """
    cross = torch.bmm(x.flatten(1)[:, None], logits.flatten(1)[:, :, None]).flatten()
    likely = torch.maximum(probability, 1 - probability).log2_().sum((1, 2))
    rectified = logits.clamp_min_(0).sum((1, 2))
    return cross.mul_(PIXEL).sub_(rectified).add_(likely, alpha=math.log(2))
