"""The quilt: KL(q(z|y = k) ‖ p) class by class, each patch far from N(0, I) and the whole close."""

from __future__ import annotations

import math
from typing import Any

import torch

from vaeq.divergence.decomposition import kl_per_image, marginal_kl
from vaeq.errors import InputError
from vaeq.estimate import Estimate
from vaeq.posterior.aggregated import AggregatedPosterior

# More labels than this are a number to predict and not classes.
MOST_CLASSES = 1_000


def class_kl(
    posterior: AggregatedPosterior,
    labels: torch.Tensor,
    n_samples: int = 2_000,
    generator: torch.Generator | None = None,
) -> tuple[Estimate, dict[str, list[Any]]]:
    """KL(q_N(z|y = k) ‖ p), q_N(z|y = k) the mixture of the images of class k.

    The same estimator as marginal_kl on each class. Their average, weighted by size, lies between
    marginal_kl and kl_per_image: the step from the first to it is the information that z has of
    the class, I(z; y), and the step from it to kl_per_image what z has of the image beyond that.

    Args:
        posterior: N components in D dimensions.
        labels: class of each image, (N,), integers, at most 1000 distinct.
        n_samples: draws a class, >= 2.
        generator: source of randomness.

    Returns:
        class_kl_mean, the average weighted by class size, in nats, and by class, in the order of
        the labels: label, n, kl_per_image, marginal_kl, std_error, mutual_information_fraction.
        std_error is Monte Carlo error in z.

    Where mutual_information_fraction is near 1 the class is saturated: its KL is its kl_per_image
    minus log n, and falls with more images.
    """
    labels = torch.as_tensor(labels).to(posterior.device)
    if labels.shape != (posterior.n,) or labels.is_floating_point() or labels.is_complex():
        raise InputError(
            f"labels must be integers of shape ({posterior.n},), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    classes = labels.unique()
    if len(classes) > MOST_CLASSES:
        raise InputError(f"labels must have at most {MOST_CLASSES} classes, got {len(classes)}.")
    table: dict[str, list[Any]] = {
        "label": classes.tolist(),
        "n": [],
        "kl_per_image": [],
        "marginal_kl": [],
        "std_error": [],
        "mutual_information_fraction": [],
    }
    for label in classes:
        part = posterior.subset((labels == label).nonzero()[:, 0])
        found = marginal_kl(part, n_samples, generator)
        assert found.value is not None
        average = float(kl_per_image(part).mean())
        information = average - found.value
        table["n"].append(part.n)
        table["kl_per_image"].append(average)
        table["marginal_kl"].append(found.value)
        table["std_error"].append(found.std_error)
        table["mutual_information_fraction"].append(
            information / math.log(part.n) if part.n > 1 else None
        )
    share = [n / posterior.n for n in table["n"]]
    mean = sum(w * kl for w, kl in zip(share, table["marginal_kl"], strict=True))
    errors = table["std_error"]
    if None in errors:
        return Estimate(mean, None, "nats"), table
    variance = sum((w * error) ** 2 for w, error in zip(share, errors, strict=True))
    return Estimate(mean, math.sqrt(variance), "nats"), table
