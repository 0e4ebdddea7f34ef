"""Images: tensors of their own shape or a clear error, every one once an epoch, honest draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vaeq.data.images import Images, bernoulli_draw, load_images, mean_image
from vaeq.errors import InputError


def test_more_images_than_there_are_is_an_error() -> None:
    with pytest.raises(InputError, match=r"data.n_train must be at most 60000.*got 60001"):
        load_images(n_train=60_001)


def test_other_data_sets_come_as_tensors_of_their_own_shape(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (9, 6, 5, 3), dtype=np.uint8)
    file = tmp_path / "images.npz"
    np.savez(file, train_images=colours[:6], test_images=colours[6:], train_labels=np.arange(6))
    images = load_images("npz", path=str(file), n_train=4)
    assert images.shape == (6, 5, 3)
    assert images.train.shape == (4, 90)
    assert images.pixels == 90
    assert torch.equal(images.unflatten(images.train), torch.from_numpy(colours[:4]))
    assert images.train_labels is not None
    assert images.train_labels.tolist() == [0, 1, 2, 3]
    assert images.test_labels is None
    # The MD5 is that of the whole set, however many of it are used.
    assert images.md5 == load_images("npz", path=str(file)).md5
    static = load_images("npz", path=str(file), binarize="static")
    assert static.shape == (6, 5, 3)
    assert set(static.train.unique().tolist()) == {0, 255}


def test_images_that_are_not_the_asked_for_ones_are_refused(tmp_path: Path, mnist: Images) -> None:
    file = tmp_path / "images.npz"
    np.savez(file, train_images=np.ones((3, 4, 4), np.uint8), test_images=np.ones((2, 4, 4)))
    with pytest.raises(InputError, match=r"data\.md5=0{32} is asked for, and data=npz has MD5"):
        load_images("npz", path=str(file), md5="0" * 32)
    assert load_images(md5=mnist.md5).md5 == mnist.md5


def test_bernoulli_draw_has_the_grey_level_as_its_mean(small: Images) -> None:
    generator = torch.Generator().manual_seed(1)
    levels = torch.tensor([0, 1, 64, 128, 254, 255], dtype=torch.uint8).repeat(40_000, 1)
    draw = bernoulli_draw(levels, generator)
    assert set(draw.unique().tolist()) == {0, 255}
    p = levels[0].double() / 255
    share = (draw == 255).double().mean(0)
    assert share[0] == 0
    assert share[-1] == 1
    error = (p * (1 - p) / len(levels)).sqrt()
    assert ((share - p).abs() <= 4 * error).all()


def test_static_is_one_draw_and_dynamic_is_measured_on_it() -> None:
    first, again = (load_images(binarize="static", n_train=200, n_test=50) for _ in range(2))
    assert torch.equal(first.train, again.train)
    assert set(first.train.unique().tolist()) == {0, 255}
    assert torch.equal(first.observed("train"), first.train)

    dynamic = load_images(binarize="dynamic", n_train=200, n_test=50)
    assert dynamic.train.unique().numel() > 2
    # What is measured is a definite draw, the same as the static one.
    assert torch.equal(dynamic.observed("train"), first.train)
    assert torch.equal(dynamic.observed("test"), first.test)


def test_mean_image_is_the_share_of_light_and_never_certain() -> None:
    images = torch.tensor([[0, 255, 255, 51], [0, 255, 0, 51]], dtype=torch.uint8)
    expected = torch.tensor([0.5, 2.5, 1.5, 0.9]) / 3
    torch.testing.assert_close(mean_image(images), expected)
