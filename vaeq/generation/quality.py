"""What the samples of a decoder are worth, in the features of a digit classifier.

Fréchet distance (Heusel et al. 2017), k-NN precision and recall (Kynkäänniemi et al. 2019) and what
the classifier makes of the samples, for codes from each source: what is lost between q_N, which the
decoder was trained on, and N(0, I), which it is sampled from, and what an ex-post prior gives back.

Samples are Bernoulli means, grey levels as the images are: no pixel is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from vaeq.errors import InputError
from vaeq.estimate import Estimate

# Below this the features are not worth measuring in.
REQUIRED_ACCURACY = 0.99
SAMPLES = 5_000
# Precision and recall cost the square of the images.
MOST_NEIGHBOURS = 2_500
NEIGHBOURS = 3
REPEATS = 3
# Share of held-out images that count as no digit, by definition.
NO_DIGIT_SHARE = 0.01
_TILE = 1 << 22

Decode = Callable[[Tensor], Tensor]
Sampler = Callable[[int, torch.Generator], Tensor]
# The name under which training images are compared with held-out ones.
FLOOR = "train"
MEASURES = ("fid", "precision", "recall", "class_balance", "entropy", "no_digit")
_UNITS = {"class_balance": "nats", "entropy": "nats"}


class Features(Protocol):
    """Penultimate features (B, F) and logits (B, classes) of images (B, pixels)."""

    @property
    def accuracy(self) -> float:
        """On images it was not trained on."""

    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]:
        """Of uint8 images or grey levels in [0, 1]."""


def sample_quality(
    decode: Decode,
    sources: Mapping[str, Sampler],
    train_images: Tensor,
    held_out_images: Tensor,
    classifier: Features,
    generator: torch.Generator,
    *,
    n_samples: int = SAMPLES,
    repeats: int = REPEATS,
    neighbours: int = NEIGHBOURS,
) -> dict[str, Estimate]:
    """Samples of each source against held-out images; training images against them as the floor.

    All sets are chosen at random and equally large: n, or as many as there are training or held-out
    images; for precision and recall the first 2,500 of them. The Fréchet distance is biased upward
    by the finite n, precision and recall by it, too: at equal n the bias is about the floor's, so
    read differences, and values against ``fid_train``. (The classifier has seen the training
    images, which the floor of entropy and no_digit shows.) The features are not normalised: a
    Fréchet distance has the scale of this classifier, and compares with others of the same file
    alone.

    Args:
        decode: codes (B, D) → Bernoulli logits (B, pixels).
        sources: name → sampler (count, generator) → codes, see :mod:`vaeq.generation.samplers`.
        train_images, held_out_images: (N, pixels) and (M, pixels) uint8 grey levels.
        classifier: see :mod:`vaeq.generation.classifier`.
        generator: source of randomness; samplers get it.
        n_samples: n, of each source in each repeat.
        repeats: R >= 2 fresh draws of each source, and choices of training images.
        neighbours: k of precision and recall.

    Returns:
        For each source and for ``train``, mean over R ± sd/√R, which covers the draws and not the
        choice of held-out images, the classifier or the seed of the training:

        ``fid_*``: Fréchet distance between the Gaussians of the features, unit "1".
        ``precision_*``, ``recall_*``: shares, see :func:`precision_recall`.
        ``class_balance_*``: KL of the frequencies of predicted classes from those of the held-out
        images, nats; about (classes − 1)/n where nothing is wrong.
        ``entropy_*``: mean entropy of the predicted class, nats.
        ``no_digit_*``: share with an entropy above the 99th percentile of the held-out images'.

        And the answers, paired over repeats: ``quality_mismatch`` = fid_prior − fid_aggregated,
        what sampling N(0, I) instead of q_N costs; ``quality_recovered`` = fid_prior − fid_gmm.

    All are missing, with the reason, where the classifier's accuracy is below 99 %, or with fewer
    than k + 2 images.

    References:
        Heusel, Ramsauer, Unterthiner, Nessler & Hochreiter (2017), GANs trained by a two time-scale
        update rule, section 3, here with the data's own classifier instead of Inception;
        Kynkäänniemi, Karras, Laine, Lehtinen & Aila (2019), Improved precision and recall metric,
        eqs. 1 and 2.
    """
    if repeats < 2:
        raise InputError(f"repeats must be >= 2, got {repeats}.")
    names = [*sources, FLOOR]
    count = min(n_samples, len(held_out_images), len(train_images))
    if classifier.accuracy < REQUIRED_ACCURACY:
        return missing_quality(
            names,
            f"the classifier is right on {classifier.accuracy:.1%} of the held-out images; "
            f"its features need {REQUIRED_ACCURACY:.0%}",
        )
    if count < neighbours + 2:
        return missing_quality(names, f"needs {neighbours + 2} images, got {count}")
    # Not the first of them: the halves of MNIST's test images were written by different people.
    held_out_images = held_out_images[
        _some(len(held_out_images), count, held_out_images, generator)
    ]
    reference = _Reference(*classifier(held_out_images), neighbours)
    draws: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, sampler in sources.items():
            z = sampler(count, generator)
            parts = [classifier(_decoded(decode, part)) for part in z.split(2048)]
            draws[name].append(reference.compare(*_joined(parts)))
        chosen = _some(len(train_images), count, train_images, generator)
        draws[FLOOR].append(reference.compare(*classifier(train_images[chosen])))
    found = {
        f"{measure}_{name}": _mean([row[measure] for row in rows], _UNITS.get(measure, "1"))
        for name, rows in draws.items()
        for measure in MEASURES
    }
    for answer, other in (("quality_mismatch", "aggregated"), ("quality_recovered", "gmm")):
        if "prior" in draws and other in draws:
            pairs = zip(draws["prior"], draws[other], strict=True)
            found[answer] = _mean([a["fid"] - b["fid"] for a, b in pairs], "1")
        else:
            found[answer] = Estimate.missing("1", f"needs the sources prior and {other}")
    return found


def missing_quality(names: Iterable[str], reason: str) -> dict[str, Estimate]:
    """Every number of :func:`sample_quality` as missing, for the same reason."""
    found = {
        f"{measure}_{name}": Estimate.missing(_UNITS.get(measure, "1"), reason)
        for name in names
        for measure in MEASURES
    }
    for answer in ("quality_mismatch", "quality_recovered"):
        found[answer] = Estimate.missing("1", reason)
    return found


def _mean(values: list[float], unit: str) -> Estimate:
    table = torch.tensor(values, dtype=torch.float64)
    if not bool(table.isfinite().all()):
        return Estimate.missing(unit, "not finite: images or features are not, or a class is empty")
    return Estimate(float(table.mean()), float(table.std()) / math.sqrt(len(values)), unit)


def _some(n: int, count: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of so many of n images, at random."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    return order[:count].to(images.device)


@torch.no_grad()
def _decoded(decode: Decode, z: Tensor) -> Tensor:
    return decode(z).sigmoid()


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([f for f, _ in parts]), torch.cat([logits for _, logits in parts])


class _Reference:
    """The held-out images, to compare others with."""

    def __init__(self, features: Tensor, logits: Tensor, neighbours: int) -> None:
        self._moments = moments(features)
        self._manifold = Manifold(features[:MOST_NEIGHBOURS], neighbours)
        self._frequencies = class_frequencies(logits)
        self._threshold = torch.quantile(entropy(logits), 1 - NO_DIGIT_SHARE)
        self._neighbours = neighbours

    def compare(self, features: Tensor, logits: Tensor) -> dict[str, float]:
        """The numbers of ``MEASURES``; all NaN where features are not finite."""
        if not bool(features.isfinite().all()):
            return dict.fromkeys(MEASURES, math.nan)
        uncertainty = entropy(logits)
        near = Manifold(features[:MOST_NEIGHBOURS], self._neighbours)
        precision, recall = precision_recall(self._manifold, near)
        values = (
            frechet_distance(*self._moments, *moments(features)),
            precision,
            recall,
            discrete_kl(class_frequencies(logits), self._frequencies),
            float(uncertainty.mean()),
            float((uncertainty > self._threshold).double().mean()),
        )
        return dict(zip(MEASURES, values, strict=True))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F), with n − 1, float64."""
    features = features.double()
    mean = features.mean(0)
    offset = features - mean
    return mean, offset.T @ offset / (len(features) - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁^½ C₂ C₁^½)^½), squared Wasserstein-2 of two Gaussians.

    Exact for singular covariances: both roots are of symmetric matrices, by their eigenvalues
    (Dowson & Landau 1982, eq. 6).
    """
    root = _root(cov1)
    # tr (·)^½ is the sum of the roots of the eigenvalues; rounding alone makes one negative.
    inner = root @ cov2 @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return float(distance)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class Manifold:
    """The union of balls about points, each reaching to its k-th nearest neighbour."""

    def __init__(self, points: Tensor, neighbours: int) -> None:
        self.points = points.double()
        parts = [
            # The nearest of all is the point itself.
            _squares(part, self.points).kthvalue(neighbours + 1, dim=1).values
            for part in self.points.split(max(1, _TILE // len(points)))
        ]
        self.radius = torch.cat(parts)  # squared

    def share_inside(self, others: Tensor) -> float:
        """Share of the others that lie in at least one ball."""
        inside = [
            (_squares(part, self.points) <= self.radius).any(1)
            for part in others.double().split(max(1, _TILE // len(self.points)))
        ]
        return float(torch.cat(inside).double().mean())


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (A, B), float64."""
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2)


def precision_recall(real: Manifold, fake: Manifold) -> tuple[float, float]:
    """Share of samples within the images' manifold, and of images within the samples'.

    Precision asks whether the samples look like images, recall whether all images are covered
    (Kynkäänniemi et al. 2019, eqs. 1 and 2). Both hang on k and on the numbers of points, so
    compare equal ones; two sets from one distribution give less than 1.
    """
    return real.share_inside(fake.points), fake.share_inside(real.points)


def class_frequencies(logits: Tensor) -> Tensor:
    """Shares of the classes predicted, (classes,) float64."""
    count = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return count.double() / len(logits)


def discrete_kl(p: Tensor, q: Tensor) -> float:
    """Σ_k p_k log p_k/q_k, nats; infinite where p has a class that q lacks."""
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum())


def entropy(logits: Tensor) -> Tensor:
    """−Σ_k p_k log p_k of each row, nats, float64 (B,)."""
    log_p = logits.double().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)
