"""Two-sample distances of z ~ q_N from N(0, I), each beside what it is between two N(0, I) samples.

Sliced Wasserstein and kernel distances shrink with the dimension, and all are positive for equal
distributions at finite n. Without their null they would call any high-dimensional code normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior

N_SAMPLES = 2_000
REPEATS = 20
N_DIRECTIONS = 128
_ROWS = 250
STATISTICS = ("sliced_w2", "mmd", "energy_distance", "c2st_auc")
# Squared distances by the expanded square are off by the unit roundoff of the largest |z|²; beyond
# these they would be off by more than 1e-3, where the kernel's scale is 1.
_SINGLE_RESOLVES, _DOUBLE_RESOLVES = 1.6e4, 9e12


def sliced_w2(x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor) -> float:
    """(mean_θ W2²(θ·x, θ·y))^½ of two samples (n, D) along unit directions (D, P).

    In one dimension the optimal transport of equal samples matches their order statistics. Biased
    upwards at finite n; the null has the same bias.

    References:
        Bonneel et al. (2015), Sliced and Radon Wasserstein barycenters.
    """
    projected_x = (x @ directions).T.contiguous().sort().values
    projected_y = (y @ directions).T.contiguous().sort().values
    return math.sqrt(float((projected_x - projected_y).square().mean()))


def mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Maximum mean discrepancy of two samples (n, D), kernel k(a, b) = (1 + |a − b|²)^-½.

    The inverse multiquadric of scale 1, the prior's standard deviation in every dimension, whatever
    D: the median heuristic grows as √D and then sees only the first moments. Its slow tails keep
    the kernel informative at distances of order √D, where a Gaussian of scale 1 is 0. The square
    root of the V-statistic, positive at finite n; the null has the same bias.

    References:
        Gretton et al. (2012), A kernel two-sample test; Gorham & Mackey (2017) for the kernel.
    """
    return _distance_statistics(x, y)["mmd"]


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """(2 E|X − Y| − E|X − X'| − E|Y − Y'|)^½ of two samples (n, D), a V-statistic.

    In one dimension this is √2 times the L2 distance of the two CDFs. Positive at finite n; the
    null has the same bias.

    References:
        Székely & Rizzo (2013), Energy statistics.
    """
    return _distance_statistics(x, y)["energy_distance"]


def c2st_auc(x: torch.Tensor, y: torch.Tensor) -> float:
    """Held-out area under the ROC curve of a classifier that tells x from y, (n, D) each.

    k nearest neighbours, k = √n rounded: nothing to train or to tune, and consistent whatever the
    two distributions (Stone 1977). The first half of each sample are the neighbours, the other is
    classified by its share of x among them; ties count one half. 0.5 where x and y are alike.

    References:
        Lopez-Paz & Oquab (2017), Revisiting classifier two-sample tests.
    """
    return _distance_statistics(x, y)["c2st_auc"]


def two_sample(
    posterior: AggregatedPosterior,
    n_samples: int = N_SAMPLES,
    repeats: int = REPEATS,
    generator: torch.Generator | None = None,
) -> dict[str, Estimate]:
    """Sliced W2, MMD, energy distance and classifier AUC between z ~ q_N and N(0, I), with nulls.

    Every statistic is averaged over ``repeats`` fresh pairs of samples of n each, q_N against
    N(0, I), and so is its null, N(0, I) against N(0, I).

    Args:
        posterior: N components in D dimensions.
        n_samples: n >= 4, the size of either sample.
        repeats: of both, >= 2.
        generator: source of randomness.

    Returns:
        For each of sliced_w2, mmd, energy_distance (units of z) and c2st_auc (a share):
        the value; ``<name>_null`` and ``<name>_null_sd``, mean and standard deviation of one
        statistic under the null; ``<name>_z`` = (value − null)/null_sd, how many standard
        deviations of its noise a single sample of this size is off. It grows with n and not with
        the repeats; two N(0, I) give 0 ± (2/repeats)^½. std_error: Monte Carlo error over the
        repeats, widened by Student's t so that ±2 of it covers 95.4% however few they are (7% more
        for 20); for z that of null_sd included (the delta method). The truth is the expectation at
        this n, which for all but the AUC is above its limit. In few dimensions the statistics are
        skewed: at D = 3, n = 50 ±2 s.e. covered 92 to 98% for values and nulls, 91 to 97% for z and
        89 to 93% for null_sd.

    Undefined: all but sliced_w2 where codes lie so far out, at 3e6 and more, that float64 does not
    resolve distances of 1 among them; z where the null did not vary. They rank codes of the *same*
    dimension; across dimensions compare z-scores, and prefer the KL decomposition, since all of
    these lose power as D grows.
    """
    if n_samples < 4:
        raise InputError(f"n_samples must be >= 4, got {n_samples}.")
    if repeats < 2:
        raise InputError(f"repeats must be >= 2, got {repeats}.")
    source = posterior.device if generator is None else generator.device

    def normal(rows: int) -> torch.Tensor:
        shape = (rows, posterior.latent_dim)
        noise = torch.randn(shape, generator=generator, device=source, dtype=torch.float64)
        return noise.to(posterior.device)

    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    null: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for _ in range(repeats):
        directions = torch.nn.functional.normalize(normal(N_DIRECTIONS), dim=1).T
        codes = posterior.sample(n_samples, generator)[0].double()
        for results, x in ((found, codes), (null, normal(n_samples))):
            y = normal(n_samples)
            results["sliced_w2"].append(sliced_w2(x, y, directions))
            for name, value in _distance_statistics(x, y).items():
                results[name].append(value)
    estimates = {}
    from scipy import special

    # Few repeats know their own spread badly: ±2 errors are to cover what they cover of many.
    student = float(special.stdtrit(repeats - 1, special.ndtr(2.0))) / 2
    root, root_of_spread = math.sqrt(repeats) / student, math.sqrt(2 * (repeats - 1)) / student
    far = "codes lie beyond 3e6, where float64 does not resolve distances of 1"
    for name in STATISTICS:
        value, spread = _moments(found[name])
        centre, noise = _moments(null[name])
        if math.isnan(value):
            estimates[name] = Estimate.missing("1", far)
        else:
            estimates[name] = Estimate(value, spread / root, "1")
        estimates[f"{name}_null"] = Estimate(centre, noise / root, "1")
        # The error of a standard deviation of normal draws.
        estimates[f"{name}_null_sd"] = Estimate(noise, noise / root_of_spread, "1")
        if math.isnan(value) or noise == 0:
            reason = far if math.isnan(value) else f"{repeats} repeats of the null gave one value"
            estimates[f"{name}_z"] = Estimate.missing("1", reason)
            continue
        # Both means vary, and far from the null so does the unit they are measured in.
        z_error = math.hypot(
            math.hypot(spread, noise) / noise / root,
            (value - centre) / noise / root_of_spread,
        )
        estimates[f"{name}_z"] = Estimate((value - centre) / noise, z_error, "1")
    return estimates


def _moments(values: list[float]) -> tuple[float, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.std())


def _distance_statistics(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """The three statistics that rest on the distances of all pairs, made once, a few rows a time.

    In float32, centred: the rounding, 1e-6 of |z|² in a squared distance, averages out far below
    the null's noise. Far out in float64; farther still NaN.
    """
    count = len(x)
    half = count // 2
    both = torch.cat([x, y])
    both = both - both.mean(0)
    largest = float(both.square().sum(1).max())
    if largest > _DOUBLE_RESOLVES:
        return dict.fromkeys(("mmd", "energy_distance", "c2st_auc"), math.nan)
    if largest < _SINGLE_RESOLVES:
        both = both.float()
    neighbours = max(1, round(math.sqrt(count)))
    # Of each sample its first half, by which the other is classified.
    known, asked = (
        [both[sample * count : (sample + 1) * count][part] for sample in (0, 1)]
        for part in (slice(half), slice(half, None))
    )
    sums = torch.zeros(2, 2, 2, dtype=torch.float64)  # kernel and distance, by sample of a and of b
    votes: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    # Every pair once, and at the end its mirror image; a block of both by half.
    for sample in (0, 1):
        for distances in _distances(asked[sample], torch.cat(known)):
            nearest = distances.topk(neighbours, 1, largest=False, sorted=False)
            votes[sample].append((nearest.indices < half).sum(1))
            for other, block in enumerate(distances.split(half, 1)):
                sums[:, sample, other] += _kernel_and_distance(block)
    for group in (known, asked):
        for sample, other in ((0, 0), (0, 1), (1, 1)):
            same = sample == other
            for block in _distances(group[sample], group[other], same=same):
                sums[:, sample, other] += _kernel_and_distance(block) / (1 + same)
    kernel_sum, distance_sum = sums + sums.mT
    kernel_mean, distance_mean = kernel_sum / count**2, distance_sum / count**2
    contrast = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    # Both forms are squared norms, so below 0 by rounding alone: where the samples are the same.
    return {
        "mmd": math.sqrt(max(float((kernel_mean * contrast).sum()), 0.0)),
        "energy_distance": math.sqrt(max(-float((distance_mean * contrast).sum()), 0.0)),
        "c2st_auc": _auc(torch.cat(votes[0]), torch.cat(votes[1]), neighbours),
    }


def _distances(a: torch.Tensor, b: torch.Tensor, same: bool = False) -> Iterator[torch.Tensor]:
    """|a − b| of all pairs of (n, D) and (m, D), some rows at a time; exactly 0 for the same."""
    square = b.square().sum(1)
    for start, part in enumerate(a.split(_ROWS)):
        squared = torch.addmm(square, part, b.T, alpha=-2)
        squared += part.square().sum(1)[:, None]
        if same:
            squared.diagonal(start * _ROWS).zero_()
        yield squared.clamp_min_(0).sqrt_()  # rounding leaves squares of −1e-6


def _kernel_and_distance(distances: torch.Tensor) -> torch.Tensor:
    """Sums over pairs of the kernel (1 + |a − b|²)^-½ and of the distance, (2,) on the CPU."""
    kernel = distances.square().add_(1).rsqrt_()
    return torch.stack([part.sum(dtype=torch.float64) for part in (kernel, distances)]).cpu()


def _auc(x_votes: torch.Tensor, y_votes: torch.Tensor, most: int) -> float:
    """The share of pairs in which x has more votes, ties one half, from the counts of each vote."""
    x_counts = torch.bincount(x_votes, minlength=most + 1).double()
    y_counts = torch.bincount(y_votes, minlength=most + 1).double()
    below = y_counts.cumsum(0) - y_counts
    return float((x_counts * (below + 0.5 * y_counts)).sum() / (x_counts.sum() * y_counts.sum()))
