"""A certified bracket of the population KL(q ‖ p), q(z) = E_{p_data(x)} q(z|x).

    E_q[log r − log p]  <=  KL(q ‖ p)  <=  E_q[log s − log p] + log E_q[q / s]

for any density r and any positive s(z, x) chosen without the held-out images that the means E are
over. The left is Barber & Agakov (2003); the right is Jensen's inequality on log q/s, the family
of bounds of Poole et al. (2019), sections 2.3 and 2.4, that holds the multi-sample InfoNCE bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from vaeq.divergence.decomposition import kl_per_image
from vaeq.divergence.densities import (
    FULL_MIXTURE_DIMS,
    Chart,
    Charted,
    Density,
    Gaussian,
    SmoothedMixture,
    Stack,
    draw,
    stack_weights,
)
from vaeq.divergence.flow import FLOW_DIMS, fit_flow, flow_missing
from vaeq.divergence.stepwise_em import fit_gaussian_mixture, fit_gaussian_mixtures
from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior

_LOG_2PI = math.log(2 * math.pi)
# Images kept out of every fit: they weigh the candidates, and choose the upper bound.
VALIDATION_IMAGES = 2_000
# The fits see no more images than this, and the bounds no more held-out ones (M² pairs).
FIT_IMAGES = 100_000
HELD_OUT_IMAGES = 20_000
# Draws of z a held-out image: together about this many, at most _MOST_DRAWS.
_DRAWS = 10_000
_MOST_DRAWS = 16
# Fewer images than this get the Gaussian alone.
_FEWEST_IMAGES = 20
_ENSEMBLE = 4
_SMOOTHING = (0.0, 0.02, 0.1, 0.3)
# Parts of the stack with less weight than this are left out of it.
_SMALLEST_WEIGHT = 0.01
# Weight of an image's own posterior in s, times M²: no pair of images moves the mean of q/s, which
# is near 1, by more than 2/_PAIR_WEIGHT.
_PAIR_WEIGHT = 30.0
# Share of N(0, I) in s: it bounds q/s where the fitted densities have nothing.
_PRIOR_SHARE = 0.1
# s is larger than q by about this share where mutual information allows it.
_OWN_SHARE = 0.01
# Pairs of images held at a time.
_CPU_TILE, _GPU_TILE = 1 << 19, 1 << 25
# What the float32 sums over pairs leave of the mean of their logarithms, nats: it is all of the
# error where every image has one code.
_ROUNDING = 2.0**-22

NO_HELD_OUT = "needs held-out codes: give test_mean and test_logvar"


@dataclass(frozen=True)
class Candidate:
    """One lower bound: how it did on validation and on held-out images, and its weight."""

    name: str
    validation: float | None
    value: float | None
    std_error: float | None
    weight: float
    reason: str | None = None


@dataclass(frozen=True)
class Bracket:
    """Both ends of the population KL, and how they came about."""

    lower: Estimate
    upper: Estimate
    upper_infonce: Estimate
    candidates: list[Candidate] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def estimates(self) -> dict[str, Estimate]:
        """The ends under their names."""
        return {
            "population_kl_lower": self.lower,
            "population_kl_upper": self.upper,
            "population_kl_upper_infonce": self.upper_infonce,
        }

    def table(self) -> dict[str, list[Any]]:
        """The candidates for the lower end, column by column."""
        columns = [part.name for part in fields(Candidate)]
        return {name: [getattr(row, name) for row in self.candidates] for name in columns}


def missing_bracket(reason: str) -> Bracket:
    """A bracket that could not be had, and why."""
    missing = Estimate.missing("nats", reason)
    return Bracket(missing, missing, missing)


def population_bracket(
    training: AggregatedPosterior,
    held_out: AggregatedPosterior | None,
    *,
    flow: bool = False,
    generator: torch.Generator | None = None,
) -> Bracket:
    """Lower and upper bound of KL(q ‖ p), q the aggregated posterior of the *population* of images.

    Held-out images are taken for independent draws of the population that the encoder has not
    seen. All fitting and all choosing is done on training images; the held-out images enter once,
    in the averages returned.

    Lower: mean over held-out x, z ~ q(z|x), of log r(z) − log p(z): unbiased for a lower bound,
    short of KL(q ‖ p) by KL(q ‖ r). Candidates for r are N(0, I), the moment-matched Gaussian,
    Gaussian mixtures, the smoothed training mixture and, on request, a neural spline flow, and
    last their stack Σ_k w_k r_k with weights fitted on validation images; the best mean over the
    validation images is taken.

    Upper: Jensen's inequality for any positive s(z, x), E_q log q <= E log s + log E[q(z)/s(z, x)],
    with s(z, x) = λ q(z|x) + 0.9 r(z) + 0.1 p(z). E[q/s] is an average over *pairs* of held-out
    images of ∫ q(z|x) q(z|x')/s(z, x) dz, of which there are M²: the ceiling of what M images can
    show is log(M²/30) and not log M, as it is for InfoNCE. Each pair is integrated with its two
    draws z ~ q(z|x) and z' ~ q(z|x') under the balance heuristic (Veach & Guibas 1995), so that a
    pair adds at most 2/λ, and λ = 30/M² keeps any one pair from mattering. InfoNCE, which is
    KL(q_M ‖ p) of the M held-out images' mixture (its mean over sets of M is above KL(q ‖ p)), is
    also returned, and is the upper end where it was the tighter of the two on validation images.

    Args:
        training: codes of the images the encoder was trained on.
        held_out: codes of images it was not.
        flow: also fit a normalizing flow (needs the optional extra ``flow``; about a minute).
        generator: source of randomness.

    Returns:
        Nats. std_error: over held-out images, one cluster an image. For the upper end by the
        projection on single images, with what one more pair of coinciding images would add. The
        projection counts the variance that is only in pairs twice (Efron & Stein 1981): 1 to 4%
        of the error where pairs are common. Where they are rare that is up to a factor √2, and
        kept on purpose: with the unbiased variance of the U-statistic (Hoeffding 1948) instead,
        ±2 s.e. covered 84 to 96% there, as a count of a few pairs is skewed.

    Undefined without held-out codes; the upper end also with a single held-out image.

    A wide bracket means "not identified by this data". The ends are bounds in expectation: within
    2 std_error, not beyond doubt. Prefer ``marginal_kl`` where n_curve is flat.

    References:
        Barber & Agakov (2003); Poole, Ozair, van den Oord, Alemi & Tucker (2019), On variational
        bounds of mutual information; Hoeffding (1948), A class of statistics with asymptotically
        normal distribution; Efron & Stein (1981), The jackknife estimate of variance.
    """
    if held_out is None:
        return missing_bracket(NO_HELD_OUT)
    choice = _choose(training, flow, generator)
    held_out = _some(held_out, HELD_OUT_IMAGES, generator)
    draws = max(1, min(_MOST_DRAWS, _DRAWS // held_out.n))
    points = [_points(held_out, generator) for _ in range(draws)]
    log_prior = torch.stack([_log_prior(z) for z in points], 1)
    log_r, rows = _evaluate(choice, points, log_prior)
    lower = Estimate(*_image_mean(log_r - log_prior), "nats")
    if flow and flow_missing():
        rows.append(Candidate("flow", None, None, None, 0.0, flow_missing()))
    settings: dict[str, Any] = {
        "fit_images": choice.fit_images,
        "validation_images": choice.validation.n if choice.validation else 0,
        "held_out_images": held_out.n,
        "draws_per_held_out_image": draws,
        "lower_candidate": choice.best.name,
        "flow": _flow_words(flow, choice.candidates),
    }
    if held_out.n < 2:
        missing = Estimate.missing("nats", "needs at least two held-out images, got one")
        return Bracket(lower, missing, missing, rows, settings)

    information = float(kl_per_image(training).mean()) - choice.validated.get(choice.best.name, 0.0)
    log_own = _own_weight(held_out.n, information)
    paired, infonce = _upper_bounds(held_out, points, log_r, log_prior, log_own)
    tighter = _pairs_are_tighter(choice, held_out.n, information, generator)
    settings["upper_bound"] = "pairs" if tighter else "InfoNCE"
    # What the bound could show at most, were no two images alike.
    settings["mutual_information_ceiling"] = -log_own if tighter else math.log(held_out.n)
    return Bracket(lower, paired if tighter else infonce, infonce, rows, settings)


@dataclass(frozen=True)
class _Choice:
    """The candidates, what validation images say of each, and the one to go with."""

    candidates: list[Density]
    best: Density
    validated: dict[str, float]
    fit_images: int
    validation: AggregatedPosterior | None


def _choose(
    training: AggregatedPosterior, flow: bool, generator: torch.Generator | None
) -> _Choice:
    """Fit the candidates, weigh them on validation images and choose; no held-out image here."""
    if training.n < _FEWEST_IMAGES:
        gaussian = _moment_matched(training)
        return _Choice([_prior(training), gaussian], gaussian, {}, training.n, None)
    count = min(VALIDATION_IMAGES, training.n // 6)
    order = _permutation(training.n, training, generator)
    validation = training.subset(order[:count])
    fitted = training.subset(order[count : count + FIT_IMAGES])
    candidates = _fit(fitted, generator, flow)
    z = _points(validation, generator)
    table = torch.stack([r.log_prob(z) - _log_prior(z) for r in candidates], 1)
    keep = (stack_weights(table) >= _SMALLEST_WEIGHT).nonzero()[:, 0]
    weight = stack_weights(table[:, keep])
    stack = Stack("stack", [candidates[i] for i in keep.tolist()], weight)
    candidates.append(stack)
    table = torch.cat([table, stack.combine(table[:, keep])[:, None]], 1)
    means = table.mean(0)
    validated = {r.name: float(mean) for r, mean in zip(candidates, means, strict=True)}
    return _Choice(candidates, candidates[int(means.argmax())], validated, fitted.n, validation)


def _evaluate(
    choice: _Choice, points: list[torch.Tensor], log_prior: torch.Tensor
) -> tuple[torch.Tensor, list[Candidate]]:
    """log r (M, L) of the chosen density on held-out draws, and the table of the candidates.

    Of the others only the parts of the stack and the Gaussian are evaluated, to save time.
    """
    stack = choice.candidates[-1] if isinstance(choice.candidates[-1], Stack) else None
    weights = {}
    if stack is not None:
        weights = dict(zip([r.name for r in stack.densities], stack.weight.tolist(), strict=True))
    found: dict[str, torch.Tensor] = {}
    rows = []
    for density in choice.candidates:
        name = density.name
        weight = weights.get(name, 0.0)
        if density is stack:
            parts = torch.stack([found[part] for part in weights], 2)
            found[name] = (parts + stack.weight.log()).logsumexp(2)
        elif weight or density is choice.best or name == "Gaussian":
            found[name] = torch.stack([density.log_prob(z) for z in points], 1)
        else:
            rows.append(Candidate(name, choice.validated.get(name), None, None, 0.0))
            continue
        value, std_error = _image_mean(found[name] - log_prior)
        rows.append(Candidate(name, choice.validated.get(name), value, std_error, weight))
    return found[choice.best.name], rows


def _points(posterior: AggregatedPosterior, generator: torch.Generator | None) -> torch.Tensor:
    """One z of every image, in float64: rounding to float32 could pass a narrow σ."""
    return draw(posterior.mean.double(), posterior.logvar.double(), generator)


def _flow_words(flow: bool, candidates: list[Density]) -> str:
    if any(r.name.startswith("flow") for r in candidates):
        return "tried"
    if not flow:
        return "not tried: not asked for"
    unsuited = f"needs {_FEWEST_IMAGES} images and 2 to {FLOW_DIMS} active dimensions"
    return f"not tried: {flow_missing() or unsuited}"


def _image_mean(draws: torch.Tensor) -> tuple[float, float | None]:
    """Mean of (M, L) draws and its standard error, clustered by image (row)."""
    images = draws.mean(1)
    if len(images) < 2:
        return float(images.mean()), None
    return float(images.mean()), float(images.std()) / math.sqrt(len(images))


def _log_prior(z: torch.Tensor) -> torch.Tensor:
    return -0.5 * (z.double().square().sum(1) + z.shape[1] * _LOG_2PI)


def _prior(posterior: AggregatedPosterior) -> Gaussian:
    zero = torch.zeros(posterior.latent_dim, dtype=torch.float64, device=posterior.device)
    return Gaussian("N(0, I)", zero, torch.eye(len(zero), dtype=zero.dtype, device=zero.device))


def _moment_matched(posterior: AggregatedPosterior) -> Gaussian:
    mean, covariance = posterior.moments()
    return Gaussian("Gaussian", mean.to(posterior.device), covariance.to(posterior.device))


def _permutation(
    count: int, posterior: AggregatedPosterior, generator: torch.Generator | None
) -> torch.Tensor:
    source = posterior.device if generator is None else generator.device
    return torch.randperm(count, generator=generator, device=source).to(posterior.device)


def _some(
    posterior: AggregatedPosterior, most: int, generator: torch.Generator | None
) -> AggregatedPosterior:
    """At most so many of the images, at random."""
    if posterior.n <= most:
        return posterior
    return posterior.subset(_permutation(posterior.n, posterior, generator)[:most])


def _fit(
    posterior: AggregatedPosterior, generator: torch.Generator | None, flow: bool
) -> list[Density]:
    """The candidates r, each fitted to these images alone."""
    candidates: list[Density] = [_prior(posterior), _moment_matched(posterior)]
    chart = Chart(posterior)
    if not chart.dims:
        return candidates
    mean, logvar = chart.codes(posterior)
    diagonal = chart.dims > FULL_MIXTURE_DIMS
    sizes = sorted({max(2, posterior.n // images) for images in (3000, 600)})
    largest = max(2, posterior.n // 150)
    for components in sizes:
        mixture = fit_gaussian_mixture(
            mean, logvar, components, diagonal=diagonal, generator=generator
        )
        candidates.append(Charted(mixture.name, chart, mixture))
    ensemble = fit_gaussian_mixtures(
        _ENSEMBLE, mean, logvar, largest, diagonal=diagonal, generator=generator
    )
    equal = torch.full((_ENSEMBLE,), 1 / _ENSEMBLE, dtype=torch.float64, device=mean.device)
    name = f"average of {_ENSEMBLE} fits of {ensemble[0].name}"
    candidates.append(Charted(name, chart, Stack(name, ensemble, equal)))
    for smoothing in _SMOOTHING:
        smoothed = SmoothedMixture(smoothing, ensemble[0], mean, logvar)
        candidates.append(Charted(smoothed.name, chart, smoothed))
    if flow and not flow_missing() and 1 < chart.dims <= FLOW_DIMS:
        fitted = fit_flow(ensemble[0], mean, logvar, generator=generator)
        candidates.append(Charted(fitted.name, chart, fitted))
    return candidates


class _Pairs:
    """log q(z_a|x_b) of many z, (S, M), float64, by the expanded square unless that would cancel.

    In centred coordinates: what cancels is the distance from the origin.
    """

    def __init__(self, posterior: AggregatedPosterior) -> None:
        self._origin = posterior.mean.double().mean(0)
        self._mean = posterior.mean.double() - self._origin
        logvar = posterior.logvar.double()
        self._precision = torch.exp(-logvar)
        square = (self._mean.square() * self._precision).sum(1)
        self._constant = -0.5 * (logvar.sum(1) + logvar.shape[1] * _LOG_2PI)
        self._keys: torch.Tensor | None = None
        if float(square.max()) < 1e11:  # 3 · 2⁻⁵³ of it is 4e-5 nats
            self._keys = torch.cat([-0.5 * self._precision, self._mean * self._precision], 1).T
            self._constant -= 0.5 * square

    def log_density(self, z: torch.Tensor) -> torch.Tensor:
        """Every z of (S, D) under every image."""
        centred = z.double() - self._origin
        if self._keys is not None:
            return torch.addmm(
                self._constant, torch.cat([centred.square(), centred], 1), self._keys
            )
        result = self._constant.expand(len(z), len(self._mean)).clone()
        for j in range(z.shape[1]):
            offset = centred[:, j, None] - self._mean[:, j]
            result -= 0.5 * offset.square() * self._precision[:, j]
        return result


def _upper_bounds(
    posterior: AggregatedPosterior,
    points: list[torch.Tensor],
    log_r: torch.Tensor,
    log_prior: torch.Tensor,
    log_own: float,
) -> tuple[Estimate, Estimate]:
    """The bound over pairs and InfoNCE, for log r and log p (M, L) at L draws z (M, D) an image.

    With u = q(z_a|x_a), v = q(z_a|x_b) and r' = 0.9 r + 0.1 p, all at z_a, draw a adds to the pair
    (a, b) u v/(u + v) · [1/(λu + r') + 1/(λv + r')]: the pair taken either way round. log_own is
    log λ.
    """
    count, draws = posterior.n, len(points)
    pairs, device = _Pairs(posterior), posterior.device
    log_base = torch.logaddexp(
        log_r + math.log(1 - _PRIOR_SHARE), log_prior + math.log(_PRIOR_SHARE)
    )
    log_s = torch.zeros(count, dtype=torch.float64, device=device)
    ratio = torch.zeros_like(log_s)  # an image's pairs, in both places
    twin = torch.zeros_like(log_s)  # what a second image with the same code would add
    infonce = torch.zeros_like(log_s)
    tile = _CPU_TILE if device.type == "cpu" else _GPU_TILE
    for draw_index, z in enumerate(points):
        for part in torch.arange(count, device=device).split(max(1, tile // count)):
            logits = pairs.log_density(z[part])  # (S, M)
            local = torch.arange(len(part), device=device)
            own = logits[local, part].clone()
            largest = logits.amax(1)
            # From here relative to the largest of a row, which float32 holds.
            density = logits.sub_(largest[:, None]).float().exp_()
            total = density.sum(1).double()
            infonce[part] += total.log() + largest - math.log(count) - log_prior[part, draw_index]
            infonce += ((1 / total).float() @ density).double()

            # r' below e^-60 of λ times the largest is raised to it: s is any positive function.
            base = torch.maximum(log_base[part, draw_index], largest + (log_own - 60))
            own_log_s = torch.logaddexp(own + log_own, base)
            log_s[part] += own_log_s
            twin[part] += torch.exp(own - own_log_s)
            v_scale = torch.exp(largest + log_own - base).float()[:, None]
            u = torch.exp(own + log_own - base).float()[:, None]  # λ u / r'
            v_over_u = torch.exp((largest - own).clamp_max(80)).float()[:, None]
            density[local, part] = 0.0
            pair = density * v_over_u
            pair += 1
            v = density.mul_(v_scale)  # λ v / r'
            torch.div(v, pair, out=pair)
            pair *= v.add_(1).reciprocal_().add_(1 / (1 + u))
            ratio[part] += pair.sum(1).double()
            ratio += pair.sum(0).double()
    ratio *= math.exp(-log_own) / (count - 1) / draws
    infonce = infonce / draws - 1
    bound = _pair_bound(log_s / draws - log_prior.mean(1), ratio, twin / draws)
    spread = math.hypot(float(infonce.std()) / math.sqrt(count), _ROUNDING)
    return bound, Estimate(float(infonce.mean()), spread, "nats")


def _pair_bound(log_s: torch.Tensor, ratio: torch.Tensor, twin: torch.Tensor) -> Estimate:
    """mean log s/p + log mean q/s, from what each image adds; ratio has every pair twice."""
    count = len(log_s)
    share = float(ratio.mean()) / 2
    if share <= 0:
        reason = "no two held-out images have codes that overlap; more images are needed"
        return Estimate.missing("nats", reason)
    # One more coinciding pair of images, unseen by chance, would add u/(λu + r') for the draw of
    # either to the mean of q/s: much where such pairs decide it (1/λ), nothing where r' does.
    unseen = 2 * float(twin.square().mean().sqrt()) / count**2 / share
    influence = log_s + ratio / share
    std_error = math.sqrt(float(influence.var()) / count + unseen**2 + _ROUNDING**2)
    # The log of a mean is biased by −½ of its relative variance.
    relative = float((ratio / share).var()) / count
    return Estimate(float(log_s.mean()) + math.log(share) + 0.5 * relative, std_error, "nats")


def _own_weight(count: int, information: float) -> float:
    """log λ: as large as costs 0.01 nats or so at this mutual information, or log 30/M²."""
    smallest = math.log(_PAIR_WEIGHT) - 2 * math.log(count)
    return min(0.0, max(smallest, math.log(_OWN_SHARE) - information))


def _pairs_are_tighter(
    choice: _Choice, count: int, information: float, generator: torch.Generator | None
) -> bool:
    """Whether the bound over pairs beats InfoNCE on as many validation images, 2 s.e. included."""
    if choice.validation is None:
        return False
    some = _some(choice.validation, count, generator)
    z = _points(some, generator)
    log_r, log_prior = choice.best.log_prob(z)[:, None], _log_prior(z)[:, None]
    paired, infonce = _upper_bounds(some, [z], log_r, log_prior, _own_weight(some.n, information))
    ends = [
        bound.value + 2 * bound.std_error
        for bound in (paired, infonce)
        if bound.value is not None and bound.std_error is not None
    ]
    return len(ends) == 2 and ends[0] < ends[1]
