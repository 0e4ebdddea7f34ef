"""The operations of a training step in C, for a CPU whose machine has a compiler.

They agree with torch's to the rounding of float32; products of bf16 round what they read as torch's
do, but nothing that they give. Of a network of some hundred units torch spends half a step beside
the arithmetic of its products: a dozen operations for a likelihood, each a pass over memory, and
gradients that are written for Adam to read.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vaeq.errors import InputError
from vaeq.training.compiler import compiled
from vaeq.training.operations import BETA1, BETA2, EPS, PIXEL, Linear, Operations, Stretch

# In float32 0.999 is not as near to it as 0.001 is.
_SHARE1, _SHARE2 = 1 - BETA1, 1 - BETA2
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("elementwise.c", "linear.c"))


def resolve_kernels(name: str, device: torch.device) -> str:
    """``compiled`` or ``torch``, from a config's ``kernels``.

    Raises:
        InputError: compiled ones were asked for on a GPU, or where nothing compiles them.
    """
    if name == "torch":
        return name
    if device.type == "cpu" and compiled(*_SOURCES) is not None:
        return "compiled"
    if name == "auto":
        return "torch"
    why = "no C compiler works here" if device.type == "cpu" else "they are for a CPU"
    raise InputError(f"kernels={name} cannot be had: {why}; use kernels=auto or kernels=torch.")


def operations(kernels: str, precision: str = "fp32") -> Operations:
    """The implementation that :func:`resolve_kernels` named, with products in this precision."""
    if kernels == "torch":
        return Operations(precision)
    functions = compiled(*_SOURCES)
    assert functions is not None
    return Compiled(functions, precision)


@dataclass(frozen=True)
class StepSizes:
    """Of step t of Adam, of every member: the learning rate over 1 − β₁ᵗ, and (1 − β₂ᵗ)^−½."""

    rates: array[float]
    corrections: array[float]


class Compiled(Operations):
    """By linear.c and elementwise.c; what they have nothing for, by torch.

    Args:
        functions: those files, compiled.
        precision: as of :class:`Operations`; products of bf16 that are made here round what they
            read, so that it stays float32.
    """

    def __init__(self, functions: ctypes.CDLL, precision: str = "fp32") -> None:
        super().__init__(precision)
        address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        layer, integer = [size] * 4, ctypes.c_int
        room = [address, size, integer]
        descent = [*[address] * 5, *[number] * 3]
        arguments = {
            "linear": [
                *layer, address, size, *[address] * 2, size, number, *[integer, address, integer],
                *room,
            ],
            "input_gradient": [
                *layer, *[address] * 2, size, number, *[address] * 2, size, address, integer, *room
            ],
            "weight_gradient": [
                *layer, *[address] * 2, size, number, address, *descent, integer, *room
            ],
            "adam": [*[size] * 3, address, *descent, integer],
            "bernoulli": [
                *[size] * 3, *[address] * 2, number, *[address] * 2, size, number, address, integer
            ],
            "latent": [*[size] * 3, *[address] * 5, integer],
            "latent_gradient": [*[size] * 3, *[address] * 4, number, address, size, integer],
            "levels": [size, *[address] * 2, integer],
        }  # fmt: skip
        self._panel = ctypes.c_int64.in_dll(functions, "panel_width").value
        self._bf16 = precision == "bf16"
        if self._bf16 and ctypes.c_int64.in_dll(functions, "multiplies_bf16").value:
            self.dtype = torch.float32
        self._rows = ctypes.c_int64.in_dll(functions, "rows").value
        self._functions = functions
        self._scratch_size = 0
        for name, types in arguments.items():
            if self._panel or name not in ("linear", "input_gradient", "weight_gradient"):
                function = getattr(functions, name)
                function.argtypes, function.restype = types, None

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether products of what has this type are made here, by a processor's vectors."""
        return self._panel > 0 and dtype == torch.float32

    def _room(self, numbers: int) -> tuple[int, int, int]:
        """To work in: where it is, how many numbers a thread has, and how many threads."""
        threads = torch.get_num_threads()
        room = -(-numbers // 16) * 16
        if self._scratch_size < threads * room:
            self._scratch_size = threads * room
            self._scratch = torch.empty(self._scratch_size)
            self._scratch_address = self._scratch.data_ptr()
        return self._scratch_address, room, threads

    def _panel_and_rows(self, batch: int, depth: int) -> int:
        """Numbers in a panel; of bf16 words in two panels and in the rows of a batch."""
        return (depth + 1) * (batch + self._panel) if self._bf16 else depth * self._panel

    def levels(self, images: Tensor) -> Tensor:
        images = images.contiguous()
        found = torch.empty(images.shape)
        threads = torch.get_num_threads()
        self._functions.levels(images.numel(), images.data_ptr(), found.data_ptr(), threads)
        return found

    def linear(self, h: Tensor, layer: Linear, unit: float = 1) -> Tensor:
        if not self.multiplies(h.dtype):
            return super().linear(h, layer, unit)
        return self._linear(h, layer, unit, rectify=False)

    def hidden(self, kind: str, h: Tensor, layer: Linear, unit: float = 1) -> tuple[Tensor, Tensor]:
        if kind != "relu" or not self.multiplies(h.dtype):
            return super().hidden(kind, h, layer, unit)
        after = self._linear(h, layer, unit, rectify=True)
        return after, after

    def _linear(self, h: Tensor, layer: Linear, unit: float, *, rectify: bool) -> Tensor:
        members, batch, fan_in = h.shape
        fan_out = layer.bias.shape[2]
        if h.stride()[1:] != (fan_in, 1):
            h = h.contiguous()
        result = torch.empty(members, batch, fan_out)
        room = self._room(self._panel_and_rows(batch, fan_in))
        self._functions.linear(
            members,
            batch,
            fan_in,
            fan_out,
            h.data_ptr(),
            h.stride(0),
            layer.weight.data_ptr(),
            layer.bias.data_ptr(),
            layer.weight.stride(0),
            unit,
            rectify,
            result.data_ptr(),
            self._bf16,
            *room,
        )
        return result

    def input_gradient(self, grad: Tensor, layer: Linear, scale: float = 1) -> Tensor:
        if not self.multiplies(grad.dtype):
            return super().input_gradient(grad, layer, scale)
        return self._input_gradient(grad, layer, scale)

    def hidden_gradient(
        self,
        kind: str,
        grad: Tensor,
        layer: Linear,
        scale: float,
        below: tuple[Tensor, Tensor],
        bias_grad: Tensor,
    ) -> Tensor:
        if kind != "relu" or not self.multiplies(grad.dtype):
            return super().hidden_gradient(kind, grad, layer, scale, below, bias_grad)
        return self._input_gradient(grad, layer, scale, below[1].contiguous(), bias_grad)

    def _input_gradient(
        self,
        grad: Tensor,
        layer: Linear,
        scale: float,
        after: Tensor | None = None,
        bias_grad: Tensor | None = None,
    ) -> Tensor:
        grad = grad.contiguous()
        members, batch, fan_out = grad.shape
        fan_in = layer.weight.shape[2]
        result = torch.empty(members, batch, fan_in)
        room = self._room(self._panel_and_rows(batch, fan_out))
        self._functions.input_gradient(
            members,
            batch,
            fan_out,
            fan_in,
            grad.data_ptr(),
            layer.weight.data_ptr(),
            layer.weight.stride(0),
            scale,
            None if after is None else after.data_ptr(),
            None if bias_grad is None else bias_grad.data_ptr(),
            0 if bias_grad is None else bias_grad.stride(0),
            result.data_ptr(),
            self._bf16,
            *room,
        )
        return result

    def weight_gradient(self, grad: Tensor, h: Tensor, layer: Linear, factor: float = 1) -> None:
        if not self.multiplies(grad.dtype):
            return super().weight_gradient(grad, h, layer, factor)
        return self._weight_gradient(grad, h, layer, factor, None)

    def descend(
        self, sizes: StepSizes, grad: Tensor, h: Tensor, layer: Linear, factor: float = 1
    ) -> None:
        """Adam's step of a layer's weights, which are float32, by :meth:`weight_gradient`.

        The gradient is not written: of a network of some hundred units it is the memory that Adam
        waits for.
        """
        self._weight_gradient(grad, h, layer, factor, sizes)

    def _weight_gradient(
        self, grad: Tensor, h: Tensor, layer: Linear, factor: float, sizes: StepSizes | None
    ) -> None:
        grad, h = grad.contiguous(), h.contiguous()
        members, batch, fan_out = grad.shape
        fan_in = h.shape[2]
        room = self._room((batch + 1) * (fan_in + self._panel))
        self._functions.weight_gradient(
            members,
            batch,
            fan_out,
            fan_in,
            grad.data_ptr(),
            h.data_ptr(),
            layer.weight.stride(0),
            factor,
            layer.weight_grad.data_ptr() if sizes is None else None,
            layer.weight.data_ptr(),
            layer.exp_avg.data_ptr(),
            layer.exp_avg_sq.data_ptr(),
            None if sizes is None else sizes.rates.buffer_info()[0],
            None if sizes is None else sizes.corrections.buffer_info()[0],
            _SHARE1,
            _SHARE2,
            EPS,
            self._bf16,
            *room,
        )

    def step_sizes(self, stretches: Sequence[Stretch]) -> StepSizes:
        """Those of the next step, which is counted."""
        rates: list[float] = []
        corrections: list[float] = []
        for stretch in stretches:
            members = stretch.rows.stop - stretch.rows.start
            stretch.steps_done += 1
            steps = int(stretch.steps_done)
            rates += [float(stretch.rate) / (1 - BETA1**steps)] * members
            corrections += [(1 - BETA2**steps) ** -0.5] * members
        return StepSizes(array("f", rates), array("f", corrections))

    def adam(
        self,
        weights: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        stretches: Sequence[Stretch],
    ) -> None:
        self.take(self.step_sizes(stretches), weights, grads, exp_avg, exp_avg_sq)

    def take(
        self,
        sizes: StepSizes,
        weights: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
    ) -> None:
        """Adam's step of these sizes, as :meth:`adam` otherwise."""
        self._functions.adam(
            *weights.shape,
            weights.stride(0),
            grads.data_ptr(),
            weights.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            sizes.rates.buffer_info()[0],
            sizes.corrections.buffer_info()[0],
            _SHARE1,
            _SHARE2,
            EPS,
            torch.get_num_threads(),
        )

    def likelihood(
        self, logits: Tensor, x: Tensor, log_px_sum: Tensor, bias_grad: Tensor, share: float
    ) -> Tensor:
        logits, x = logits.contiguous(), x.contiguous()
        members, batch, pixels = logits.shape
        blocks = members * -(-batch // self._rows)
        room, *_, threads = self._room(blocks * (pixels + 2))
        self._functions.bernoulli(
            members,
            batch,
            pixels,
            logits.data_ptr(),
            x.data_ptr(),
            PIXEL,
            log_px_sum.data_ptr(),
            bias_grad.data_ptr(),
            bias_grad.stride(0),
            share,
            room,
            threads,
        )
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
        kl_weight: Tensor,
        share: float,
        bias_grad: Tensor,
    ) -> Tensor:
        head, grad_z, kl_weight = (part.contiguous() for part in (head, grad_z, kl_weight))
        self._functions.latent_gradient(
            *grad_z.shape,
            head.data_ptr(),
            grad_z.data_ptr(),
            deviation.data_ptr(),
            kl_weight.data_ptr(),
            share,
            bias_grad.data_ptr(),
            bias_grad.stride(0),
            torch.get_num_threads(),
        )
        return head
