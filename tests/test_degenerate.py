"""Codes at the edge of what can be measured: a defined value, or null with a true reason."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vaeq
from tests.soak import times
from vaeq import measurement
from vaeq.divergence import bracket, decompose, marginal_kl, moment_kl
from vaeq.divergence.decomposition import kl_per_image
from vaeq.divergence.ex_post import fit_ex_post
from vaeq.divergence.reverse import reverse_marginal_kl
from vaeq.divergence.two_sample import two_sample
from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.generation.samplers import samplers
from vaeq.measurement import Measurement
from vaeq.models.elbo import held_out_elbo
from vaeq.posterior import log_density
from vaeq.posterior.aggregated import AggregatedPosterior
from vaeq.posterior.codes import CodesWarning


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equal_codes(n: int, dims: int, mean: float, logvar: float) -> AggregatedPosterior:
    """Every image, alike, has the same code: q_N is one Gaussian."""
    return AggregatedPosterior(torch.full((n, dims), mean), torch.full((n, dims), logvar))


def within(estimate: Estimate, exact: float, errors: float = 4) -> None:
    assert estimate.value is not None
    assert estimate.std_error is not None
    assert abs(estimate.value - exact) <= errors * estimate.std_error, (estimate, exact)


@pytest.mark.parametrize("n", [1, 2, 7, 256, 600])
@pytest.mark.parametrize(
    ("mean", "logvar"),
    [(0.0, 0.0), (0.7, -1.3), (3.0, -9.0), (0.0, -50.0), (0.0, -80.0), (0.0, 30.0), (1.0, 80.0)],
)
def test_equal_codes_are_one_gaussian(n: int, mean: float, logvar: float) -> None:
    """KL(N(μ, σ²) ‖ p) = ½ D (μ² + σ² − 1 − log σ²), and the index of the image tells nothing.

    As constant images give them, or one image, or a collapse of all dimensions (0, 0).
    """
    posterior = equal_codes(n, 3, mean, logvar)
    mean, logvar = float(torch.tensor(mean)), float(torch.tensor(logvar))
    exact = 1.5 * (mean**2 + math.expm1(logvar) - logvar)
    found = decompose(posterior, 500, generator())
    within(found["marginal_kl"], exact)
    assert found["moment_kl"].value == pytest.approx(exact, rel=1e-9, abs=1e-12)
    assert found["dimension_kl_sum"].value == pytest.approx(exact, rel=1e-9, abs=1e-12)
    assert found["active_units"].value == 0
    assert found["dimension_kl_mean_active"].reason == "no dimension is active"
    if exact < 2**53:
        within(found["mutual_information"], 0.0)
        within(found["total_correlation"], 0.0)
    else:
        for name in ("mutual_information", "mutual_information_fraction", "total_correlation"):
            assert "of which float64 does not resolve one" in (found[name].reason or ""), name
    if n == 1 and exact < 2**53:
        assert found["mutual_information_fraction"].reason == "log N is 0 for a single image"


@pytest.mark.parametrize("logvar", [0.0, 30.0, -9.0, -30.0, -80.0])
def test_the_reverse_kl_of_equal_codes(logvar: float) -> None:
    """KL(p ‖ N(0, σ² I)) = ½ D (1/σ² − 1 + log σ²), behind which stand all N components."""
    found = reverse_marginal_kl(equal_codes(50, 2, 0.0, logvar), 300, generator())
    within(found["reverse_marginal_kl"], math.expm1(-logvar) + logvar)
    effective = found["reverse_marginal_kl_ess"]
    if logvar > -20:
        within(effective, 50)
    else:
        assert effective.value is None
        assert "of which float64 resolves no shares" in (effective.reason or "")


def test_narrow_codes_far_from_the_draws_share_nothing() -> None:
    """σ = 3e-3: log q_N of a draw is −1e5, where float32 would give shares above one or none."""
    mean = torch.randn(40, 2, generator=generator(1))
    posterior = AggregatedPosterior(mean, torch.full_like(mean, -12.0))
    effective = reverse_marginal_kl(posterior, 200, generator())["reverse_marginal_kl_ess"]
    assert effective.value is not None
    assert 1 <= effective.value < 1.05


def test_two_images_apart_carry_one_bit() -> None:
    """Two codes 20 σ apart: mutual information log 2, KL(q_N ‖ p) = kl_per_image − log 2."""
    mean = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    posterior = AggregatedPosterior(mean, torch.full_like(mean, math.log(0.01)))
    found = decompose(posterior, 500, generator())
    # To 1e-5: (μ/σ)² = 100 amplifies the rounding of float32.
    average = float(kl_per_image(posterior).mean())
    assert found["mutual_information"].value == pytest.approx(math.log(2), abs=1e-5)
    assert found["marginal_kl"].value == pytest.approx(average - math.log(2), abs=1e-5)


@pytest.mark.parametrize("logvar", [-2.0, -50.0])
def test_more_dimensions_than_images(logvar: float) -> None:
    """N = 5 images in D = 60: codes far apart, MI log N; Cov(μ) alone is singular."""
    mean = torch.randn(5, 60, generator=generator(1))
    test_mean = torch.randn(4, 60, generator=generator(2))
    spread = torch.full_like(mean, logvar)
    posterior = AggregatedPosterior(mean, spread)
    found = decompose(posterior, 500, generator())
    within(found["mutual_information"], math.log(5))
    moment = moment_kl(posterior)
    if logvar == -2.0:
        covariance = torch.cov(mean.double().T, correction=0) + math.exp(-2) * torch.eye(
            60, dtype=torch.float64
        )
        centre = mean.double().mean(0)
        exact = 0.5 * float(centre.square().sum() + covariance.trace() - 60 - covariance.logdet())
        assert moment.value == pytest.approx(exact, rel=1e-9)
    else:
        assert moment.reason == "the covariance of q_N is singular in float64"
    held_out = AggregatedPosterior(test_mean, torch.full_like(test_mean, logvar))
    ends = bracket.population_bracket(posterior, held_out, generator=generator()).estimates()
    assert ends["population_kl_upper"].value is not None
    z = samplers(posterior, fit_ex_post(posterior, generator()))["gmm"](10, generator())
    assert bool(z.isfinite().all())


def test_distances_far_out_are_exact_or_missing() -> None:
    """One code of std e^40 among 200: float32 lost every distance but its own, in silence."""
    logvar = torch.zeros(200, 2)
    logvar[0] = 80.0
    far = two_sample(AggregatedPosterior(torch.zeros(200, 2), logvar), 200, 3, generator())
    for name in ("mmd", "energy_distance", "c2st_auc", "mmd_z"):
        assert far[name].value is None
        assert "float64 does not resolve distances of 1" in (far[name].reason or "")
    assert far["sliced_w2"].value is not None
    # All codes 1e5 away: the samples share nothing, and within each the kernel is that of N(0, I).
    z = torch.randn(300, 2, generator=generator(), dtype=torch.float64)
    away = two_sample(equal_codes(10, 2, 1e5, 0.0), 300, 5, generator())
    kernel = (1 + torch.cdist(z, z).square()).rsqrt().mean()
    assert away["mmd"].value == pytest.approx(float((2 * kernel).sqrt()), rel=0.02)
    assert away["c2st_auc"].value == 1.0


def test_a_null_without_spread_has_no_z() -> None:
    found = two_sample(equal_codes(3, 1, 0.0, 0.0), 4, 2, generator(5))
    for name in ("sliced_w2", "mmd", "energy_distance", "c2st_auc"):
        z = found[f"{name}_z"]
        assert z.value is not None or z.reason == "2 repeats of the null gave one value"


def test_the_bracket_of_collapsed_codes_is_zero_within_its_error() -> None:
    training, held_out = equal_codes(200, 4, 0.0, 0.0), equal_codes(50, 4, 0.0, 0.0)
    ends = bracket.population_bracket(training, held_out, generator=generator()).estimates()
    assert ends["population_kl_lower"].value == 0
    within(ends["population_kl_upper"], 0.0)
    within(ends["population_kl_upper_infonce"], 0.0)


def test_an_elbo_that_is_no_number_is_missing() -> None:
    nothing = torch.zeros(3, 2)
    found = held_out_elbo(
        lambda z: torch.full((len(z), 784), math.nan), nothing, nothing,
        torch.zeros(3, 784, dtype=torch.uint8), generator(),
    )  # fmt: skip
    for estimate in found.values():
        assert estimate.reason == "log p(x|z) of a draw z of q(z|x) is not finite"


@pytest.mark.parametrize("value", [100.0, -100.0])
def test_a_log_variance_beyond_float32_is_refused_in_one_line(value: float) -> None:
    with pytest.raises(InputError, match=r"logvar must be in \[-80, 80\], got -?100 at \[0, 0\]"):
        vaeq.measure(torch.zeros(4, 2), torch.full((4, 2), value))


def measured(panel: str, *codes: torch.Tensor, **more: object) -> Measurement:
    """``vaeq.measure``, small, where every warning but that about the codes is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CodesWarning)
        return vaeq.measure(*codes, panel=panel, n_samples=200, **more)  # type: ignore[arg-type]


def check(found: Measurement) -> None:
    """Every number finite, or null with a reason; shares and counts in their ranges."""

    def walk(value: object) -> None:
        if isinstance(value, float):
            assert math.isfinite(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(found.to_dict())
    n = found.settings["n"]
    for name, estimate in found.estimates.items():
        assert estimate.value is not None or estimate.reason, name
    for name, top in (("mutual_information", math.log(n)), ("reverse_marginal_kl_ess", float(n))):
        estimate = found.estimates.get(name)
        if estimate is None or estimate.value is None or estimate.std_error is None:
            continue
        slack = 6 * estimate.std_error + 1e-3 * top
        assert -slack <= estimate.value <= top + slack, (name, estimate)
    str(found)


@settings(max_examples=times(12, 1000), deadline=None)
@given(
    n=st.sampled_from([1, 2, 3, 5, 19, 20, 60]),
    dims=st.sampled_from([1, 2, 3, 40]),
    held_out=st.sampled_from([0, 1, 2, 7]),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
    level=st.sampled_from([-79.0, -20.0, -3.0, 0.0, 5.0, 79.0]),
    jitter=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1000),
)
# Clusters in a plane, whose covariances rounding leaves without a root.
@example(n=20, dims=40, held_out=1, spread=1e-6, level=-79.0, jitter=0.0, seed=0)
def test_whatever_the_codes_every_number_is_defined_or_says_why(
    n: int, dims: int, held_out: int, spread: float, level: float, jitter: float, seed: int
) -> None:
    source = generator(seed)

    def codes(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(2, rows, dims, generator=source)
        return spread * noise[0], (level + jitter * noise[1]).clamp(-80, 80)

    everything = [*codes(n), *(codes(held_out) if held_out else ())]
    try:
        found = measured("bracket", *everything, seed=seed)
    except InputError as error:
        assert "float64 cannot resolve so narrow a posterior" in str(error)  # noqa: PT017
        return
    check(found)
    posterior = AggregatedPosterior(*everything[:2])
    full = reverse_marginal_kl(posterior, 150, source) | two_sample(posterior, 30, 2, source)
    check(replace(found, estimates=found.estimates | full))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["collapsed", "single", "pair", "wide"])
def test_the_full_panel_of_degenerate_codes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "N_SAMPLES", 100)
    shapes = {"collapsed": (60, 4), "single": (1, 3), "pair": (2, 3), "wide": (5, 60)}
    n, dims = shapes[kind]
    source = generator(3)
    mean = torch.zeros(n, dims) if kind == "collapsed" else torch.ones(n, dims)
    if kind == "wide":
        mean = torch.randn(n, dims, generator=source)
    logvar = torch.full((n, dims), 0.0 if kind == "collapsed" else -1.0)
    labels = torch.zeros(n, dtype=torch.int64)
    found = measured("full", mean, logvar, mean[:1], logvar[:1], labels=labels)
    check(found)
    assert found.estimates["population_kl_upper"].reason == (
        "needs at least two held-out images, got one"
    )
    assert "needs at least 2000 images" in (found.estimates["n_curve_slope"].reason or "")


def typical(n: int = 400, dims: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as a trained encoder has them: some active, narrow dimensions, the rest collapsed."""
    source = generator(seed)
    std = torch.where(torch.arange(dims) < dims // 2, 0.1, 0.97)
    std = std * torch.exp(0.3 * torch.randn(n, dims, generator=source))
    mean = torch.randn(n, dims, generator=source) * (1 - std**2).clamp_min(1e-3).sqrt()
    return mean, 2 * std.log()


def values(found: dict[str, Estimate]) -> dict[str, float | None]:
    return {name: estimate.value for name, estimate in found.items()}


def test_float32_codes_give_the_numbers_of_float64_within_1e_4_nats() -> None:
    mean, logvar = typical()
    single = measured("bracket", mean, logvar, *typical(100, seed=1)).estimates
    double = measured(
        "bracket", mean.double(), logvar.double(), *(c.double() for c in typical(100, seed=1))
    ).estimates
    for name, estimate in single.items():
        # The same images and, but for the width of the normal numbers, the same estimators; the
        # draws differ by dtype, and with them the numbers by their Monte Carlo error.
        error = math.hypot(estimate.std_error or 0, double[name].std_error or 0)
        assert estimate.value == pytest.approx(double[name].value, abs=1e-4 + 5 * error), name
    z = AggregatedPosterior(mean, logvar).sample(300, generator())[0]
    ours = AggregatedPosterior(mean, logvar).log_prob(z).double()
    exact = AggregatedPosterior(mean.double(), logvar.double()).log_prob(z.double())
    # What the numbers are means of; at a single point the rounding is bounded by 1e-3.
    assert abs(float((ours - exact).mean())) < 1e-5
    assert float((ours - exact).abs().max()) < 1e-3


def test_codes_kept_in_bfloat16_move_the_divergences_by_their_rounding() -> None:
    """bfloat16 keeps 8 bits: μ and log σ² are off by at most 2⁻⁸ of themselves.

    A KL of one image, ½ Σ (μ² + σ² − 1 − log σ²), then moves by at most
    2⁻⁸ Σ (μ² + ½ |σ² − 1| |log σ²|) to first order, and its mean over images by much less, as
    roundings have either sign: by a tenth of that here.
    """
    mean, logvar = typical(2000)
    rounded = mean.bfloat16(), logvar.bfloat16()
    moved = (mean.square() + 0.5 * torch.expm1(logvar).abs() * logvar.abs()).sum(1)
    bound = 2.0**-8 * float(moved.mean())
    single = measured("decomposition", mean, logvar)
    low = measured("decomposition", *rounded)
    assert low.settings["dtype"] == "float32"
    for name in ("kl_per_image", "marginal_kl", "mutual_information", "dimension_kl_sum"):
        a, b = single.estimates[name], low.estimates[name]
        error = math.hypot(a.std_error or 0, b.std_error or 0)
        assert a.value == pytest.approx(b.value, abs=0.1 * bound + 4 * error), name
    # They are the numbers of the rounded codes, and of no others.
    same = measured("decomposition", *(part.float() for part in rounded))
    assert values(same.estimates) == values(low.estimates)


@pytest.mark.parametrize("tile", [512, 4096])
def test_the_size_of_the_chunks_moves_nothing_by_more_than_1e_5_nats(
    monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    codes = (*typical(700), *typical(60, seed=1))
    whole = measured("bracket", *codes).estimates
    reverse = reverse_marginal_kl(AggregatedPosterior(*codes[:2]), 300, generator())
    monkeypatch.setattr(log_density, "_CPU_TILE", tile)
    monkeypatch.setattr(log_density, "_CPU_ROWS", 7)
    monkeypatch.setattr(log_density, "_BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(bracket, "_CPU_TILE", tile)
    parts = measured("bracket", *codes).estimates
    parts |= reverse_marginal_kl(AggregatedPosterior(*codes[:2]), 300, generator())
    for name, estimate in (whole | reverse).items():
        assert estimate.value == pytest.approx(parts[name].value, abs=1e-5, rel=1e-6), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_numbers_of_the_cpu_within_1e_4_nats() -> None:
    codes = (*typical(2000, 16), *typical(300, 16, seed=1))
    labels = torch.arange(2000) % 10
    here = measured("full", *codes, labels=labels).estimates
    there = measured("full", *(part.cuda() for part in codes), labels=labels).estimates
    for name, estimate in here.items():
        if estimate.value is None:
            assert there[name].reason == estimate.reason, name
            continue
        # Draws are made on the CPU for both; what is fitted by EM may end a little elsewhere.
        fitted = name.startswith("population")
        error = 0.5 * (estimate.std_error or 0) if fitted else 0.0
        assert there[name].value == pytest.approx(estimate.value, abs=1e-4 + error, rel=1e-4), name


def test_marginal_kl_far_from_the_origin_owns_up_to_its_rounding() -> None:
    """|μ| = 1e9: KL = ½ D μ² = 1e18 nats, of which float64 resolves 128."""
    posterior = equal_codes(200, 2, 1e9, 0.0)
    within(marginal_kl(posterior, 1000, generator()), 1e18)
