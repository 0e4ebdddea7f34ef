"""log p(x) against closed forms, quadrature and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import MultivariateNormal

from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.generation.likelihood import (
    ais_check,
    ais_check_together,
    ais_log_likelihood,
    bernoulli,
    log_likelihood,
    log_likelihood_together,
)
from vaeq.models.elbo import gaussian_kl, reconstruction


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within(estimate: Estimate, truth: float, errors: float = 4, slack: float = 0.0) -> bool:
    assert estimate.value is not None
    assert estimate.std_error is not None
    return abs(estimate.value - truth) <= errors * estimate.std_error + slack


class Linear:
    """x = W z + b + s ε: log p(x) and p(z|x) are Gaussian, whatever the Gaussian prior."""

    def __init__(self, dims: int, pixels: int, count: int, seed: int = 0) -> None:
        source = generator(seed)
        # Orthogonal columns: the exact posterior is then diagonal.
        basis = torch.linalg.qr(torch.randn(pixels, dims, generator=source).double()).Q
        self.weight = basis * torch.linspace(2.0, 0.5, dims).double()
        self.bias = torch.randn(pixels, generator=source).double()
        self.noise = 0.5
        z = torch.randn(count, dims, generator=source).double()
        epsilon = torch.randn(count, pixels, generator=source).double()
        self.x = self.decode(z) + self.noise * epsilon
        gram = (self.weight.T @ self.weight).diagonal() + self.noise**2
        self.mean = (self.x - self.bias) @ self.weight / gram
        self.logvar = (self.noise**2 / gram).log().expand_as(self.mean).clone()

    def decode(self, z: Tensor) -> Tensor:
        return z.to(self.weight) @ self.weight.T + self.bias

    def observation(self, decoded: Tensor, x: Tensor) -> Tensor:
        offset = (x[:, None] - decoded) / self.noise
        constant = math.log(2 * math.pi * self.noise**2)
        return -0.5 * (offset.square() + constant).sum(2)

    def exact(self, mean: float = 0.0, variance: float = 1.0) -> Tensor:
        """log p(x) under the prior N(mean, variance I)."""
        dims = torch.full((self.weight.shape[1],), mean).double()
        covariance = variance * self.weight @ self.weight.T
        covariance.diagonal().add_(self.noise**2)
        return MultivariateNormal(self.decode(dims), covariance).log_prob(self.x)

    def wrong(self) -> tuple[Tensor, Tensor]:
        """A q(z|x) that is off, and wider than p(z|x) so that the weights are bounded."""
        return self.mean + 0.2, self.logvar + 0.7


def test_the_bernoulli_likelihood_of_many_codes_is_the_elbos() -> None:
    logits = 4 * torch.randn(3, 5, 7, generator=generator(), dtype=torch.float64)
    x = torch.rand(3, 7, generator=generator(1), dtype=torch.float64)
    expected = torch.stack([reconstruction(logits[:, k], x) for k in range(5)], 1)
    torch.testing.assert_close(bernoulli(logits, x), expected)


def test_with_the_exact_posterior_every_draw_gives_the_exact_likelihood() -> None:
    model = Linear(3, 8, 20)
    found = log_likelihood(
        model.decode, model.mean, model.logvar, model.x, generator(),
        n_importance=2, observation=model.observation,
    )  # fmt: skip
    truth = float(model.exact().mean())
    assert found["log_likelihood"].value == pytest.approx(truth, abs=1e-9)
    assert found["log_likelihood"].std_error == pytest.approx(0, abs=1e-9)
    assert found["inference_gap"].value == pytest.approx(0, abs=1e-9)
    assert found["importance_ess"].value == pytest.approx(2)


def test_a_linear_gaussian_model_in_closed_form() -> None:
    model = Linear(3, 8, 50)
    mean, logvar = model.wrong()
    found = log_likelihood(
        model.decode, mean, logvar, model.x, generator(1),
        n_importance=4000, observation=model.observation,
    )  # fmt: skip
    truth = float(model.exact().mean())
    assert within(found["log_likelihood"], truth)
    # KL(q ‖ p(z|x)) of two diagonal Gaussians, in closed form.
    std = torch.exp(0.5 * model.logvar)
    kl = gaussian_kl((mean - model.mean) / std, logvar - model.logvar).mean()
    assert within(found["inference_gap"], float(kl))
    level = found["log_likelihood"].std_error
    assert level is not None
    assert 0 < level < 0.01


def test_another_prior_in_closed_form_from_the_same_draws() -> None:
    model = Linear(2, 6, 40)

    def log_r(z: Tensor) -> Tensor:
        normal = torch.distributions.Normal(0.3, math.sqrt(0.6))
        return normal.log_prob(z.double()).sum(1)

    found = log_likelihood(
        model.decode, *model.wrong(), model.x, generator(2),
        n_importance=4000, observation=model.observation, log_prior=log_r,
    )  # fmt: skip
    cost = float((model.exact(0.3, 0.6) - model.exact()).mean())
    assert within(found["prior_cost"], cost)
    assert within(found["log_likelihood_ex_post"], float(model.exact(0.3, 0.6).mean()))
    with_errors = [found[name].std_error for name in ("prior_cost", "log_likelihood_ex_post")]
    assert all(error is not None and error > 0 for error in with_errors)


def test_the_standard_prior_costs_nothing_against_itself() -> None:
    model = Linear(2, 6, 5)
    found = log_likelihood(
        model.decode, *model.wrong(), model.x, generator(),
        n_importance=10, observation=model.observation,
        log_prior=lambda z: stats_normal(z),
    )  # fmt: skip
    assert found["prior_cost"].value == pytest.approx(0, abs=1e-12)
    assert found["prior_cost"].std_error == pytest.approx(0, abs=1e-12)


def stats_normal(z: Tensor) -> Tensor:
    return torch.from_numpy(stats.norm.logpdf(z.double().numpy()).sum(1))


@pytest.mark.parametrize("draws", [20, 3000])
def test_models_together_have_the_likelihoods_they_have_alone(draws: int) -> None:
    """Draw for draw, whatever the others' latent dimensions, on either side of the tile size."""
    source = generator(5)
    images = (torch.rand(9, 784, generator=source) > 0.5).to(torch.uint8) * 255
    dims = [2, 5, 3]
    weights = [torch.randn(d, 784, generator=source) for d in dims]
    means = [torch.randn(9, d, generator=source) for d in dims]
    logvars = [torch.randn(9, d, generator=source) - 2 for d in dims]
    priors = [None, lambda z: -0.5 * z.abs().sum(1), None]
    stack = torch.stack([torch.cat([w, torch.ones(5 - len(w), 784)]) for w in weights])
    together = log_likelihood_together(
        lambda z: z @ stack, means, logvars, images, [generator(i) for i in range(3)],
        n_importance=draws, log_priors=priors,
    )  # fmt: skip
    for i, found in enumerate(together):
        alone = log_likelihood(
            lambda z, w=weights[i]: z @ w, means[i], logvars[i], images, generator(i),
            n_importance=draws, log_prior=priors[i],
        )  # fmt: skip
        assert found.keys() == alone.keys()
        for name, estimate in alone.items():
            assert found[name].value == pytest.approx(estimate.value, rel=1e-5), name
            error = None if estimate.std_error is None else pytest.approx(estimate.std_error, 1e-3)
            assert found[name].std_error == error, name


def bernoulli_model() -> tuple[Tensor, Tensor, Tensor, Tensor, list[float]]:
    """Weight, codes, images and exact log p(x) by quadrature; one latent dimension, 4 pixels."""
    weight = torch.tensor([[2.5, -1.0, 0.7, 1.6]])
    images = torch.tensor([[255, 0, 255, 255], [0, 255, 0, 51]], dtype=torch.uint8)
    mean, logvar = torch.tensor([[0.6], [-0.8]]), torch.tensor([[-0.3], [-0.2]])
    truth = []
    for x in images.numpy() / 255:

        def integrand(z: float, x: np.ndarray = x) -> float:
            logits = weight.numpy()[0] * z - 0.3
            log_px = float((x * logits - np.logaddexp(0, logits)).sum())
            return math.exp(log_px) * float(stats.norm.pdf(z))

        truth.append(math.log(integrate.quad(integrand, -12, 12)[0]))
    return weight, mean, logvar, images, truth


def test_bernoulli_pixels_agree_with_quadrature_both_ways() -> None:
    weight, mean, logvar, images, truth = bernoulli_model()

    def decode(z: Tensor) -> Tensor:
        return z @ weight - 0.3

    found = log_likelihood(decode, mean, logvar, images, generator(), n_importance=20_000)
    assert within(found["log_likelihood"], sum(truth) / 2)
    for start in ((mean, logvar), (0 * mean, 0 * logvar), (mean + 1, logvar - 2)):
        annealed = ais_log_likelihood(
            decode, *start, images, generator(1), n_chains=200, n_steps=30
        )
        error = annealed.log_px - torch.tensor(truth)
        assert (error.abs() < 4 * annealed.variance.sqrt() + 1e-5).all()
        assert 0.5 < annealed.acceptance <= 1


def test_two_latent_dimensions_agree_with_a_grid() -> None:
    source = generator(3)
    weight = 1.5 * torch.randn(2, 6, generator=source)
    images = (torch.rand(3, 6, generator=source) > 0.5).to(torch.uint8) * 255
    axis = torch.linspace(-7, 7, 701, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_prior = -0.5 * grid.square().sum(1) - math.log(2 * math.pi)
    log_px = bernoulli((grid @ weight.double())[None].expand(3, -1, -1), images.double() / 255)
    truth = (log_px + log_prior).logsumexp(1) + 2 * math.log(14 / 700)
    mean, logvar = torch.zeros(3, 2), torch.zeros(3, 2)
    found = log_likelihood(lambda z: z @ weight, mean, logvar, images, source, n_importance=20_000)
    assert within(found["log_likelihood"], float(truth.mean()))
    annealed = ais_log_likelihood(
        lambda z: z @ weight, mean, logvar, images, source, n_chains=200, n_steps=30
    )
    assert ((annealed.log_px - truth).abs() < 4 * annealed.variance.sqrt() + 1e-5).all()


def test_annealing_is_exact_for_a_linear_model_and_better_than_its_start() -> None:
    model = Linear(3, 8, 30)
    mean, logvar = model.mean + 0.6, model.logvar - 2  # far off, and too narrow to sample from
    settings_ = {"observation": model.observation}
    annealed = ais_log_likelihood(
        model.decode, mean, logvar, model.x, generator(5), n_chains=50, n_steps=60, **settings_
    )
    error = annealed.log_px - model.exact()
    mean_error = float(error.mean())
    assert abs(mean_error) < 4 * math.sqrt(float(annealed.variance.sum())) / 30 + 0.01
    sampled = log_likelihood(
        model.decode, mean, logvar, model.x, generator(5), n_importance=50, **settings_
    )["log_likelihood"].value
    assert sampled is not None
    assert float(model.exact().mean()) - sampled > 0.5  # what annealing has to make up for


def test_the_weights_of_annealing_are_unbiased() -> None:
    # E w = p(x) for any number of steps: short, bad chains average to the exact likelihood.
    model = Linear(2, 5, 1)
    many = 4000
    annealed = ais_log_likelihood(
        model.decode,
        model.mean.expand(many, -1) + 0.3,
        model.logvar.expand(many, -1) + 0.3,
        model.x.expand(many, -1),
        generator(8),
        n_chains=2,
        n_steps=3,
        observation=model.observation,
    )
    ratio = torch.exp(annealed.log_px - model.exact())
    assert float(ratio.std()) > 0.05
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / math.sqrt(many)


def test_the_check_reports_what_importance_sampling_misses() -> None:
    model = Linear(3, 8, 40)
    found = ais_check(
        model.decode, model.mean + 0.6, model.logvar - 2, model.x, generator(5),
        n_images=30, n_importance=20, n_chains=20, n_steps=60, observation=model.observation,
    )  # fmt: skip
    gap = found["ais_gap"]
    assert gap.value is not None
    assert gap.std_error is not None
    assert gap.value > 4 * gap.std_error > 0
    assert found["ais_log_likelihood"].value == pytest.approx(
        found["importance_log_likelihood"].value + gap.value  # type: ignore[operator]
    )
    good = ais_check(
        model.decode, *model.wrong(), model.x, generator(6),
        n_importance=2000, n_chains=20, n_steps=60, observation=model.observation,
    )  # fmt: skip
    assert within(good["ais_gap"], 0)


def test_models_annealed_together_have_the_numbers_they_have_alone() -> None:
    dims, pixels, count = (3, 1, 2), 6, 5
    weights = [torch.randn(d, pixels, generator=generator(d)) for d in dims]
    images = (torch.rand(count, pixels, generator=generator()) * 255).to(torch.uint8)
    means = [0.3 * torch.randn(count, d, generator=generator(10 + d)) for d in dims]
    logvars = [torch.full_like(mean, -0.5) for mean in means]
    stack = torch.stack([torch.cat([w, w.new_zeros(3 - len(w), pixels)]) for w in weights])
    numbers = {"n_images": 4, "n_importance": 30, "n_chains": 3, "n_steps": 8, "leapfrog": 2}
    together = ais_check_together(
        lambda z: torch.bmm(z, stack), means, logvars, images,
        [generator(seed) for seed in range(3)], **numbers,
    )  # fmt: skip
    for i, found in enumerate(together):
        alone = ais_check(
            lambda z, i=i: z @ weights[i], means[i], logvars[i], images, generator(i), **numbers
        )
        for name, estimate in alone.items():
            assert found[name].value == pytest.approx(estimate.value, rel=1e-5, abs=1e-6)
            assert found[name].std_error == pytest.approx(estimate.std_error, rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), tile=st.sampled_from([1, 30, 200, 10_000]))
def test_memory_bounds_do_not_change_the_numbers(seed: int, tile: int) -> None:
    model = Linear(2, 5, 7, seed)
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for size in (1 << 20, tile):
            patch.setattr("vaeq.generation.likelihood._TILE", size)
            found.append(
                log_likelihood(
                    model.decode,
                    *model.wrong(),
                    model.x,
                    generator(seed),
                    n_importance=9,
                    observation=model.observation,
                )
            )
    for name, estimate in found[0].items():
        assert estimate.value == pytest.approx(found[1][name].value, rel=1e-9)
    assert found[0]["inference_gap"].value >= 0  # type: ignore[operator]


def test_a_blown_up_decoder_gives_no_number() -> None:
    found = log_likelihood(
        lambda z: torch.full((len(z), 3), math.nan),
        torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 3, dtype=torch.uint8), generator(),
    )  # fmt: skip
    assert found["log_likelihood"].value is None
    assert found["log_likelihood"].reason == "an importance weight is not finite"


def test_settings_that_mean_nothing_are_refused() -> None:
    arguments = (lambda z: z, torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(InputError, match="n_importance must be >= 2, got 1"):
        log_likelihood(*arguments, generator(), n_importance=1)
    with pytest.raises(InputError, match="n_chains must be >= 2"):
        ais_log_likelihood(*arguments, generator(), n_chains=1)
