"""Two-sample distances of z ~ q_N from N(0, I), each beside what it is between two N(0, I) samples.

Sliced Wasserstein and kernel distances shrink with the dimension, and all are positive for equal
distributions at finite n. Without their null they would call any high-dimensional code normal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.lockstep import made, stacked
from vaeq.posterior.aggregated import AggregatedPosterior

N_SAMPLES = 2_000
REPEATS = 20
N_DIRECTIONS = 128
# Distances held at a time: 2 MB stay in cache; a GPU takes all of a stack at once.
_CPU_TILE, _GPU_TILE = 1 << 19, 1 << 26
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
    return float(_sliced_w2(x[None], y[None], directions[None]))


def mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Maximum mean discrepancy of two samples (n, D), kernel k(a, b) = (1 + |a − b|²)^-½.

    The inverse multiquadric of scale 1, the prior's standard deviation in every dimension, whatever
    D: the median heuristic grows as √D and then sees only the first moments. Its slow tails keep
    the kernel informative at distances of order √D, where a Gaussian of scale 1 is 0. The square
    root of the V-statistic, positive at finite n; the null has the same bias.

    References:
        Gretton et al. (2012), A kernel two-sample test; Gorham & Mackey (2017) for the kernel.
    """
    return float(_distance_statistics(x[None], y[None])[0])


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """(2 E|X − Y| − E|X − X'| − E|Y − Y'|)^½ of two samples (n, D), a V-statistic.

    In one dimension this is √2 times the L2 distance of the two CDFs. Positive at finite n; the
    null has the same bias.

    References:
        Székely & Rizzo (2013), Energy statistics.
    """
    return float(_distance_statistics(x[None], y[None])[1])


def c2st_auc(x: torch.Tensor, y: torch.Tensor) -> float:
    """Held-out area under the ROC curve of a classifier that tells x from y, (n, D) each.

    k nearest neighbours, k = √n rounded: nothing to train or to tune, and consistent whatever the
    two distributions (Stone 1977). The first half of each sample are the neighbours, the other is
    classified by its share of x among them; ties count one half. 0.5 where x and y are alike.

    References:
        Lopez-Paz & Oquab (2017), Revisiting classifier two-sample tests.
    """
    return float(_distance_statistics(x[None], y[None])[2])


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
    source = _Source(posterior, generator)
    (found,) = made(_two_samples, [source], (n_samples, repeats), posterior.device)
    return found


@dataclass(frozen=True)
class _Source:
    """What is compared, and the randomness of it."""

    posterior: AggregatedPosterior
    generator: torch.Generator | None

    @property
    def dims(self) -> int:
        return self.posterior.latent_dim

    def normal(self, rows: int) -> torch.Tensor:
        """Draws of N(0, I), (rows, D)."""
        device = self.posterior.device if self.generator is None else self.generator.device
        noise = torch.randn(
            (rows, self.dims), generator=self.generator, device=device, dtype=torch.float64
        )
        return noise.to(self.posterior.device)

    def codes(self, rows: int) -> torch.Tensor:
        """Draws of q_N, (rows, D)."""
        return self.posterior.sample(rows, self.generator)[0].double()


def _two_samples(
    sources: Sequence[_Source], n_samples: int, repeats: int
) -> list[dict[str, Estimate]]:
    """:func:`two_sample` of several. Dimensions that one lacks are 0, and add to no distance."""

    def normal(rows: int) -> torch.Tensor:
        return stacked([source.normal(rows) for source in sources])

    found, null = torch.empty(2, repeats, len(STATISTICS), len(sources), dtype=torch.float64)
    for i in range(repeats):
        directions = normalize(normal(N_DIRECTIONS), dim=2).mT
        codes = stacked([source.codes(n_samples) for source in sources])
        for results, x in ((found, codes), (null, normal(n_samples))):
            y = normal(n_samples)
            results[i, 0] = _sliced_w2(x, y, directions)
            results[i, 1:] = _distance_statistics(x, y)
    return [_estimates(found[..., e], null[..., e]) for e in range(len(sources))]


def _estimates(found: torch.Tensor, null: torch.Tensor) -> dict[str, Estimate]:
    """Values, nulls and z-scores from the statistics of every repeat, (R, 4) each."""
    from scipy import special

    repeats = len(found)
    # Few repeats know their own spread badly: ±2 errors are to cover what they cover of many.
    student = float(special.stdtrit(repeats - 1, special.ndtr(2.0))) / 2
    root, root_of_spread = math.sqrt(repeats) / student, math.sqrt(2 * (repeats - 1)) / student
    far = "codes lie beyond 3e6, where float64 does not resolve distances of 1"
    estimates = {}
    for name, values, nulls in zip(STATISTICS, found.T, null.T, strict=True):
        value, spread = float(values.mean()), float(values.std())
        centre, noise = float(nulls.mean()), float(nulls.std())
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


def _sliced_w2(x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Of E pairs of samples (E, n, D) along directions (E, D, P), (E,) float64 on the CPU."""
    projected_x, projected_y = (
        (sample @ directions).mT.contiguous().sort().values for sample in (x, y)
    )
    return (projected_x - projected_y).square().mean((1, 2)).sqrt().cpu()


def _distance_statistics(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """MMD, energy distance and AUC of E pairs of samples (E, n, D), (3, E) float64 on the CPU.

    In float32, centred: the rounding, 1e-6 of |z|² in a squared distance, averages out far below
    the null's noise. Far out in float64; farther still NaN.
    """
    both = torch.cat([x, y], 1)
    both = both - both.mean(1, keepdim=True)
    largest = both.square().sum(2).amax(1)
    single = largest < _SINGLE_RESOLVES
    result = torch.full((3, len(x)), math.nan, dtype=torch.float64)
    for dtype, chosen in (
        (torch.float32, single),
        (torch.float64, ~single & (largest <= _DOUBLE_RESOLVES)),
    ):
        members = chosen.nonzero()[:, 0]
        if len(members):
            points = both if len(members) == len(both) else both[members]
            result[:, members.cpu()] = _of_all_pairs(points.to(dtype), x.shape[1])
    return result


def _of_all_pairs(both: torch.Tensor, count: int) -> torch.Tensor:
    """The statistics that rest on the distances of all pairs, made once, some rows at a time.

    Args:
        both: x and behind it y, so many points each, (E, 2 count, D).
    """
    half = count // 2
    neighbours = max(1, round(math.sqrt(count)))
    # Of each sample its first half, by which the other is classified.
    known, asked = (
        [both[:, sample * count : (sample + 1) * count][:, part] for sample in (0, 1)]
        for part in (slice(half), slice(half, None))
    )
    # Of kernel and distance, by sample of a and of b.
    sums = torch.zeros(2, 2, 2, len(both), dtype=torch.float64, device=both.device)
    votes: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    # Every pair once, and at the end its mirror image; a block of both by half.
    for sample in (0, 1):
        for distances in _distances(asked[sample], torch.cat(known, 1)):
            nearest = distances.topk(neighbours, 2, largest=False, sorted=False)
            votes[sample].append((nearest.indices < half).sum(2))
            for other, block in enumerate(distances.split(half, 2)):
                sums[:, sample, other] += _kernel_and_distance(block)
    for group in (known, asked):
        for sample, other in ((0, 0), (0, 1), (1, 1)):
            same = sample == other
            for block in _distances(group[sample], group[other], same=same):
                sums[:, sample, other] += _kernel_and_distance(block) / (1 + same)
    kernel_mean, distance_mean = (sums + sums.transpose(1, 2)).cpu() / count**2

    def contrast(means: torch.Tensor) -> torch.Tensor:
        return means[0, 0] + means[1, 1] - means[0, 1] - means[1, 0]

    # Both forms are squared norms, so below 0 by rounding alone: where the samples are the same.
    return torch.stack(
        [
            contrast(kernel_mean).clamp_min(0).sqrt(),
            (-contrast(distance_mean)).clamp_min(0).sqrt(),
            _auc(torch.cat(votes[0], 1), torch.cat(votes[1], 1), neighbours).cpu(),
        ]
    )


def _distances(a: torch.Tensor, b: torch.Tensor, same: bool = False) -> Iterator[torch.Tensor]:
    """|a − b| of all pairs of (E, n, D) and (E, m, D), some rows at a time; 0 for the same."""
    square = b.square().sum(2)[:, None]
    tile = _CPU_TILE if a.device.type == "cpu" else _GPU_TILE
    rows = max(1, tile // (len(a) * b.shape[1]))
    for start, part in enumerate(a.split(rows, 1)):
        squared = torch.baddbmm(square, part, b.mT, alpha=-2)
        squared += part.square().sum(2)[..., None]
        if same:
            squared.diagonal(start * rows, 1, 2).zero_()
        yield squared.clamp_min_(0).sqrt_()  # rounding leaves squares of −1e-6


def _kernel_and_distance(distances: torch.Tensor) -> torch.Tensor:
    """Sums over pairs of the kernel (1 + |a − b|²)^-½ and of the distance, (2, E)."""
    kernel = distances.square().add_(1).rsqrt_()
    return torch.stack([part.sum((1, 2), dtype=torch.float64) for part in (kernel, distances)])


def _auc(x_votes: torch.Tensor, y_votes: torch.Tensor, most: int) -> torch.Tensor:
    """The share of pairs in which x has more votes, ties one half, from the counts of each vote.

    Args:
        x_votes, y_votes: (E, n), from 0 to ``most``.
    """
    x_counts, y_counts = (
        torch.zeros(len(votes), most + 1, dtype=torch.float64, device=votes.device).scatter_add_(
            1, votes, torch.ones_like(votes, dtype=torch.float64)
        )
        for votes in (x_votes, y_votes)
    )
    below = y_counts.cumsum(1) - y_counts
    pairs = x_counts.sum(1) * y_counts.sum(1)
    return (x_counts * (below + 0.5 * y_counts)).sum(1) / pairs
