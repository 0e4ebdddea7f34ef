"""The average KL taken apart: kl_per_image = MI + TC + Σ_j KL(q_N,j ‖ N(0, 1)).

1/N Σᵢ KL(q(z|xᵢ) ‖ p) = I(x; z) + KL(q_N ‖ p)               (Hoffman & Johnson 2016)
          KL(q_N ‖ p) = KL(q_N ‖ Π_j q_N,j) + Σ_j KL(q_N,j ‖ p_j)    (Chen et al. 2018)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from vaeq.divergence.marginals import marginals
from vaeq.divergence.moments import moment_kl
from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior

_LOG_2PI = math.log(2 * math.pi)
# Below this many draws five slopes cost more than they gain.
_REGRESSION_DRAWS = 20
# A control whose mean is so many times its spread is a constant that rounding has left.
_CONSTANT = 1e6


def kl_per_image(posterior: AggregatedPosterior) -> torch.Tensor:
    """KL(q(z|xᵢ) ‖ p) of every image in nats, closed form, shape (N,), float64 on the CPU."""
    return torch.cat(posterior.over_parts(_kl_per_image))


def _kl_per_image(part: AggregatedPosterior) -> torch.Tensor:
    # Each in its place: small results kept between the megabytes of every chunk leave gigabytes of
    # holes in the heap at a million codes of 512 dimensions.
    result = torch.empty(part.n, dtype=torch.float64)
    start = 0
    for mean, logvar in part.chunks():
        rows = slice(start, start := start + len(mean))
        result[rows] = (mean.square() + torch.expm1(logvar) - logvar).sum(1)
    return result.mul_(0.5)


def marginal_kl(
    posterior: AggregatedPosterior,
    n_samples: int = 10_000,
    generator: torch.Generator | None = None,
) -> Estimate:
    """KL(q_N ‖ p) = E_{z ~ q_N}[log q_N(z) − log p(z)], log q_N over all N components.

    S independent pairs (xᵢ, z) are drawn. Quantities of a pair whose mean under q_N is known in
    closed form are control variates c: ½|ε|², log det Σᵢ, ½|z|², KL(q(z|xᵢ) ‖ p) and the log
    density of N(m, C), with m and C the exact moments of q_N. The estimate is the intercept of the
    least-squares fit of log q_N(z) − log p(z) on c − E c. It holds both classical estimators as
    special cases: the direct mean (all slopes 0) and kl_per_image − mean(log q(z|x) − log q_N(z))
    (which is far better once q_N near a code is that code's own component), and is never worse
    than either by more than O(1/S). The bias of fitting the slopes is O(1/S), below the standard
    error, which is O(1/√S). Under 20 draws nothing is fitted and the second estimator is taken.

    Args:
        posterior: N components in D dimensions.
        n_samples: S >= 1.
        generator: source of randomness.

    Returns:
        Nats. std_error is the jackknife (HC3) error of the intercept: Monte Carlo error in (x, z)
        with the N codes held fixed, and the rounding of log q_N and log p, which is all there is
        where they differ by a constant. Pairs are independent, so repeated images need no
        clustering. None for S = 1.

    Always defined. Once mutual_information nears log N this is kl_per_image − log N and grows with
    N: prefer the population bracket then.

    References:
        Hoffman & Johnson (2016), ELBO surgery: yet another way to carve up the variational
        evidence lower bound. Owen (2013), Monte Carlo theory, methods and examples, section 8.9
        (control variates by regression). MacKinnon & White (1985), Some heteroskedasticity-
        consistent covariance matrix estimators with improved finite sample properties (HC3).
    """
    if n_samples < 1:
        raise InputError(f"n_samples must be >= 1, got {n_samples}.")
    z, index = posterior.sample(n_samples, generator)
    log_q = posterior.log_prob(z).to("cpu", torch.float64)
    log_q_conditional = posterior.log_prob_conditional(z, index).to("cpu", torch.float64)
    log_det = posterior.rows(index)[1].to("cpu", torch.float64).sum(1)
    z = z.to("cpu", torch.float64)
    index = index.cpu()
    dims = posterior.latent_dim

    image_kl = kl_per_image(posterior)
    mean_kl = image_kl.mean()
    centre, covariance = posterior.moments()
    half_square = 0.5 * z.square().sum(1)
    log_p = -half_square - 0.5 * dims * _LOG_2PI
    half_noise = -log_q_conditional - 0.5 * log_det - 0.5 * dims * _LOG_2PI
    columns = [
        log_q_conditional - log_p - mean_kl,
        half_noise - 0.5 * dims,
        half_square - 0.5 * (centre.square().sum() + covariance.trace()),
        image_kl[index] - mean_kl,
    ]
    factor, singular = torch.linalg.cholesky_ex(covariance)
    if not singular:
        whitened = torch.linalg.solve_triangular(factor, (z - centre).T, upper=False)
        columns.append(0.5 * whitened.square().sum(0) - 0.5 * dims)
    controls = torch.stack(columns, dim=1)
    response = log_q - log_p
    rounded = rounding(posterior.dtype, log_q, log_p)
    if n_samples >= _REGRESSION_DRAWS:
        fitted = intercept(response, controls)
        if fitted is not None:
            return Estimate(fitted[0], math.hypot(fitted[1], rounded), "nats")
    draws = response - controls[:, 0]
    if n_samples == 1:
        return Estimate(float(draws.mean()), None, "nats")
    error = float(draws.std()) / math.sqrt(n_samples)
    return Estimate(float(draws.mean()), math.hypot(error, rounded), "nats")


def rounding(dtype: torch.dtype, *log_densities: torch.Tensor) -> float:
    """How far the mean of sums of log densities, made in this arithmetic, can be trusted, in nats.

    The unit roundoff of their mean size: errors that differ from draw to draw average out, those
    that all draws share do not.
    """
    size = sum(float(values.abs().mean()) for values in log_densities)
    return 0.5 * torch.finfo(dtype).eps * max(1.0, size)


def intercept(response: torch.Tensor, controls: torch.Tensor) -> tuple[float, float] | None:
    """Intercept of least squares and its HC3 standard error, which holds where noise is uneven.

    A control that does not vary has no slope: kept, it would share the intercept. None where one
    draw alone decides a slope, so that leaving it out is undefined.
    """
    varies = controls.std(0) * _CONSTANT > controls.mean(0).abs()
    controls = controls[:, varies]
    # What is left is small where the response is a large number and a little noise.
    centre = response.mean()
    design = torch.cat([torch.ones(len(response), 1, dtype=torch.float64), controls], 1)
    # Controls may be collinear (equal variances, one image): the minimum-norm fit of the scaled
    # columns is well defined all the same.
    design = design / design.square().mean(0).sqrt()
    inverse = torch.linalg.pinv(design, rtol=1e-10)
    response = response - centre
    coefficients = inverse @ response
    freedom = 1 - (design * inverse.T).sum(1)
    if float(freedom.min()) < 1e-6:
        return None
    residual = (response - design @ coefficients) / freedom
    error = math.sqrt(float((inverse[0] * residual).square().sum()))
    return float(centre + coefficients[0]), error


def decompose(
    posterior: AggregatedPosterior,
    n_samples: int = 10_000,
    generator: torch.Generator | None = None,
    *,
    per_dimension: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Estimate]:
    """kl_per_image = mutual_information + marginal_kl, marginal_kl = TC + Σ_j dimension KL.

    kl_per_image is closed form and the dimension KLs are quadrature, so one Monte Carlo number,
    :func:`marginal_kl`, gives the rest by subtraction: both identities hold exactly in the numbers
    returned, and marginal_kl, mutual_information and total_correlation share one error. Nothing is
    clamped: an estimate of a small positive quantity may come out slightly negative.

    Args:
        posterior: N components in D dimensions.
        n_samples: S >= 1, draws for the Monte Carlo part.
        generator: source of randomness.
        per_dimension: the result of ``marginals(posterior)``, where it is at hand already.

    Returns:
        kl_per_image, mutual_information, marginal_kl, total_correlation, dimension_kl_sum, _mean,
        _max, _mean_active and moment_kl in nats (the means and the maximum per dimension),
        mutual_information_fraction as a share of log N, active_units in dimensions. std_error is
        Monte Carlo error in z, 0.0 for what is deterministic.

    mutual_information_fraction is undefined for N = 1 (log N = 0), dimension_kl_mean_active where
    no dimension is active, and the std_error of what is sampled for S = 1. Where kl_per_image is so
    large that float64 does not resolve a nat of it (above 2⁵³), what is left of it by subtraction,
    mutual_information and total_correlation, is missing.
    """
    if per_dimension is None:
        per_dimension = marginals(posterior)
    dimension_kl = list(per_dimension["kl"])
    active = list(per_dimension["active"])
    active_kl = [kl for kl, on in zip(dimension_kl, active, strict=True) if on]
    average = float(kl_per_image(posterior).mean())
    marginal = marginal_kl(posterior, n_samples, generator)
    assert marginal.value is not None
    error = marginal.std_error
    information = average - marginal.value
    dimension_sum = math.fsum(dimension_kl)
    ceiling = math.log(posterior.n)
    hidden = None
    if average > 2.0**53:
        hidden = f"kl_per_image is {average:.3g} nats, of which float64 does not resolve one"
    return {
        "kl_per_image": Estimate(average, 0.0, "nats"),
        "mutual_information": (
            Estimate.missing("nats", hidden) if hidden else Estimate(information, error, "nats")
        ),
        "mutual_information_fraction": (
            Estimate.missing("1", hidden or "log N is 0 for a single image")
            if hidden or posterior.n == 1
            else Estimate(information / ceiling, None if error is None else error / ceiling, "1")
        ),
        "marginal_kl": marginal,
        "total_correlation": (
            Estimate.missing("nats", hidden)
            if hidden
            else Estimate(marginal.value - dimension_sum, error, "nats")
        ),
        "dimension_kl_sum": Estimate(dimension_sum, 0.0, "nats"),
        "dimension_kl_mean": Estimate(dimension_sum / len(dimension_kl), 0.0, "nats/dimension"),
        "dimension_kl_max": Estimate(max(dimension_kl), 0.0, "nats/dimension"),
        "dimension_kl_mean_active": (
            Estimate(math.fsum(active_kl) / len(active_kl), 0.0, "nats/dimension")
            if active_kl
            else Estimate.missing("nats/dimension", "no dimension is active")
        ),
        "active_units": Estimate(float(sum(active)), 0.0, "dimensions"),
        "moment_kl": moment_kl(posterior),
    }
