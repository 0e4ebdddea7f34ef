"""What a training step does beside its matrix products: likelihood, code, their gradients, Adam.

Twice: as operations of torch, for every device and activation, and as loops in C (elementwise.c),
each of one pass over memory, for a CPU whose machine has a compiler. They agree to the rounding of
float32. Of a network of some hundred units torch spends on these parts a third of a step, a dozen
operations each.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.adam import adam

from vaeq.errors import InputError
from vaeq.models.elbo import gaussian_kl
from vaeq.training.compiler import compiled

# A grey level of 255 is a pixel of 1.
PIXEL = 1 / 255
_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8
_SOURCE = Path(__file__).with_suffix(".c")
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


def resolve_kernels(name: str, device: torch.device) -> str:
    """``compiled`` or ``torch``, from a config's ``kernels``.

    Raises:
        InputError: compiled ones were asked for on a GPU, or where nothing compiles them.
    """
    if name == "torch":
        return name
    if device.type == "cpu" and compiled(_SOURCE) is not None:
        return "compiled"
    if name == "auto":
        return "torch"
    why = "no C compiler works here" if device.type == "cpu" else "they are for a CPU"
    raise InputError(f"kernels={name} cannot be had: {why}; use kernels=auto or kernels=torch.")


def elementwise(kernels: str) -> Operations:
    """The implementation that :func:`resolve_kernels` named."""
    if kernels == "torch":
        return Operations()
    functions = compiled(_SOURCE)
    assert functions is not None
    return Loops(functions)


class Operations:
    """E members side by side, B images, D latent dimensions; by operations of torch.

    All is float32 but for the gradient of a hidden layer, which is in the type of the products, and
    the two sums, (E,) float64, which are added to. Gradients of biases are overwritten.
    """

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
        pull: Tensor,
        bias_grad: Tensor,
    ) -> Tensor:
        """The gradient of μ and log σ², (E, B, 2D).

        With g that of z, it is g + w μ and ½(g σε + w (σ² − 1)): ∂z/∂μ = 1 and ∂z/∂log σ² = ½σε;
        ∂KL/∂μ = μ and ∂KL/∂log σ² = ½(σ² − 1).

        Args:
            head: μ and log σ², (E, B, 2D); overwritten.
            grad_z: g, (E, B, D); overwritten.
            deviation: σε, as :meth:`code` returned it.
            pull: w, (E, 1, 1), the weight of the KL of one image.
            bias_grad: (E, 1, 2D), the gradient's sum over the images.
        """
        mean, logvar = head.chunk(2, dim=2)
        grad_mean = torch.addcmul(grad_z, mean, pull)
        grad_logvar = grad_z.mul_(deviation).addcmul_(torch.expm1(logvar), pull).mul_(0.5)
        grad = torch.cat([grad_mean, grad_logvar], 2)
        _sum_over_images(grad, bias_grad)
        return grad

    def activation_gradient(
        self, kind: str, grad: Tensor, before: Tensor, after: Tensor, bias_grad: Tensor
    ) -> Tensor:
        """f'(a) g of a hidden layer, (E, B, units).

        Args:
            kind: f, one of ``mlp.ACTIVATIONS``.
            grad: g; overwritten, perhaps.
            before, after: a and f(a).
            bias_grad: (E, 1, units), the result's sum over the images.
        """
        grad = _DERIVATIVES[kind](grad, before, after)
        _sum_over_images(grad, bias_grad)
        return grad

    def adam(
        self,
        weights: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        steps_done: Tensor,
        rate: float | Tensor,
    ) -> None:
        """A step of Adam (Kingma and Ba 2015, algorithm 1), in place.

        Torch's functional form: its Optimizer class imports the compiler, 0.8 s, and keeps books.

        Args:
            weights, grads, exp_avg, exp_avg_sq: of one shape.
            steps_done: float32, no dimensions; one more afterwards.
            rate: the learning rate; a tensor where a captured step reads it.
        """
        adam(
            [weights],
            [grads],
            [exp_avg],
            [exp_avg_sq],
            [],
            [steps_done],
            fused=True,
            capturable=isinstance(rate, Tensor),
            amsgrad=False,
            beta1=_BETA1,
            beta2=_BETA2,
            lr=rate,
            weight_decay=0.0,
            eps=_EPS,
            maximize=False,
        )


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


class Loops(Operations):
    """By the loops of elementwise.c; what it has none for, by torch.

    Args:
        functions: that file, compiled.
    """

    def __init__(self, functions: ctypes.CDLL) -> None:
        array, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        shape, threads = [size] * 3, ctypes.c_int
        arguments = {
            "bernoulli": [*shape, *[array] * 2, number, *[array] * 3, size, number, threads],
            "latent": [*shape, *[array] * 5, threads],
            "latent_gradient": [*shape, *[array] * 5, size, threads],
            "rectified": [*shape, *[array] * 3, size, threads],
            "adam": [size, *[array] * 4, *[number] * 5, threads],
        }
        for name, types in arguments.items():
            function = getattr(functions, name)
            function.argtypes, function.restype = types, None
        self._functions = functions
        self._rows = ctypes.c_int64.in_dll(functions, "rows").value

    def likelihood(
        self, logits: Tensor, x: Tensor, log_px_sum: Tensor, bias_grad: Tensor, share: float
    ) -> Tensor:
        logits, x = logits.contiguous(), x.contiguous()
        # Sums for every block of images: their order does not hang on the threads.
        members, batch, pixels = logits.shape
        blocks = -(-batch // self._rows)
        sums = torch.empty(members, blocks, dtype=torch.float64)
        columns = torch.empty(members, blocks, pixels)
        self._functions.bernoulli(
            members,
            batch,
            pixels,
            logits.data_ptr(),
            x.data_ptr(),
            PIXEL,
            sums.data_ptr(),
            columns.data_ptr(),
            bias_grad.data_ptr(),
            bias_grad.stride(0),
            share,
            torch.get_num_threads(),
        )
        log_px_sum += sums.sum(1)
        return logits

    def code(self, head: Tensor, noise: Tensor, kl_sum: Tensor) -> tuple[Tensor, Tensor]:
        head, noise = head.contiguous(), noise.contiguous()
        z, deviation = torch.empty_like(noise), torch.empty_like(noise)
        self._functions.latent(
            *noise.shape,
            head.data_ptr(),
            noise.data_ptr(),
            z.data_ptr(),
            deviation.data_ptr(),
            kl_sum.data_ptr(),
            torch.get_num_threads(),
        )
        return z, deviation

    def code_gradient(
        self,
        head: Tensor,
        grad_z: Tensor,
        deviation: Tensor,
        pull: Tensor,
        bias_grad: Tensor,
    ) -> Tensor:
        head, grad_z, pull = head.contiguous(), grad_z.contiguous(), pull.contiguous()
        self._functions.latent_gradient(
            *grad_z.shape,
            head.data_ptr(),
            grad_z.data_ptr(),
            deviation.data_ptr(),
            pull.data_ptr(),
            bias_grad.data_ptr(),
            bias_grad.stride(0),
            torch.get_num_threads(),
        )
        return head

    def activation_gradient(
        self, kind: str, grad: Tensor, before: Tensor, after: Tensor, bias_grad: Tensor
    ) -> Tensor:
        if kind != "relu" or grad.dtype != torch.float32:
            return super().activation_gradient(kind, grad, before, after, bias_grad)
        grad, after = grad.contiguous(), after.contiguous()
        self._functions.rectified(
            *grad.shape,
            grad.data_ptr(),
            after.data_ptr(),
            bias_grad.data_ptr(),
            bias_grad.stride(0),
            torch.get_num_threads(),
        )
        return grad

    def adam(
        self,
        weights: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        steps_done: Tensor,
        rate: float | Tensor,
    ) -> None:
        steps_done += 1
        steps = float(steps_done)
        self._functions.adam(
            weights.numel(),
            *(part.data_ptr() for part in (weights, grads, exp_avg, exp_avg_sq)),
            1 - _BETA1,  # in float32 0.999 is not as near to it as 0.001 is
            1 - _BETA2,
            float(rate) / (1 - _BETA1**steps),
            (1 - _BETA2**steps) ** -0.5,
            _EPS,
            torch.get_num_threads(),
        )
