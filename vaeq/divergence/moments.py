"""moment_kl = KL(N(m, C) ‖ N(0, I)), m and C the exact mean and covariance of q_N."""

from __future__ import annotations

import math

import torch

from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior


def gaussian_kl(mean: torch.Tensor, covariance: torch.Tensor) -> float:
    """KL(N(m, C) ‖ N(0, I)) = ½(|m|² + Σ_k (λ_k − 1 − log λ_k)), λ the eigenvalues of C, in nats.

    The sum over eigenvalues of λ − 1 − log λ has no cancellation near C = I, where
    tr C − D − log det C loses its digits: there λ − 1 is an eigenvalue of C − I, and a small λ one
    of C.

    Args:
        mean: m, shape (D,).
        covariance: C, shape (D, D), symmetric, positive definite.

    Returns:
        Nats; infinity where C is singular, or nearer to it than float64 resolves.
    """
    identity = torch.eye(len(mean), dtype=torch.float64, device=covariance.device)
    excess = torch.linalg.eigvalsh(covariance.double() - identity)
    values = torch.linalg.eigvalsh(covariance.double())  # in the same order
    resolved = len(values) * torch.finfo(torch.float64).eps * float(values[-1])
    if float(values[0]) <= resolved and not _diagonal(covariance):
        return math.inf
    near = excess.abs() < 0.5
    log_value = torch.where(near, torch.log1p(torch.where(near, excess, 0.0)), values.log())
    trace_and_log_det = (excess - log_value).sum()
    return 0.5 * float(mean.double().square().sum() + trace_and_log_det)


def _diagonal(covariance: torch.Tensor) -> bool:
    """Whether the eigenvalues are the entries, exact however small."""
    return not bool((covariance - torch.diag(covariance.diagonal())).any())


def moment_kl(posterior: AggregatedPosterior) -> Estimate:
    """KL(N(m, C) ‖ N(0, I)) with the exact moments of q_N: the share of the first two moments.

    Closed form, no sampling. Of all densities with the moments m and C the Gaussian is the closest
    to N(0, I), so this is a *lower* bound of KL(q_N ‖ p); the gap KL(q_N ‖ N(m, C)) is the shape
    that is not Gaussian: the holes. It is 0 for any mixture with mean 0 and covariance I.

    Args:
        posterior: N components in D dimensions.

    Returns:
        Nats, std_error 0. Missing where C = Cov(μ) + diag mean(σ²), which is positive definite,
        is singular as far as float64 can tell.

    Prefer ``marginal_kl`` where its sampling error and the log N ceiling do not matter.
    """
    value = gaussian_kl(*posterior.moments())
    if math.isinf(value):
        return Estimate.missing("nats", "the covariance of q_N is singular in float64")
    return Estimate(value, 0.0, "nats")
