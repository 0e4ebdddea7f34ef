"""Images: the original bytes or a clear error, every image once an epoch, honest binarization."""

from __future__ import annotations

import gzip
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch

from vaeq.data import MNIST_FILES, Images, bernoulli_draw, load_images, mean_image
from vaeq.errors import InputError


def test_mnist_is_the_published_data_set(mnist: Images) -> None:
    assert mnist.train.shape == (60_000, 784)
    assert mnist.test.shape == (10_000, 784)
    assert mnist.train.dtype == torch.uint8
    # The two constants every MNIST normalisation uses.
    pixels = mnist.train.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.train_labels.long().bincount().tolist() == counts


def _copy_of_mnist(folder: Path) -> Path:
    for name in MNIST_FILES:
        with resources.as_file(resources.files("vaeq.mnist") / f"{name}.gz") as source:
            shutil.copy(source, folder)
    return folder


def test_root_names_a_folder_of_the_same_files(tmp_path: Path, mnist: Images) -> None:
    images = load_images(root=str(_copy_of_mnist(tmp_path)), n_train=10, n_test=5)
    assert torch.equal(images.train, mnist.train[:10])
    assert len(images.test) == len(images.test_labels) == 5
    assert images.md5 == mnist.md5


def test_a_missing_truncated_or_altered_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        load_images(root=str(tmp_path))
    folder = _copy_of_mnist(tmp_path)
    file = folder / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        load_images(root=str(folder))
    file.write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        load_images(root=str(folder))
    altered = bytearray(gzip.decompress(whole))
    altered[5000] ^= 1
    file.write_bytes(gzip.compress(bytes(altered), compresslevel=1))
    with pytest.raises(InputError, match="not the original MNIST file"):
        load_images(root=str(folder))
    # A file that unpacks to more than MNIST is not read to its end.
    file.write_bytes(gzip.compress(gzip.decompress(whole) + bytes(10_000_000), compresslevel=1))
    with pytest.raises(InputError, match="not the original MNIST file"):
        load_images(root=str(folder))


def test_more_images_than_there_are_is_an_error() -> None:
    with pytest.raises(InputError, match=r"data.n_train must be at most 60000.*got 60001"):
        load_images(n_train=60_001)


def test_torchvision_sets_say_where_their_files_belong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"put its four IDX files in .*FashionMNIST/raw"):
        load_images("fashion_mnist", root=str(tmp_path))


def test_torchvision_sets_are_read_from_idx_files(tmp_path: Path, mnist: Images) -> None:
    # KMNIST has the files and the shapes of MNIST; torchvision reads whatever lies there.
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        packed = (resources.files("vaeq.mnist") / f"{name}.gz").read_bytes()
        (raw / name).write_bytes(gzip.decompress(packed))
    images = load_images("kmnist", root=str(tmp_path), n_train=100, n_test=10)
    assert images.name == "kmnist"
    assert torch.equal(images.train, mnist.train[:100])


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
