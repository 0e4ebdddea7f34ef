"""The part of a step beside its products, by torch and by loops, against float64."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vaeq.errors import InputError
from vaeq.models.elbo import gaussian_kl, reconstruction
from vaeq.training import elementwise as module
from vaeq.training.elementwise import Loops, Operations, elementwise, resolve_kernels

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
    return elementwise(kernels)


def test_a_machine_with_a_compiler_has_loops() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here")
    assert resolve_kernels("auto", CPU) == "compiled"
    assert isinstance(elementwise("compiled"), Loops)


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_kernels("torch", CPU) == "torch"
    assert resolve_kernels("auto", torch.device("cuda")) == "torch"
    with pytest.raises(InputError, match=r"kernels=compiled.*they are for a CPU; use kernels=auto"):
        resolve_kernels("compiled", torch.device("cuda"))
    monkeypatch.setattr(module, "compiled", lambda source: None)
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
    pull = torch.tensor([0.0, 0.3, 4.0])[:, None, None]
    deviation = torch.exp(0.5 * logvar) * noise
    everything, bias_grad = biases(3, 10)
    head = torch.cat([mean, logvar], 2)
    grad = step.code_gradient(head, grad_z.clone(), deviation, pull, bias_grad).double()
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
    grad = step.code_gradient(head, torch.zeros(shape), deviation, pull, bias_grad).double()
    torch.testing.assert_close(grad[..., 5:], 0.5 * pull * excess, rtol=1e-6, atol=0)


@pytest.mark.parametrize("units", [7, 112, 300])
def test_the_gradient_of_a_rectifier(step: Operations, units: int) -> None:
    before, grad = normal(2, 31, units), normal(2, 31, units, seed=1)
    before[:, :3] = 0
    everything, bias_grad = biases(2, units)
    exact = torch.where(before > 0, grad, 0)
    found = step.activation_gradient("relu", grad.clone(), before, before.relu(), bias_grad)
    assert torch.equal(found, exact)
    torch.testing.assert_close(bias_grad, exact.sum(1, True), rtol=1e-5, atol=1e-5)
    assert untouched(everything)


@pytest.mark.parametrize("size", [1, 1000, 100_003])
def test_adam_is_torchs(step: Operations, size: int) -> None:
    ours, theirs = normal(1, size), torch.nn.Parameter(normal(1, size))
    optimizer = torch.optim.Adam([theirs], lr=3e-3)
    moments = torch.zeros(1, size), torch.zeros(1, size)
    done = torch.tensor(0.0)
    for i in range(20):
        rate = 3e-3 / (i + 1)
        optimizer.param_groups[0]["lr"] = rate
        theirs.grad = normal(1, size, seed=i) * 10.0 ** (i % 5 - 3)
        optimizer.step()
        step.adam(ours, theirs.grad, *moments, done, rate)
        # Weights are of order 1: some units in the last place.
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2e-6)
    assert float(done) == 20
    state = optimizer.state[theirs]
    # Gradients of up to 40 that cancel.
    torch.testing.assert_close(moments[0], state["exp_avg"], rtol=0, atol=2e-6)
    torch.testing.assert_close(moments[1], state["exp_avg_sq"], rtol=2e-6, atol=0)


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


def test_a_rectifier_passes_on_what_is_no_number(step: Operations) -> None:
    grad, after = torch.ones(1, 1, 3), torch.tensor([[[math.nan, 1.0, 0.0]]])
    grad[0, 0, 1] = math.nan
    found = step.activation_gradient("relu", grad, after, after, torch.zeros(1, 1, 3))
    # As autograd: the sign of a number that is none is not known to be negative.
    assert found[0, 0, 0] == 1
    assert math.isnan(found[0, 0, 1])
    assert found[0, 0, 2] == 0


def test_the_bits_of_the_loops_hang_on_no_thread() -> None:
    if resolve_kernels("auto", CPU) != "compiled":
        pytest.skip("nothing compiles C here")
    step = elementwise("compiled")

    def all_of_it() -> list[Tensor]:
        totals = torch.zeros(2, 2, dtype=torch.float64)
        wide, narrow, hidden = (torch.zeros(2, 1, n) for n in (784, 6, 300))
        x = (100 * normal(2, 128, 784, seed=1).abs()).clamp(max=255)
        grad = step.likelihood(5 * normal(2, 128, 784), x, totals[0], wide, 0.1)
        head = normal(2, 128, 6)
        z, deviation = step.code(head, normal(2, 128, 3, seed=2), totals[1])
        pull = torch.ones(2, 1, 1)
        back = step.code_gradient(head, normal(2, 128, 3), deviation, pull, narrow)
        h = normal(2, 128, 300).relu()
        passed = step.activation_gradient("relu", normal(2, 128, 300, seed=5), h, h, hidden)
        weights, moments = normal(2, 5000), [torch.zeros(2, 5000), torch.zeros(2, 5000)]
        step.adam(weights, normal(2, 5000, seed=3), *moments, torch.tensor(4.0), 1e-3)
        return [totals, wide, narrow, hidden, grad, z, back, passed, weights, *moments]

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
        return [grad, *step.code(normal(3, 4, 10), shape(normal(3, 4, 5)), totals[1]), totals, bias]

    for apart, together in zip(found(cut), found(lambda tensor: tensor), strict=True):
        assert torch.equal(apart, together)
