"""Distances of samples from images: closed forms, independent code, and the whole on digits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from scipy.spatial import KDTree
from torch import Tensor

from vaeq.errors import InputError
from vaeq.generation.quality import (
    MEASURES,
    Manifold,
    class_frequencies,
    discrete_kl,
    entropy,
    frechet_distance,
    moments,
    precision_recall,
    sample_quality,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_the_distance_of_commuting_gaussians_in_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 0.0]).double(), torch.tensor([9.0, 1.0, 0.25]).double()
    mean = torch.tensor([1.0, 0.0, 2.0]).double()
    found = frechet_distance(mean, a.diag(), 0 * mean, b.diag())
    assert found == pytest.approx(5 + float((a.sqrt() - b.sqrt()).square().sum()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), dims=st.integers(1, 8))
def test_the_distance_is_scipys_and_a_distance(seed: int, dims: int) -> None:
    first = moments(normal(dims + 5, dims, seed=seed))
    second = moments(2 * normal(dims + 9, dims, seed=seed + 1) + 1)
    found = frechet_distance(*first, *second)
    root = np.asarray(linalg.sqrtm((first[1] @ second[1]).numpy())).real
    expected = float((first[0] - second[0]).square().sum() + first[1].trace() + second[1].trace())
    assert found == pytest.approx(expected - 2 * float(np.trace(root)), rel=1e-6)
    assert found >= 0
    assert found == pytest.approx(frechet_distance(*second, *first), rel=1e-9)
    assert frechet_distance(*first, *first) == pytest.approx(0, abs=1e-9)


def test_singular_covariances_are_no_trouble() -> None:
    # Two lines in the plane at an angle of 60 degrees: tr(C₁^½ C₂ C₁^½)^½ = cos 60°.
    a = torch.tensor([1.0, 0.0]).double()
    b = torch.tensor([0.5, math.sqrt(0.75)]).double()
    zero = torch.zeros(2).double()
    assert frechet_distance(zero, a.outer(a), zero, b.outer(b)) == pytest.approx(1.0, abs=1e-7)
    nothing = torch.zeros(2, 2).double()
    assert frechet_distance(zero, nothing, zero, a.outer(a)) == pytest.approx(1.0)


def test_precision_and_recall_agree_with_a_tree() -> None:
    real, fake = normal(150, 3), normal(120, 3, seed=1) * 0.7 + 0.3

    def inside(centres: np.ndarray, others: np.ndarray) -> float:
        radius = KDTree(centres).query(centres, k=4)[0][:, -1]
        distance = np.linalg.norm(others[:, None] - centres, axis=2)
        return float((distance <= radius).any(1).mean())

    found = precision_recall(Manifold(real, 3), Manifold(fake, 3))
    assert found == pytest.approx(
        (inside(real.numpy(), fake.numpy()), inside(fake.numpy(), real.numpy()))
    )


def test_precision_and_recall_of_sets_that_contain_each_other_or_do_not_touch() -> None:
    real = normal(200, 2)
    assert precision_recall(Manifold(real, 3), Manifold(real, 3)) == (1, 1)
    assert precision_recall(Manifold(real, 3), Manifold(real + 100, 3)) == (0, 0)
    # One mode of two: every sample is good, half of the images are missed.
    both = torch.cat([real, real + 100])
    assert precision_recall(Manifold(both, 3), Manifold(real, 3)) == (1, 0.5)


def test_chunks_do_not_change_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(50, 2), normal(60, 2, seed=1)
    whole = precision_recall(Manifold(real, 3), Manifold(fake, 3))
    monkeypatch.setattr("vaeq.generation.quality._TILE", 200)
    assert precision_recall(Manifold(real, 3), Manifold(fake, 3)) == whole


def test_entropy_and_class_balance_agree_with_scipy() -> None:
    logits = 3 * normal(40, 5)
    expected = stats.entropy(logits.softmax(1).numpy(), axis=1)
    np.testing.assert_allclose(entropy(logits).numpy(), expected, rtol=1e-9)
    p, q = class_frequencies(logits), class_frequencies(3 * normal(400, 5, seed=1))
    assert float(p.sum()) == pytest.approx(1)
    assert discrete_kl(p, q) == pytest.approx(float(stats.entropy(p.numpy(), q.numpy())))
    assert discrete_kl(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])) == math.inf


@dataclass
class Planar:
    """A toy classifier: the pixels are the features, two classes are linear in them."""

    accuracy: float = 1.0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images / 255 if images.dtype == torch.uint8 else images
        # No two grey levels tie.
        return x, x @ torch.tensor([[20.0, 0.13], [0.29, 20.0], [7.1, -3.3], [1.7, 9.9]])


def toy(count: int, seed: int) -> Tensor:
    """Images whose logits are independent normals."""
    return (normal(count, 4, seed=seed).float().sigmoid() * 255).round().to(torch.uint8)


def sampler(scale: float):
    def draw(count: int, source: torch.Generator) -> Tensor:
        return scale * torch.randn(count, 4, generator=source)

    return draw


def test_the_right_source_reaches_the_floor_and_a_wrong_one_does_not() -> None:
    sources = {"prior": sampler(2.0), "aggregated": sampler(1.0), "gmm": sampler(1.1)}
    found = sample_quality(lambda z: z, sources, toy(4000, 1), toy(1500, 2), Planar(), generator())
    assert set(found) == {f"{m}_{s}" for m in MEASURES for s in [*sources, "train"]} | {
        "quality_mismatch",
        "quality_recovered",
    }

    def value(name: str) -> float:
        number = found[name].value
        assert number is not None
        return number

    def error(name: str) -> float:
        number = found[name].std_error
        assert number is not None
        return number

    for measure in MEASURES:
        both = math.hypot(error(f"{measure}_aggregated"), error(f"{measure}_train"))
        assert abs(value(f"{measure}_aggregated") - value(f"{measure}_train")) < 6 * both + 1e-3
    assert value("no_digit_train") == pytest.approx(0.01, abs=6 * error("no_digit_train") + 5e-3)
    mismatch, spread = value("quality_mismatch"), error("quality_mismatch")
    assert mismatch == pytest.approx(value("fid_prior") - value("fid_aggregated"))
    assert mismatch > 10 * spread > 0
    assert 0 < value("quality_recovered") < mismatch
    # logit-normal coordinates: the distance is in closed form given their exact variances.
    line = torch.linspace(-12, 12, 20001).double()
    density = torch.exp(-0.5 * line.square()) / math.sqrt(2 * math.pi)
    std = [
        math.sqrt(float(torch.trapezoid(((s * line).sigmoid() - 0.5).square() * density, line)))
        for s in (1.0, 2.0)
    ]
    assert value("fid_prior") == pytest.approx(4 * (std[1] - std[0]) ** 2, rel=0.1)


def test_a_poor_classifier_gives_no_numbers_but_a_reason() -> None:
    found = sample_quality(
        lambda z: z, {"prior": sampler(1.0)}, toy(50, 1), toy(50, 2), Planar(0.953), generator()
    )
    assert {entry.value for entry in found.values()} == {None}
    assert "right on 95.3%" in str(found["fid_prior"].reason)
    found = sample_quality(
        lambda z: z, {"prior": sampler(1.0)}, toy(50, 1), toy(4, 2), Planar(), generator()
    )
    assert found["recall_prior"].reason == "needs 5 images, got 4"


def test_a_blown_up_decoder_and_an_absent_source_give_reasons() -> None:
    found = sample_quality(
        lambda z: z * math.nan,
        {"prior": sampler(1.0)}, toy(50, 1), toy(50, 2), Planar(), generator(),
    )  # fmt: skip
    assert "not finite" in str(found["fid_prior"].reason)
    assert found["fid_train"].value is not None
    assert found["quality_mismatch"].reason == "needs the sources prior and aggregated"


def test_one_repeat_has_no_error_bar() -> None:
    with pytest.raises(InputError, match="repeats must be >= 2, got 1"):
        sample_quality(lambda z: z, {}, toy(9, 1), toy(9, 2), Planar(), generator(), repeats=1)
