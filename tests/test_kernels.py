"""What a step is made of, by torch and by functions in C, against float64 and torch's Adam."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vaeq.errors import InputError
from vaeq.models.elbo import gaussian_kl, reconstruction
from vaeq.training import compiler
from vaeq.training import kernels as module
from vaeq.training.kernels import Compiled, operations, resolve_kernels
from vaeq.training.operations import Linear, Operations, Stretch

CPU = torch.device("cpu")
# Less than a block of rows, one, some and a bit; MNIST's batches.
BATCHES = (3, 16, 37, 128)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def biases(members: int, units: int) -> tuple[Tensor, Tensor]:
    """Where the gradients of biases lie: apart, among others that must stay."""
    everything = torch.full((members, units + 5), 7.0)
    return everything, everything[:, 3 : units + 3].view(members, 1, units)


def untouched(everything: Tensor) -> bool:
    return bool((everything[:, :3] == 7).all() and (everything[:, -2:] == 7).all())


@pytest.fixture
def step(kernels: str) -> Operations:
    return operations(kernels)


def compiled_step(precision: str = "fp32") -> Compiled:
    if resolve_kernels("auto", CPU) != "compiled":
        pytest.skip("nothing compiles C here")
    step = operations("compiled", precision)
    assert isinstance(step, Compiled)
    if step.dtype != torch.float32:
        pytest.skip("torch makes the products of this precision here")
    return step


def counter(step: Operations) -> int | Tensor:
    """Of the steps of Adam, as the implementation wants it."""
    return 0 if isinstance(step, Compiled) else torch.tensor(0.0)


def test_a_machine_with_a_compiler_uses_it() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here")
    assert resolve_kernels("auto", CPU) == "compiled"
    assert isinstance(operations("compiled"), Compiled)


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_kernels("torch", CPU) == "torch"
    assert resolve_kernels("auto", torch.device("cuda")) == "torch"
    with pytest.raises(InputError, match=r"kernels=compiled.*they are for a CPU; use kernels=auto"):
        resolve_kernels("compiled", torch.device("cuda"))
    monkeypatch.setattr(module, "compiled", lambda *sources: None)
    assert resolve_kernels("auto", CPU) == "torch"
    with pytest.raises(InputError, match=r"kernels=compiled.*no C compiler works here; use"):
        resolve_kernels("compiled", CPU)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_likelihood_and_its_gradient(step: Operations, batch: int) -> None:
    """Also where sigmoid is 0 or 1 in float32; against float64, to the rounding of the sums."""
    logits = normal(3, batch, 97) * torch.tensor([1, 20, 200])[:, None, None]
    x = (255 * torch.rand(3, batch, 97, generator=torch.Generator().manual_seed(1))).round()
    total = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    everything, bias_grad = biases(3, 97)
    exact = logits.double().sigmoid() - x.double() / 255
    expected = reconstruction(logits.double(), x.double() / 255).sum(1)
    grad = step.likelihood(logits.clone(), x, total, bias_grad, 0.25)
    torch.testing.assert_close(grad.double(), exact, rtol=0, atol=2e-7)
    before = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(total - before, expected, rtol=3e-6, atol=0)
    sums = 0.25 * exact.sum(1, keepdim=True)
    torch.testing.assert_close(bias_grad.double(), sums, rtol=0, atol=3e-6)
    assert untouched(everything)


def test_the_code_and_its_divergence(step: Operations) -> None:
    # Variances near 1 and at 1, of a collapsed dimension, and far from it.
    logvar = torch.cat([normal(2, 9, 6) * 10.0**-k for k in (0, 2, 4, 6)], 2)
    logvar = torch.cat([logvar, torch.zeros(2, 9, 2), 30 * normal(2, 9, 5, seed=2)], 2)
    mean, noise = normal(*logvar.shape, seed=3), normal(*logvar.shape, seed=4)
    total = torch.zeros(2, dtype=torch.float64)
    z, deviation = step.code(torch.cat([mean, logvar], 2), noise, total)
    sigma = torch.exp(0.5 * logvar.double())
    torch.testing.assert_close(deviation.double(), sigma * noise, rtol=1e-6, atol=0)
    torch.testing.assert_close(z, mean + deviation, rtol=0, atol=0)
    expected = gaussian_kl(mean.double(), logvar.double()).sum(1)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def test_the_divergence_of_a_collapsed_code_is_not_rounded_away(step: Operations) -> None:
    total = torch.zeros(1, dtype=torch.float64)
    logvar = 1e-3 * normal(1, 128, 8)
    step.code(torch.cat([torch.zeros_like(logvar), logvar], 2), torch.zeros_like(logvar), total)
    exact = gaussian_kl(torch.zeros_like(logvar), logvar.double()).sum(1)
    # Each is the difference of two numbers of 1e-3, and 5e-7 itself.
    torch.testing.assert_close(total, exact, rtol=1e-3, atol=0)


def test_the_gradient_of_the_code(step: Operations) -> None:
    shape = 3, 17, 5
    mean, grad_z, noise = (normal(*shape, seed=seed) for seed in range(3))
    logvar = torch.cat([3 * normal(*shape, seed=4)[..., :3], 1e-5 * normal(*shape)[..., 3:]], 2)
    weight = torch.tensor([0.0, 0.6, 8.0])[:, None, None]
    pull = 0.5 * weight
    deviation = torch.exp(0.5 * logvar) * noise
    everything, bias_grad = biases(3, 10)
    head = torch.cat([mean, logvar], 2)
    grad = step.code_gradient(head, grad_z.clone(), deviation, weight, 0.5, bias_grad).double()
    excess = torch.expm1(logvar.double())
    exact = torch.cat(
        [
            grad_z.double() + pull * mean,
            0.5 * (grad_z.double() * deviation + pull * excess),
        ],
        2,
    )
    torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias_grad.double(), exact.sum(1, True), rtol=1e-5, atol=1e-5)
    assert untouched(everything)
    # Without a gradient of z what is left is the KL's, to seven digits of a variance near 1, too.
    head = torch.cat([mean, logvar], 2)
    grad = step.code_gradient(head, torch.zeros(shape), deviation, weight, 0.5, bias_grad).double()
    torch.testing.assert_close(grad[..., 5:], 0.5 * pull * excess, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 1000, 100_003])
def test_adam_is_torchs(step: Operations, size: int) -> None:
    """Two members of one learning rate and one of another, some steps ahead."""
    ours, moments = normal(3, size), (torch.zeros(3, size), torch.zeros(3, size))
    theirs = [torch.nn.Parameter(row.clone()) for row in ours]
    optimizers = [torch.optim.Adam([row], lr=3e-3) for row in theirs]
    stretches = [Stretch(rows, counter(step), 3e-3, 3e-3) for rows in (slice(0, 2), slice(2, 3))]
    for i in range(20):
        grads = normal(3, size, seed=i) * 10.0 ** (i % 5 - 3)
        for stretch, factor in zip(stretches, (1, 2), strict=True):
            stretch.rate = factor * 3e-3 / (i + 1)
        for e, (row, optimizer) in enumerate(zip(theirs, optimizers, strict=True)):
            optimizer.param_groups[0]["lr"] = (1, 1, 2)[e] * 3e-3 / (i + 1)
            row.grad = grads[e].clone()
            optimizer.step()
        step.adam(ours, grads, *moments, stretches)
        # Weights are of order 1: some units in the last place.
        torch.testing.assert_close(ours, torch.stack(theirs).detach(), rtol=0, atol=2e-6)
    assert [int(stretch.steps_done) for stretch in stretches] == [20, 20]
    states = [o.state[row] for o, row in zip(optimizers, theirs, strict=True)]
    # Gradients of up to 40 that cancel.
    first, second = (torch.stack([s[n] for s in states]) for n in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(moments[0], first, rtol=0, atol=2e-6)
    torch.testing.assert_close(moments[1], second, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_seen_in_the_sums(step: Operations, bad: float) -> None:
    """A member that diverges, and no other."""
    logits, x = normal(3, 4, 20), torch.full((3, 4, 20), 100.0)
    logits[1, 2, 3] = bad
    total, kl = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    step.likelihood(logits, x, total, torch.zeros(3, 1, 20), 1.0)
    head = normal(3, 4, 10)
    head[1, 2, 7] = bad
    step.code(head, normal(3, 4, 5), kl)
    for sums in (total, kl):
        assert sums.isfinite().tolist() == [True, False, True]


# Batch, units in and out: one, whole tiles of any processor, some more, some fewer; a last batch of
# MNIST's; widths at which rows of weights fall on the same places of a cache.
SHAPES = [
    (1, 1, 1),
    (3, 5, 2),
    (8, 48, 16),
    (9, 50, 97),
    (31, 17, 400),
    (96, 784, 40),
    (64, 512, 33),
]


def layer(members: int, fan_in: int, fan_out: int) -> tuple[Linear, Callable[[], bool]]:
    """A layer in stacks of others' numbers, and whether those are as they were."""
    size = fan_in * fan_out
    stacks = [torch.full((members, size + fan_out + 9), 7.0) for _ in range(4)]
    spans = slice(3, 3 + size), slice(size + 5, size + 5 + fan_out)
    for seed, stack in enumerate(stacks):
        for span in spans:
            stack[:, span] = normal(members, span.stop - span.start, seed=seed).abs_() + 0.1
    weights, grads, exp_avg, exp_avg_sq = stacks
    weights[:, spans[0]] -= 1

    def view(stack: Tensor) -> Tensor:
        return stack[:, spans[0]].view(members, fan_out, fan_in)

    found = Linear(
        weight=view(weights),
        bias=weights[:, spans[1]].view(members, 1, fan_out),
        weight_grad=view(grads),
        bias_grad=grads[:, spans[1]].view(members, 1, fan_out),
        exp_avg=view(exp_avg),
        exp_avg_sq=view(exp_avg_sq),
    )

    def others_stayed() -> bool:
        kept = torch.ones(stacks[0].shape[1], dtype=torch.bool)
        for span in spans:
            kept[span] = False
        return all(bool((stack[:, kept] == 7).all()) for stack in stacks)

    return found, others_stayed


def assert_near(found: Tensor, exact: Tensor, terms: Tensor) -> None:
    """To the rounding of a sum of which ``terms`` is the sum of the sizes."""
    assert found.dtype == torch.float32
    assert bool(((found.double() - exact).abs() <= 1e-6 * terms + 1e-12).all())


def check_the_products(
    step: Operations, batch: int, fan_in: int, fan_out: int, precision: str = "fp32"
) -> None:
    def factor(tensor: Tensor) -> Tensor:
        """As a product of this precision reads it."""
        return (tensor.bfloat16() if precision == "bf16" else tensor).double()

    own, others_stayed = layer(2, fan_in, fan_out)
    h, grad = normal(2, batch, fan_in, seed=8), normal(2, batch, fan_out, seed=9)
    weight, bias = factor(own.weight), own.bias.double()
    sizes = factor(h).abs() @ weight.mT.abs()
    exact = 0.3 * factor(h) @ weight.mT + bias
    assert_near(step.linear(h, own, 0.3), exact, 0.3 * sizes + bias.abs())
    before, after = step.hidden("relu", h, own, 0.3)
    assert before is after
    assert_near(after, exact.relu(), 0.3 * sizes + bias.abs())
    before, after = step.hidden("tanh", h, own, 0.3)
    assert_near(before, exact, 0.3 * sizes + bias.abs())
    assert torch.equal(after, before.tanh())

    exact, sizes = 0.3 * factor(grad) @ weight, 0.3 * factor(grad).abs() @ weight.abs()
    assert_near(step.input_gradient(grad, own, 0.3), exact, sizes)
    below = normal(2, batch, fan_in, seed=10)
    everything, bias_grad = biases(2, fan_in)
    rectified = below.relu()
    found = step.hidden_gradient("relu", grad, own, 0.3, (rectified, rectified), bias_grad)
    assert_near(found, torch.where(below > 0, exact, 0), sizes)
    assert_near(bias_grad, found.double().sum(1, True), found.abs().double().sum(1, True))
    found = step.hidden_gradient("tanh", grad, own, 0.3, (below, below.tanh()), bias_grad)
    assert_near(found, exact * (1 - below.tanh().double() ** 2), 2 * sizes)
    assert_near(bias_grad, found.double().sum(1, True), found.abs().double().sum(1, True))
    assert untouched(everything)

    step.weight_gradient(grad, h, own, 0.3)
    exact = 0.3 * factor(grad).mT @ factor(h)
    assert_near(own.weight_grad, exact, 0.3 * factor(grad).mT.abs() @ factor(h).abs())
    assert others_stayed()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_products_of_a_layer(step: Operations, shape: tuple[int, int, int]) -> None:
    check_the_products(step, *shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_products_of_bf16(shape: tuple[int, int, int]) -> None:
    """Of numbers that are rounded as torch rounds them, and no sum."""
    step = compiled_step("bf16")
    check_the_products(step, *shape, precision="bf16")


def compiled_with(options: str, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    if resolve_kernels("auto", CPU) != "compiled" or platform.machine() != "x86_64":
        pytest.skip("no compiler for such a processor here")
    monkeypatch.setenv("CC", f"cc {options}")
    compiler.compiled.cache_clear()
    try:
        functions = compiler.compiled(*module._SOURCES)
    finally:
        compiler.compiled.cache_clear()
    assert functions is not None
    return functions


@pytest.mark.parametrize("options", ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx2"])
def test_the_products_of_a_lesser_processor(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """Of a compiler that leaves instructions alone; the last leaves the products to torch."""
    functions = compiled_with(options, monkeypatch)
    step, low = Compiled(functions), Compiled(functions, "bf16")
    for shape in SHAPES:
        check_the_products(step, *shape)
    if options == "-mno-avx2":
        assert not step.multiplies(torch.float32)
        assert low.dtype == torch.bfloat16
    else:
        for shape in SHAPES:
            check_the_products(low, *shape, precision="bf16")


def test_products_of_bf16_are_torchs_where_a_matrix_unit_makes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low = Compiled(compiled_with("-D__AMX_BF16__", monkeypatch), "bf16")
    assert low.dtype == torch.bfloat16
    assert not low.multiplies(low.dtype)
    own, _ = layer(2, 5, 7)
    own = replace(own, weight=own.weight.bfloat16(), bias=own.bias.bfloat16())
    h = normal(2, 3, 5).bfloat16()
    assert torch.equal(low.linear(h, own), Operations("bf16").linear(h, own))


def test_what_is_rounded_to_bf16_is_rounded_as_by_torch() -> None:
    """Ties, the largest, and what is no number, whose bits a carry would make a zero of."""
    step = compiled_step("bf16")
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0xBF817FFF, 0x7F7FFFFF, 0x7F7F7FFF, 0x00800000]
    bits += [0x00000000, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]
    values = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    own, _ = layer(1, 1, 1)
    own.weight.fill_(1.0)
    own.bias.fill_(0.0)
    made = [step.linear(values.view(1, -1, 1), own)]
    # And as the right factor, and as either of a gradient's.
    own, _ = layer(1, len(values), 1)
    own.weight.copy_(values.view(1, 1, -1))
    one = torch.ones(1, 1, 1)
    made += [step.input_gradient(one, own)]
    step.weight_gradient(one, values.view(1, 1, -1), own)
    expected = values.bfloat16().float()
    for found in (*made, own.weight_grad):
        torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_descent_is_adam_by_the_gradient(shape: tuple[int, int, int], precision: str) -> None:
    step = compiled_step(precision)
    batch, fan_in, fan_out = shape
    (one, stayed), (other, _) = layer(3, fan_in, fan_out), layer(3, fan_in, fan_out)
    stretches = [Stretch(slice(0, 2), 4, 1e-3, 1e-3), Stretch(slice(2, 3), 9, 1e-2, 1e-2)]
    again = [replace(stretch) for stretch in stretches]
    for seed in range(3):
        h, grad = normal(3, batch, fan_in, seed=seed), normal(3, batch, fan_out, seed=seed + 3)
        step.descend(step.step_sizes(stretches), grad, h, one, 0.3)
        step.weight_gradient(grad, h, other, 0.3)
        parts = other.weight, other.weight_grad, other.exp_avg, other.exp_avg_sq
        copies = [part.flatten(1).clone() for part in parts]
        step.adam(*copies, again)  # type: ignore[arg-type, misc]
        for part, copy in zip(parts, copies, strict=True):
            part.copy_(copy.view_as(part))
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            ours, theirs = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert [stretch.steps_done for stretch in stretches] == [7, 12]
    assert stayed()


def test_a_rectifier_passes_on_what_is_no_number(step: Operations) -> None:
    own, _ = layer(1, 3, 1)
    own.weight.fill_(1.0)
    own.weight[0, 0, 1] = math.nan
    after = torch.tensor([[[math.nan, 1.0, 0.0]]])
    grad, bias_grad = torch.ones(1, 1, 1), torch.zeros(1, 1, 3)
    found = step.hidden_gradient("relu", grad, own, 1.0, (after, after), bias_grad)
    # As autograd: the sign of a number that is none is not known to be negative.
    assert found[0, 0, 0] == 1
    assert math.isnan(found[0, 0, 1])
    assert found[0, 0, 2] == 0
    assert math.isnan(step.hidden("relu", torch.ones(1, 1, 3), own)[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bits_of_what_is_compiled_hang_on_no_thread(precision: str) -> None:
    def all_of_it() -> list[Tensor]:
        step = compiled_step(precision)
        totals = torch.zeros(2, 2, dtype=torch.float64)
        wide, narrow, hidden = (torch.zeros(2, 1, n) for n in (784, 6, 300))
        images = torch.randint(
            256, (2, 128, 784), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        x = step.levels(images)
        assert torch.equal(x, images.float())
        grad = step.likelihood(5 * normal(2, 128, 784), x, totals[0], wide, 0.1)
        head = normal(2, 128, 6)
        z, deviation = step.code(head, normal(2, 128, 3, seed=2), totals[1])
        back = step.code_gradient(
            head, normal(2, 128, 3), deviation, torch.ones(2, 1, 1), 0.1, narrow
        )
        own, _ = layer(2, 300, 784)
        h = normal(2, 128, 300).relu()
        made = [step.linear(h, own), step.hidden("relu", h, own)[1]]
        made += [step.hidden_gradient("relu", grad, own, 0.1, (h, h), hidden)]
        step.weight_gradient(grad, h, own)
        stretches = [Stretch(slice(0, 2), 4, 1e-3, 1e-3)]
        step.descend(step.step_sizes(stretches), grad, h, own)
        made += [own.weight, own.weight_grad, own.exp_avg, own.exp_avg_sq]
        weights, moments = normal(2, 50_000), [torch.zeros(2, 50_000), torch.zeros(2, 50_000)]
        step.adam(weights, normal(2, 50_000, seed=3), moments[0], moments[1], stretches)
        return [totals, wide, narrow, hidden, grad, z, back, *made, weights, *moments]

    torch.set_num_threads(1)
    expected = all_of_it()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for ours, one in zip(all_of_it(), expected, strict=True):
            assert torch.equal(ours, one)


def test_members_that_do_not_lie_together_are_read_all_the_same(step: Operations) -> None:
    """As a batch that is cut out of a block of batches."""

    def cut(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]

    def found(shape: Callable[[Tensor], Tensor]) -> list[Tensor]:
        totals, bias = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 1, 20)
        x = (100 * normal(3, 4, 20).abs()).clamp(max=255)
        grad = step.likelihood(normal(3, 4, 20), shape(x), totals[0], bias, 1.0)
        own, _ = layer(3, 20, 7)
        h = shape(x)
        made = [step.linear(h, own), step.input_gradient(shape(normal(3, 4, 7)), own)]
        step.weight_gradient(shape(normal(3, 4, 7)), h, own)
        levels = step.levels(shape(x.byte()))
        z = step.code(normal(3, 4, 10), shape(normal(3, 4, 5)), totals[1])
        return [grad, *z, totals, bias, *made, own.weight_grad, levels]

    for apart, together in zip(found(cut), found(lambda tensor: tensor), strict=True):
        assert torch.equal(apart, together)
