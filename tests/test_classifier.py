"""The digit classifier: it learns, and its file is used only where it can be trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vaeq.data.images import Images
from vaeq.errors import InputError
from vaeq.generation import classifier as module
from vaeq.generation.classifier import (
    Classifier,
    classifier_hash,
    load_classifier,
    train_classifier,
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SIZE", 100)


def load(folder: Path, images: Images) -> Classifier:
    return load_classifier(
        folder, images.train, images.train_labels, images.test, images.test_labels,
        data_md5=images.md5,
    )  # fmt: skip


def test_it_learns_digits_from_few_images_and_repeats_itself(small: Images) -> None:
    before = torch.random.get_rng_state()
    first, second = (train_classifier(small.train, small.train_labels) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())  # the global stream is not ours
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_the_file_is_used_again_and_gives_the_same_features(tmp_path: Path, small: Images) -> None:
    first = load(tmp_path / "new", small)
    assert first.trained
    assert first.accuracy > 0.6
    again = load(tmp_path / "new", small)
    assert not again.trained
    assert (again.accuracy, again.checksum) == (first.accuracy, first.checksum)
    features, logits = again(small.test)
    assert features.shape == (200, 64)
    assert logits.shape == (200, 10)
    torch.testing.assert_close(first(small.test)[0], features, rtol=0, atol=0)
    # Grey levels in [0, 1] are the same images; so are smaller batches.
    torch.testing.assert_close(first(small.test / 255, 33)[0], features)
    right = (logits.argmax(1) == small.test_labels).double().mean()
    assert float(right) == first.accuracy


def test_a_damaged_or_foreign_file_is_replaced(tmp_path: Path, small: Images) -> None:
    first = load(tmp_path, small)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    identity = classifier_hash(small.md5, 600, 200).encode()
    # Copies: the file they are mapped from is about to be overwritten.
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    for damage in ("truncated", "other weights", "other data", "other accuracy", "no metadata"):
        if damage == "truncated":
            path.write_bytes(good[: len(good) // 2])
        elif damage == "other weights":
            path.write_bytes(good[:-4] + b"\0\0\0\1")
        elif damage == "other data":
            path.write_bytes(good.replace(identity, b"0" * 64))
        elif damage == "other accuracy":
            path.write_bytes(good.replace(b'"accuracy":"0.', b'"accuracy":"1.'))
            assert path.read_bytes() != good
        else:
            save_file(tensors, path)
        found = load(tmp_path, small)
        assert found.trained, damage
        assert found.accuracy == first.accuracy
        assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())


def test_other_data_has_another_file() -> None:
    names = {classifier_hash("a", 1, 1), classifier_hash("b", 1, 1), classifier_hash("a", 2, 1)}
    assert len(names) == 3


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    few = torch.zeros(3, 100, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"train must have shape \(N, 784\), got \(3, 100\)"):
        load_classifier(tmp_path, few, few[:, 0], few, few[:, 0], data_md5="x")


def test_the_declared_architecture_is_the_one_built() -> None:
    # The hash knows the network by these words alone.
    assert module.ARCHITECTURE.startswith("conv 5x5/2 16, conv 3x3 32, pool, conv 3x3 64, pool")
    shapes = [tuple(p.shape) for p in module._Network().parameters() if p.ndim > 1]
    assert shapes == [(16, 1, 5, 5), (32, 16, 3, 3), (64, 32, 3, 3), (64, 576), (10, 64)]
