"""log p(x) of held-out images: importance sampling, and annealed importance sampling to check it.

log p(x) = log E_{z~q(z|x)} [p(x|z) p(z) / q(z|x)]   (Burda, Grosse and Salakhutdinov 2016, eq. 8)

Sampling from q(z|x) fails silently where q misses what the posterior holds. Annealing (Neal 2001;
Wu, Burda, Salakhutdinov and Grosse 2017) moves its draws there and says how much was missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.lockstep import stacked

_LOG_2PI = math.log(2 * math.pi)
# Pixels decoded at a time: 8 MiB of logits stay near the caches, and memory does not grow with K.
_TILE = 1 << 21
# Numbers z_ikj held at a time.
_CODES = 1 << 20
# Acceptance that the step size of the preliminary run is steered to (Neal 2011, section 4.2).
_ACCEPTANCE = 0.7
# The sigmoid of the schedule spans ± this (Wu et al. 2017, section 2.3).
_SIGMOID = 4.0

Decode = Callable[[Tensor], Tensor]
Observation = Callable[[Tensor, Tensor], Tensor]
LogDensity = Callable[[Tensor], Tensor]


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x|z) = Σ_j x_j l_j − log(1 + e^{l_j}), (B, K), of l (B, K, pixels) and x (B, pixels).

    The same number as :func:`vaeq.models.elbo.reconstruction`, by the same formula, for many z of
    one image, without a copy of the image for each.
    """
    size = logits.abs()
    log_likely = torch.sigmoid(size).log2() * math.log(2) - 0.5 * (size + logits)
    return (logits @ x[:, :, None])[:, :, 0] + log_likely.sum(2)


@torch.no_grad()
def log_likelihood(
    decode: Decode,
    mean: Tensor,
    logvar: Tensor,
    images: Tensor,
    generator: torch.Generator,
    *,
    n_importance: int = 200,
    log_prior: LogDensity | None = None,
    observation: Observation = bernoulli,
) -> dict[str, Estimate]:
    """Mean log p(x) over images the model was not trained on, by importance sampling from q(z|x).

        log p(x) ≥ E log 1/K Σ_k w_k,  w_k = p(x|z_k) p(z_k) / q(z_k|x),  z_k ~ q(z|x)

    Each image's term is biased downward, by about ½ Var(w)/(K E[w]²), and rises to log p(x) with K
    (Burda et al. 2016, theorem 1). The bias is the larger, and the error bar the less to be relied
    on, the smaller ``importance_ess``; :func:`ais_check` measures what is left.

    Args:
        decode: codes (B, D) → parameters of p(x|z), for ``bernoulli`` the logits (B, pixels).
        mean, logvar: (M, D), the posteriors of the images.
        images: (M, pixels), uint8, or floating point as ``observation`` takes them.
        generator: on the CPU, or on the device of the codes.
        n_importance: K >= 2, draws of z an image.
        log_prior: log r(z) of codes (S, D), normalized, in nats (S,): another prior for the same
            decoder, fitted without these images. Adds ``prior_cost``.
        observation: log p(x|z) of decoded (B, K, pixels) and x (B, pixels), shape (B, K).

    Returns:
        In nats per image, each with the error of the importance draws, clustered by image; it does
        not cover the choice of the M images, nor the seed of the training.

        ``log_likelihood``.
        ``inference_gap``: log_likelihood − elbo = E KL(q(z|x) ‖ p(z|x)), both from the same draws:
        log mean w − mean log w, at least 0 for every image. Biased downward like log_likelihood.
        ``importance_ess``: mean over images of (Σ w)²/Σ w², of K; unit "1", without error.
        With ``log_prior``: ``prior_cost``, mean of log p_r(x) − log p(x) from the same draws, with
        p_r(x) = ∫ p(x|z) r(z) dz; positive where N(0, I) costs so much against r; and
        ``log_likelihood_ex_post``, mean of log p_r(x).

    Undefined (missing, with the reason) where a weight is not finite.
    """
    (found,) = log_likelihood_together(
        lambda z: decode(z[0])[None],
        [mean],
        [logvar],
        images,
        [generator],
        n_importance=n_importance,
        log_priors=[log_prior],
        observation=observation,
    )
    return found


@torch.no_grad()
def log_likelihood_together(
    decode: Decode,
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    images: Tensor,
    generators: Sequence[torch.Generator],
    *,
    n_importance: int = 200,
    log_priors: Sequence[LogDensity | None],
    observation: Observation = bernoulli,
) -> list[dict[str, Estimate]]:
    """:func:`log_likelihood` of E models for the same images as one program, model by model.

    Args:
        decode: codes (E, B, D) → parameters of p(x|z), (E, B, pixels), D the largest latent
            dimension; the codes of a model of fewer are followed by zeros.
        means, logvars: (M, D_e) a model.
        generators: one a model; the draws of each are those it has alone.
        others: as for :func:`log_likelihood`.
    """
    if n_importance < 2:
        raise InputError(f"n_importance must be >= 2, got {n_importance}.")
    for mean in means:
        if len(images) < 1 or len(images) != len(mean):
            raise InputError(
                f"images and codes must be equally many, got {len(images)} and {len(mean)}."
            )
    found = [_Sums() for _ in means]
    for block in _log_weights(
        decode, means, logvars, images, generators, n_importance, log_priors, observation
    ):
        for sums, (log_w, log_r) in zip(found, block, strict=True):
            sums.take(log_w, log_r)
    return [sums.estimates(len(images)) for sums in found]


class _Sums:
    """Sums over images of values, and of the variances that their K draws leave them."""

    def __init__(self) -> None:
        self.total: dict[str, tuple[float, float]] = {}
        self.ess = 0.0

    def take(self, log_w: Tensor, log_r: Tensor | None) -> None:
        """The weights (b, K) of some images, under N(0, I) and under r."""
        level, share = _log_mean(log_w)
        self.add("log_likelihood", level, share)
        self.add("inference_gap", level - log_w.mean(1), share - log_w)
        self.ess += float((log_w.shape[1] / share.square().mean(1)).sum())
        if log_r is not None:
            level_r, share_r = _log_mean(log_r)
            self.add("prior_cost", level_r - level, share_r - share)
            self.add("log_likelihood_ex_post", level_r, share_r)

    def add(self, name: str, value: Tensor, influence: Tensor) -> None:
        """Values (b,), and what each draw adds to them to first order, (b, K)."""
        variance = influence.var(1) / influence.shape[1]
        before = self.total.get(name, (0.0, 0.0))
        self.total[name] = (before[0] + float(value.sum()), before[1] + float(variance.sum()))

    def estimates(self, images: int) -> dict[str, Estimate]:
        result = {
            name: _estimate(value / images, math.sqrt(variance) / images)
            for name, (value, variance) in self.total.items()
        }
        ess = _estimate(self.ess / images, None)
        return result | {"importance_ess": Estimate(ess.value, None, "1", ess.reason)}


def _estimate(value: float, std_error: float | None) -> Estimate:
    if not math.isfinite(value) or not math.isfinite(std_error or 0.0):
        return Estimate.missing("nats", "an importance weight is not finite")
    return Estimate(value, std_error, "nats")


def _log_mean(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """log 1/K Σ_k w_k of rows (b, K), and w_k over that mean."""
    level = log_w.logsumexp(1) - math.log(log_w.shape[1])
    return level, torch.exp(log_w - level[:, None])


def _log_weights(
    decode: Decode,
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    images: Tensor,
    generators: Sequence[torch.Generator],
    draws: int,
    log_priors: Sequence[LogDensity | None],
    observation: Observation,
) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """log w under N(0, I), and under r, of some images at a time: (b, K) float64 a model."""
    dims = [mean.shape[1] for mean in means]
    block = max(1, _CODES // (draws * sum(dims)))
    rows = max(1, _TILE // (images.shape[1] * len(means)))
    for start in range(0, len(images), block):
        part = slice(start, start + block)
        own = [(mean[part], logvar[part]) for mean, logvar in zip(means, logvars, strict=True)]
        noise = [_noise(m, draws, source) for (m, _), source in zip(own, generators, strict=True)]
        z = [
            m[:, None] + torch.exp(0.5 * s)[:, None] * e
            for (m, s), e in zip(own, noise, strict=True)
        ]
        log_px = _log_px(decode, stacked(z), _unit(images[part]), rows, observation)
        result: list[tuple[Tensor, Tensor | None]] = []
        for (_, s), e, codes, log_x, log_prior in zip(
            own, noise, z, log_px, log_priors, strict=True
        ):
            log_q = -0.5 * (e.double().square() + s[:, None].double() + _LOG_2PI).sum(2)
            log_p = -0.5 * (codes.double().square() + _LOG_2PI).sum(2)
            log_r = None
            if log_prior is not None:
                log_r = log_prior(codes.flatten(0, 1)).double().view(log_q.shape) + log_x - log_q
            result.append((log_x + log_p - log_q, log_r))
        yield result


def _noise(mean: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Standard normal (b, K, D), drawn image by image: how many stand in a block changes none."""
    shape = draws, mean.shape[1]
    rows = [
        torch.randn(shape, generator=generator, device=generator.device, dtype=mean.dtype)
        for _ in mean
    ]
    return torch.stack(rows).to(mean.device)


def _log_px(decode: Decode, z: Tensor, x: Tensor, rows: int, observation: Observation) -> Tensor:
    """log p(x_b|z_ebk), float64 (E, b, K), so many rows of z (E, b, K, D) a model at a time."""
    draws = z.shape[2]
    if draws >= rows:
        parts = [
            torch.cat([_decoded(decode, row, x_row, observation)
                       for row in z_image.split(rows, 2)], 2)
            for z_image, x_row in zip(z.split(1, 1), x.split(1), strict=True)
        ]  # fmt: skip
    else:
        step = rows // draws
        parts = [
            _decoded(decode, z_part, x_part, observation)
            for z_part, x_part in zip(z.split(step, 1), x.split(step), strict=True)
        ]
    return torch.cat(parts, 1)


def _decoded(decode: Decode, z: Tensor, x: Tensor, observation: Observation) -> Tensor:
    models, images, draws = z.shape[:3]
    logits = decode(z.flatten(1, 2)).view(models * images, draws, -1)
    return observation(logits, x.repeat(models, 1)).double().view(models, images, draws)


def _unit(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class AnnealedLikelihood:
    """log p̂(x) of M images by annealing, and how the chains did."""

    log_px: Tensor  # (M,) float64, nats
    variance: Tensor  # (M,) of log_px, over the chains
    acceptance: float
    step_size: Tensor  # (M,) at the end, in standard deviations of the start


@torch.no_grad()
def ais_log_likelihood(
    decode: Decode,
    mean: Tensor,
    logvar: Tensor,
    images: Tensor,
    generator: torch.Generator,
    *,
    n_chains: int = 8,
    n_steps: int = 100,
    leapfrog: int = 5,
    observation: Observation = bernoulli,
) -> AnnealedLikelihood:
    """log p(x) of each image by annealed importance sampling with Hamiltonian transitions.

        f_β(z) = s(z)^{1−β} [p(x|z) p(z)]^β,   log w = Σ_t (β_t − β_{t−1}) log f_1(z_t)/s(z_t)

    The chain starts at an exact draw of s = N(mean, diag exp(logvar)), takes one Hamiltonian
    transition at each β_t, and E[w] = p(x) for any number of steps (Neal 2001, section 2), so that
    log 1/C Σ_c w_c is a stochastic lower bound: below log p(x) in the mean, and above it by b nats
    with a probability under e^{−b}.

    Start at s = q(z|x): the closer to p(z|x), the less there is to anneal, and with no steps at all
    it is importance sampling with K = C. mean = logvar = 0 starts at the prior as Wu et al. do: it
    takes ten times the steps for the same variance (MNIST, D = 2), but owes nothing to the encoder,
    whose q(z|x) may have missed a mode that few of its chains then reach. Momenta have
    unit mass in units of s, and each image its own step size as a function of β. It is set on a
    preliminary run of its own, a fifth as long, and fixed after that: adapting a step to the chain
    that takes it would bias w.

    Args:
        decode, images, observation: as for :func:`log_likelihood`; decode must be differentiable.
        mean, logvar: (M, D), the start.
        n_chains: C >= 2.
        n_steps: T >= 1, intermediate distributions on a sigmoidal schedule (Wu et al. 2017).
        leapfrog: gradient evaluations a transition.

    Returns:
        :class:`AnnealedLikelihood`; its variance is that of the log of the mean over chains, to
        first order.
    """
    (found,) = ais_log_likelihood_together(
        lambda z: decode(z[0])[None],
        [mean],
        [logvar],
        images,
        [generator],
        n_chains=n_chains,
        n_steps=n_steps,
        leapfrog=leapfrog,
        observation=observation,
    )
    return found


@torch.no_grad()
def ais_log_likelihood_together(
    decode: Decode,
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    images: Tensor,
    generators: Sequence[torch.Generator],
    *,
    n_chains: int = 8,
    n_steps: int = 100,
    leapfrog: int = 5,
    observation: Observation = bernoulli,
) -> list[AnnealedLikelihood]:
    """:func:`ais_log_likelihood` of E models for the same images as one program, model by model.

    Args:
        decode: codes (E, B, D) → parameters of p(x|z), (E, B, pixels), differentiable, D the
            largest latent dimension; the codes of a model of fewer are followed by zeros.
        means, logvars: (M, D_e) a model.
        generators: one a model; the draws of each are those it has alone.
        others: as for :func:`ais_log_likelihood`.
    """
    if n_chains < 2 or n_steps < 1 or leapfrog < 1:
        raise InputError(
            "n_chains must be >= 2, n_steps and leapfrog >= 1, "
            f"got {n_chains}, {n_steps} and {leapfrog}."
        )
    # As many as a model takes alone: what it draws hangs on it.
    block = max(1, 2 * _TILE // (images.shape[1] * n_chains))
    betas, short = _schedule(n_steps), _schedule(max(2, n_steps // 5))
    parts = []
    for start in range(0, len(images), block):
        part = slice(start, start + block)
        x = _unit(images[part])
        target = _Annealed(
            decode, [m[part] for m in means], [s[part] for s in logvars], x, observation
        )
        chains = _Chains(target, generators, n_chains, leapfrog)
        adapted = chains.run(short, target.first_steps(len(short) - 1), adapt=True).steps
        # What was found at β' serves the β near it.
        place = torch.bucketize(betas[1:], short[1:]).clamp_max(len(adapted) - 1)
        parts.append(chains.run(betas, adapted[place.to(adapted.device)]))
    log_w = torch.cat([part.log_w for part in parts], 1)
    level, share = _log_mean(log_w.flatten(0, 1))
    variance = share.var(1) / n_chains
    acceptance = torch.cat([part.acceptance for part in parts], 1).mean(1).tolist()
    step_size = torch.cat([part.steps[-1] for part in parts], 1)
    return [
        AnnealedLikelihood(*each)
        for each in zip(
            level.view(log_w.shape[:2]),
            variance.view(log_w.shape[:2]),
            acceptance,
            step_size,
            strict=True,
        )
    ]


def _schedule(steps: int) -> Tensor:
    """β_0 = 0 to β_T = 1, slow at both ends."""
    raw = torch.sigmoid(torch.linspace(-_SIGMOID, _SIGMOID, steps + 1, dtype=torch.float64))
    return (raw - raw[0]) / (raw[-1] - raw[0])


class _Annealed:
    """log f_1(z)/s(z) in the coordinates e of z = m + σ e, with its gradient, of E models.

    A model of fewer dimensions is padded: there z = e, and where e is 0 it stays 0.
    """

    def __init__(
        self,
        decode: Decode,
        means: Sequence[Tensor],
        logvars: Sequence[Tensor],
        x: Tensor,
        observation: Observation,
    ) -> None:
        self._decode, self._observation = decode, observation
        self.dims = [mean.shape[1] for mean in means]
        mean, logvar = (stacked(parts) for parts in (means, logvars))
        self.mean, self.std = mean[:, :, None], torch.exp(0.5 * logvar)[:, :, None]
        self._log_det = 0.5 * logvar.double().sum(2)[..., None]
        self._x = x

    def first_steps(self, count: int) -> Tensor:
        """A step size to begin with, (count, E, b), in standard deviations of the start."""
        own = torch.tensor([0.5 * dims**-0.25 for dims in self.dims], device=self.mean.device)
        return own[None, :, None].repeat(count, 1, self.mean.shape[1])

    def log_ratio(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x|z) + log p(z) − log s(z), (E, b, C) float64, and its gradient (E, b, C, D)."""
        with torch.enable_grad():
            e = e.detach().requires_grad_()
            z = self.mean + self.std * e
            log_px = _decoded(self._decode, z, self._x, self._observation)
            # log p − log s: the constants cancel.
            value = log_px + 0.5 * (e.double().square() - z.double().square()).sum(3)
            (gradient,) = torch.autograd.grad(value.sum(), e)
        return value.detach() + self._log_det, gradient


@dataclass(frozen=True)
class _Run:
    """The chains of E models at b images, C each."""

    log_w: Tensor  # (E, b, C)
    acceptance: Tensor  # (E, b)
    steps: Tensor  # (T, E, b), used or found


class _Chains:
    """Annealed chains with Hamiltonian transitions, C an image, each model with its own draws."""

    def __init__(
        self,
        target: _Annealed,
        generators: Sequence[torch.Generator],
        chains: int,
        leapfrog: int,
    ) -> None:
        self._target, self._generators = target, generators
        self._shape = target.mean.shape[1], chains
        self._leapfrog = leapfrog

    def _normal(self) -> Tensor:
        like = self._target.mean
        noise = [
            torch.randn((*self._shape, dims), generator=g, device=g.device, dtype=like.dtype)
            for dims, g in zip(self._target.dims, self._generators, strict=True)
        ]
        return stacked(noise).to(like.device)

    def _uniform(self) -> Tensor:
        parts = [torch.rand(self._shape, generator=g, device=g.device) for g in self._generators]
        return torch.stack(parts).to(self._target.mean.device)

    def run(self, betas: Tensor, steps: Tensor, *, adapt: bool = False) -> _Run:
        """From draws of s along the betas, with these step sizes (T, E, b), or adapting them."""
        e = self._normal()
        ratio, slope = self._target.log_ratio(e)
        log_w = torch.zeros_like(ratio)
        used, accepted = steps.clone(), torch.zeros_like(ratio[..., 0])
        size = steps[0].clone()
        for t, beta in enumerate(betas[1:].tolist()):
            log_w += (beta - float(betas[t])) * ratio
            if not adapt:
                size = steps[t]
            step = size.to(e.dtype)[..., None, None]
            momentum = self._normal()
            energy = 0.5 * (e.double().square() + momentum.double().square()).sum(3) - beta * ratio
            # Leapfrog on U(e) = ½ e² − β log f_1/s.
            new, new_ratio, new_slope, p = e, ratio, slope, momentum
            for _ in range(self._leapfrog):
                p = p - 0.5 * step * (new - beta * new_slope)
                new = new + step * p
                new_ratio, new_slope = self._target.log_ratio(new)
                p = p - 0.5 * step * (new - beta * new_slope)
            kinetic = 0.5 * (new.double().square() + p.double().square()).sum(3)
            new_energy = kinetic - beta * new_ratio
            # A step that overflowed is a step refused.
            probability = torch.exp((energy - new_energy).clamp_max(0)).nan_to_num(0.0)
            accept = self._uniform() < probability
            e = torch.where(accept[..., None], new, e)
            slope = torch.where(accept[..., None], new_slope, slope)
            ratio = torch.where(accept, new_ratio, ratio)
            mean_probability = probability.mean(2)
            accepted += mean_probability
            if adapt:
                # Large moves at first: the start is a guess.
                gain = 1.0 if t < 5 else 0.4
                size = size * torch.exp(gain * (mean_probability - _ACCEPTANCE)).to(size.dtype)
                used[t] = size
        return _Run(log_w, accepted / len(steps), used)


def ais_check(
    decode: Decode,
    mean: Tensor,
    logvar: Tensor,
    images: Tensor,
    generator: torch.Generator,
    *,
    n_images: int = 100,
    n_importance: int = 5000,
    n_chains: int = 8,
    n_steps: int = 100,
    leapfrog: int = 5,
    observation: Observation = bernoulli,
) -> dict[str, Estimate]:
    """How much importance sampling with K draws misses, on few enough images to anneal.

    Args:
        n_images: the first so many of the images, at most.
        n_importance: K of the importance sampling.
        others: as for :func:`ais_log_likelihood`, started at q(z|x).

    Returns:
        In nats per image, over the same images: ``ais_log_likelihood`` and
        ``importance_log_likelihood``, with the error of their own draws alone, and ``ais_gap``,
        their mean difference with its paired standard error over the images. Both are lower bounds
        in the mean: above 0 by 2 s.e. means that importance sampling fell short by so much, below
        that annealing did.
    """
    (found,) = ais_check_together(
        lambda z: decode(z[0])[None], [mean], [logvar], images, [generator],
        n_images=n_images, n_importance=n_importance, n_chains=n_chains, n_steps=n_steps,
        leapfrog=leapfrog, observation=observation,
    )  # fmt: skip
    return found


def ais_check_together(
    decode: Decode,
    means: Sequence[Tensor],
    logvars: Sequence[Tensor],
    images: Tensor,
    generators: Sequence[torch.Generator],
    *,
    n_images: int = 100,
    n_importance: int = 5000,
    n_chains: int = 8,
    n_steps: int = 100,
    leapfrog: int = 5,
    observation: Observation = bernoulli,
) -> list[dict[str, Estimate]]:
    """:func:`ais_check` of E models for the same images as one program, model by model.

    Args:
        all: as for :func:`ais_log_likelihood_together` and :func:`ais_check`.
    """
    part = slice(min(n_images, len(images)))
    means, logvars = [mean[part] for mean in means], [logvar[part] for logvar in logvars]
    annealed = ais_log_likelihood_together(
        decode, means, logvars, images[part], generators,
        n_chains=n_chains, n_steps=n_steps, leapfrog=leapfrog, observation=observation,
    )  # fmt: skip
    sampled: list[list[tuple[Tensor, Tensor]]] = [[] for _ in means]
    with torch.no_grad():
        for block in _log_weights(
            decode, means, logvars, images[part], generators, n_importance,
            [None] * len(means), observation,
        ):  # fmt: skip
            for own, (log_w, _) in zip(sampled, block, strict=True):
                own.append(_log_mean(log_w))
    return [_gap(own, sums) for own, sums in zip(annealed, sampled, strict=True)]


def _gap(
    annealed: AnnealedLikelihood, sampled: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Estimate]:
    """What annealing found and sampling missed, from levels (b,) and shares (b, K) by block."""
    level = torch.cat([level for level, _ in sampled])
    variance = torch.cat([share.var(1) / share.shape[1] for _, share in sampled])
    count = len(level)
    gap = annealed.log_px - level
    spread = float(gap.std()) / math.sqrt(count) if count > 1 else None
    return {
        "ais_log_likelihood": _estimate(
            float(annealed.log_px.mean()), math.sqrt(float(annealed.variance.sum())) / count
        ),
        "importance_log_likelihood": _estimate(
            float(level.mean()), math.sqrt(float(variance.sum())) / count
        ),
        "ais_gap": _estimate(float(gap.mean()), spread),
    }
