"""reverse_marginal_kl = KL(p ‖ q_N), which sees holes, and how many images it rests on."""

from __future__ import annotations

import math

import torch

from vaeq.divergence.decomposition import intercept, rounding
from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior

_LOG_2PI = math.log(2 * math.pi)
# Precisions of at most e^40 in the extra coordinates of the squared mixture, for float32.
_LARGEST_LOG_WEIGHT = 40.0
# Below this many draws seven coefficients cost more than they gain.
_REGRESSION_DRAWS = 100
# Beyond this log q_N the shares of the components need float64, and beyond the second it has none
# left for them either: 2 log q_N is off by 1e-3 nats.
_SINGLE_RESOLVES, _DOUBLE_RESOLVES = 5e3, 4e12
# Components copied at once.
_BLOCK = 1 << 17


def reverse_marginal_kl(
    posterior: AggregatedPosterior,
    n_samples: int = 10_000,
    generator: torch.Generator | None = None,
) -> dict[str, Estimate]:
    """KL(p ‖ q_N) = E_{z ~ N(0, I)}[log p(z) − log q_N(z)], log q_N over all N components.

    S independent draws of the prior. log q_N falls off like polynomials of z, which makes the plain
    mean noisy and, its tail being longer than S draws show, its error too small. Polynomials whose
    mean under N(0, I) is known are control variates: Σz_j, Σz_j³, Σz_j⁴, |z|², |z|⁴ and
    (z − m)ᵀ C⁻¹ (z − m), m and C the moments of q_N. The estimate is the intercept of the
    least-squares fit on them, with bias O(1/S); under 100 draws it is the plain mean, unbiased. A
    draw between the codes is explained by the tail of the nearest one, so with few images it
    measures how far apart they lie, and not a hole in the population. The effective number of
    components behind a draw tells: with responsibilities ρᵢ(z) = q(z|xᵢ)/(N q_N(z)), it is
    1/Σᵢ ρᵢ², from 1 (one image explains the draw) to N.

    Args:
        posterior: N components in D dimensions.
        n_samples: S >= 1.
        generator: source of randomness.

    Returns:
        reverse_marginal_kl in nats, and reverse_marginal_kl_ess, the mean effective number, in
        components. std_error: Monte Carlo error in z, HC3 of the intercept, and the rounding of
        log q_N; None for S = 1.

    The KL is always defined: q_N is positive everywhere. Its ess is not where the codes are so
    narrow that log q_N of a draw is below −4e12, of which float64 resolves no shares. Where it is
    near 1, do not read the KL as a statement about the population; prefer the population bracket.

    References:
        Owen (2013), Monte Carlo theory, methods and examples, section 8.9 (control variates by
        regression); Kish (1965) for the effective number.
    """
    if n_samples < 1:
        raise InputError(f"n_samples must be >= 1, got {n_samples}.")
    source = posterior.device if generator is None else generator.device
    shape = (n_samples, posterior.latent_dim)
    z = torch.randn(shape, generator=generator, device=source, dtype=posterior.dtype)
    z = z.to(posterior.device)
    log_q = posterior.log_prob(z).double()
    log_p = -0.5 * (z.double().square().sum(1) + posterior.latent_dim * _LOG_2PI)
    rounded = rounding(posterior.dtype, log_q, log_p)
    return {
        "reverse_marginal_kl": _regressed(
            posterior, z.to("cpu", torch.float64), log_p - log_q, rounded
        ),
        "reverse_marginal_kl_ess": _effective_components(posterior, z, log_q),
    }


def _effective_components(
    posterior: AggregatedPosterior, z: torch.Tensor, log_q: torch.Tensor
) -> Estimate:
    """The mean of exp(2 log Σᵢ q(z|xᵢ) − log Σᵢ q(z|xᵢ)²) over draws of N(0, I)."""
    largest = float(log_q.abs().max())
    single = posterior.dtype == torch.float32
    # Codes in shards stay what they are.
    widened = single and largest > _SINGLE_RESOLVES and type(posterior) is AggregatedPosterior
    if largest > (_SINGLE_RESOLVES if single and not widened else _DOUBLE_RESOLVES):
        kind = "float32" if single and not widened else "float64"
        reason = f"log q_N is down to {-largest:.3g}, of which {kind} resolves no shares"
        return Estimate.missing("components", reason)
    if widened:
        posterior = AggregatedPosterior(posterior.mean.double(), posterior.logvar.double())
        z = z.double()
        log_q = posterior.log_prob(z)
    log_squares = torch.logsumexp(torch.stack(posterior.over_parts(_log_sum_of_squares, z)), 0)
    effective = torch.exp(2 * (log_q + math.log(posterior.n)) - log_squares)
    rounded = 2 * rounding(posterior.dtype, log_q, log_squares) * float(effective.mean())
    return _mean(effective, "components", rounded)


def _regressed(
    posterior: AggregatedPosterior, z: torch.Tensor, log_ratio: torch.Tensor, rounded: float
) -> Estimate:
    """The mean of log p/q_N at draws z of N(0, I), by its regression on polynomials of z."""
    if len(z) < _REGRESSION_DRAWS:
        return _mean(log_ratio, "nats", rounded)
    dims, square = z.shape[1], z.square().sum(1)
    columns = [
        z.sum(1),
        z.pow(3).sum(1),
        z.pow(4).sum(1) - 3 * dims,
        square - dims,
        square.square() - dims * (dims + 2),
    ]
    centre, covariance = posterior.moments()
    factor, singular = torch.linalg.cholesky_ex(covariance)
    if not singular:
        eye = torch.eye(dims, dtype=torch.float64)
        root = torch.linalg.solve_triangular(factor, eye, upper=False)  # C⁻¹ = rootᵀ root
        whitened = ((z - centre) @ root.T).square().sum(1)
        columns.append(whitened - root.square().sum() - (root @ centre).square().sum())
    fitted = intercept(log_ratio.cpu(), torch.stack(columns, 1))
    if fitted is None:
        return _mean(log_ratio, "nats", rounded)
    return Estimate(fitted[0], math.hypot(fitted[1], rounded), "nats")


def _log_sum_of_squares(posterior: AggregatedPosterior, z: torch.Tensor) -> torch.Tensor:
    """log Σᵢ q(z|xᵢ)², (S,), float64, by the same exact kernel as log q_N.

    N(z; μ, σ²)² = N(z; μ, σ²/2)/√(4πσ²): a mixture of narrower components with unequal weights
    wᵢ = Π_j (4πσᵢⱼ²)^-½. A weight is the density at 0 of one more coordinate with mean 0 and
    variance 1/wᵢ² (up to a constant), or of several that share it.
    """
    log_det = torch.cat([logvar.sum(1) for _, logvar in posterior.chunks()])
    offset = log_det.mean()
    spread = log_det - offset
    extra = max(1, math.ceil(float(spread.abs().max()) / _LARGEST_LOG_WEIGHT))
    spread = (spread / extra).to(posterior.device, posterior.dtype)
    at_zero = torch.cat([z, z.new_zeros(len(z), extra)], 1)
    total = torch.full((len(z),), -math.inf, dtype=torch.float64, device=z.device)
    for part in torch.arange(posterior.n, device=z.device).split(_BLOCK):
        shared = spread[part, None].expand(-1, extra)
        squared = AggregatedPosterior(
            torch.cat([posterior.mean[part], torch.zeros_like(shared)], 1),
            torch.cat([posterior.logvar[part] - math.log(2), shared], 1),
        )
        found = squared.log_prob(at_zero).double() + math.log(len(part))
        total = torch.logaddexp(total, found)
    constant = 0.5 * extra * _LOG_2PI - 0.5 * posterior.latent_dim * math.log(4 * math.pi)
    return total + constant - 0.5 * float(offset)


def _mean(draws: torch.Tensor, unit: str, rounded: float) -> Estimate:
    if len(draws) == 1:
        return Estimate(float(draws), None, unit)
    std_error = math.hypot(float(draws.std()) / math.sqrt(len(draws)), rounded)
    return Estimate(float(draws.mean()), std_error, unit)
