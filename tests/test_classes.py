"""The quilt: each class against closed forms, and what holds the patches together."""

from __future__ import annotations

import pytest
import torch

from vaeq.divergence.classes import class_kl
from vaeq.divergence.decomposition import kl_per_image, marginal_kl
from vaeq.errors import InputError
from vaeq.posterior.aggregated import AggregatedPosterior


def test_classes_that_are_single_gaussians_in_closed_form() -> None:
    labels = torch.tensor([0] * 5 + [3] * 8 + [7] * 2)
    centre = {0: 0.0, 3: 1.0, 7: -2.0}
    mean = torch.tensor([[centre[k], 0.0] for k in labels.tolist()], dtype=torch.float64)
    q = AggregatedPosterior(mean, torch.zeros_like(mean))
    mean_kl, found = class_kl(q, labels, 200, torch.Generator().manual_seed(0))
    assert found["label"] == [0, 3, 7]
    assert found["n"] == [5, 8, 2]
    # KL(N(m, I) ‖ N(0, I)) = |m|²/2.
    assert found["marginal_kl"] == pytest.approx([0.0, 0.5, 2.0], abs=1e-9)
    assert found["kl_per_image"] == pytest.approx([0.0, 0.5, 2.0], abs=1e-9)
    assert mean_kl.value == pytest.approx((8 * 0.5 + 2 * 2.0) / 15, abs=1e-9)


def test_one_class_is_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    q = AggregatedPosterior(mean, torch.full_like(mean, -1.0))
    _, found = class_kl(
        q, torch.zeros(60, dtype=torch.uint8), 300, torch.Generator().manual_seed(2)
    )
    whole = marginal_kl(q, 300, torch.Generator().manual_seed(2))
    assert found["marginal_kl"] == [whole.value]
    assert found["std_error"] == [whole.std_error]


def test_the_patches_lie_between_the_quilt_and_the_images() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (400,), generator=generator)
    mean = torch.randn(400, 2, generator=generator, dtype=torch.float64)
    mean[:, 0] += labels
    q = AggregatedPosterior(mean, torch.full_like(mean, -1.5))
    average, _ = class_kl(q, labels, 5000, generator)
    whole = marginal_kl(q, 5000, generator)
    assert whole.value is not None
    assert average.value is not None
    assert whole.value < average.value < float(kl_per_image(q).mean())


def test_labels_must_be_one_integer_an_image() -> None:
    q = AggregatedPosterior(torch.zeros(4, 1), torch.zeros(4, 1))
    for wrong in (torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.zeros(4, 1).long()):
        with pytest.raises(InputError, match=r"labels must be integers of shape \(4,\)"):
            class_kl(q, wrong)
