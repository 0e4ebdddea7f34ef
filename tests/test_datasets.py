"""Image sets in files: what is read, under which names, and what is refused and how."""

from __future__ import annotations

import gzip
import struct
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from torchvision import datasets as published

from vaeq.data.datasets import read_image_set
from vaeq.data.mnist import MNIST_FILES
from vaeq.errors import InputError

GREY = np.random.default_rng(0).integers(0, 256, (12, 5, 7), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    """The bytes of an IDX file."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(folder: Path, images: npt.NDArray[np.uint8], prefix: str = "", end: str = "") -> None:
    """Ten training images and two held-out ones, with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    test = "test" if prefix else "t10k"
    for name, part in (("train", slice(10)), (test, slice(10, 12))):
        for kind, array in ((f"images-idx{images.ndim}", images), ("labels-idx1", LABELS)):
            content = idx(array[part])
            path = folder / f"{prefix}{name}-{kind}-ubyte{end}"
            path.write_bytes(gzip.compress(content) if end else content)


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_folder_of_idx_files(tmp_path: Path, images: npt.NDArray[np.uint8], end: str) -> None:
    write_idx(tmp_path, images, end=end)
    found = read_image_set("idx", path=str(tmp_path))
    np.testing.assert_array_equal(found.train, images[:10])
    np.testing.assert_array_equal(found.test, images[10:])
    assert found.train_labels is not None
    assert found.train_labels.tolist() == LABELS[:10].tolist()
    (tmp_path / f"train-labels-idx1-ubyte{end}").unlink()
    assert read_image_set("idx", path=str(tmp_path)).train_labels is None
    (tmp_path / f"t10k-images-idx{images.ndim}-ubyte{end}").unlink()
    with pytest.raises(InputError, match=r"data\.path=.* has no t10k-images-idx3-ubyte; name them"):
        read_image_set("idx", path=str(tmp_path))


@pytest.mark.parametrize(
    "names", ["train_images test_images train_labels", "x_train x_test y_train"]
)
def test_a_npz_under_either_convention(tmp_path: Path, names: str) -> None:
    train, test, labels = names.split()
    file = tmp_path / "images.npz"
    column = LABELS[:10, None].astype(np.int64)  # as MedMNIST keeps them
    np.savez_compressed(file, **{train: GREY[:10], test: GREY[10:], labels: column})
    found = read_image_set("npz", path=str(file))
    np.testing.assert_array_equal(found.train, GREY[:10])
    assert found.train_labels is not None
    assert found.train_labels.tolist() == LABELS[:10].tolist()
    assert found.test_labels is None


def test_floats_bits_and_one_channel_become_grey_levels(tmp_path: Path) -> None:
    file = tmp_path / "images.npz"
    unit = GREY[..., None].astype(np.float32) / 255
    np.savez(file, train_images=unit, test_images=GREY > 127)
    found = read_image_set("npz", path=str(file))
    np.testing.assert_array_equal(found.train, GREY)
    np.testing.assert_array_equal(found.test, (GREY > 127) * 255)


def test_the_md5_is_of_the_images_and_labels_and_of_nothing_else(tmp_path: Path) -> None:
    def md5_of(**arrays: npt.NDArray[np.generic]) -> str:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        np.savez(file, **arrays)
        return read_image_set("npz", path=str(file)).md5

    base = md5_of(train_images=GREY[:10], test_images=GREY[10:])
    write_idx(tmp_path / "idx", GREY)
    (tmp_path / "idx" / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "idx" / "t10k-labels-idx1-ubyte").unlink()
    assert read_image_set("idx", path=str(tmp_path / "idx")).md5 == base
    assert md5_of(x_train=GREY[:10] / 255, x_test=GREY[10:]) == base
    other = GREY.copy()
    other[3, 2, 1] ^= 1
    different = {
        md5_of(train_images=other[:10], test_images=GREY[10:]),
        md5_of(train_images=GREY[:9], test_images=GREY[10:]),
        md5_of(train_images=GREY[:10], test_images=GREY[9:]),
        md5_of(train_images=GREY[:10], test_images=GREY[10:], train_labels=LABELS[:10]),
        md5_of(train_images=GREY[:10].swapaxes(1, 2), test_images=GREY[10:].swapaxes(1, 2)),
    }
    assert len(different) == 5
    assert base not in different


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": GREY}, r"must hold train_images \(or x_train\), got images"),
        ({"x_train": GREY}, r"must hold test_images \(or x_test\), got x_train"),
        ({"x_train": GREY, "train_images": GREY}, "has both train_images and x_train; keep one"),
        ({"x_train": GREY, "x_test": COLOUR}, "must hold images of 5 x 7 as for training, got 5 x"),
        ({"x_train": GREY[:, :4], "x_test": GREY}, "images of 4 x 7 as for training, got 5 x 7"),
        (
            {"x_train": GREY.reshape(12, 35), "x_test": GREY},
            r"must have shape \(N, H, W\) or .*35\)",
        ),
        ({"x_train": GREY[:0], "x_test": GREY}, r"and hold images, got \(0, 5, 7\)"),
        ({"x_train": COLOUR[..., :2], "x_test": GREY}, "must have 1 or 3 channels, the last of"),
        (
            {"x_train": GREY.astype(np.int32), "x_test": GREY},
            "must be unsigned bytes, .* got int32",
        ),
        (
            {"x_train": GREY / 1.0, "x_test": GREY},
            r"must be in \[0, 1\] where it is floating .*255",
        ),
        ({"x_train": GREY * np.nan, "x_test": GREY}, r"must be in \[0, 1\] .* got nan to nan"),
        (
            {"x_train": GREY, "x_test": GREY, "y_test": LABELS[:3]},
            r"must have shape \(12,\), one an",
        ),
        ({"x_train": GREY, "x_test": GREY, "y_train": LABELS / 2}, "must be integers, got float64"),
    ],
)
def test_arrays_that_are_no_images_are_named(
    tmp_path: Path, arrays: dict[str, npt.NDArray[np.generic]], sentence: str
) -> None:
    file = tmp_path / "images.npz"
    np.savez(file, **arrays)
    with pytest.raises(InputError, match=sentence) as caught:
        read_image_set("npz", path=str(file))
    assert "images.npz" in str(caught.value)


def test_files_that_are_no_npz_are_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "images.npz"
    with pytest.raises(
        InputError, match=r"images\.npz does not exist; data=npz takes a \.npz file"
    ):
        read_image_set("npz", path=str(file))
    with pytest.raises(InputError, match="is no file"):
        read_image_set("npz", path=str(tmp_path))
    np.savez(file, x_train=GREY, x_test=GREY)
    whole = file.read_bytes()
    for content in (b"", b"no archive at all", whole[: len(whole) // 2], whole[:200] + whole[300:]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"images\.npz cannot be read: "):
            read_image_set("npz", path=str(file))
    np.savez(file, x_train=np.array([GREY, None], dtype=object), x_test=GREY)
    with pytest.raises(InputError, match="holds Python objects, which are not read"):
        read_image_set("npz", path=str(file))


def test_torchvision_reads_the_same_images_from_the_same_folder(tmp_path: Path) -> None:
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_FILES:
        packed = (resources.files("vaeq.mnist") / f"{name}.gz").read_bytes()
        (raw / name).write_bytes(gzip.decompress(packed))
    found = read_image_set("kmnist", root=str(tmp_path))
    theirs = published.KMNIST(tmp_path, train=False)
    np.testing.assert_array_equal(found.test, theirs.data.numpy())
    assert found.test_labels is not None
    assert found.test_labels.tolist() == theirs.targets.tolist()
    # The files may lie in the folder itself, too, as Debian's do.
    assert read_image_set("kmnist", root=str(raw)).md5 == found.md5


def test_emnist_is_read_by_split_and_set_upright(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    write_idx(raw, GREY, prefix="emnist-letters-", end=".gz")
    found = read_image_set("emnist", root=str(tmp_path), split="letters")
    np.testing.assert_array_equal(found.train, GREY[:10].swapaxes(1, 2))
    with pytest.raises(
        InputError, match=r"EMNIST/raw has no emnist-digits-train-images-idx3-ubyte"
    ):
        read_image_set("emnist", root=str(tmp_path), split="digits")


def test_what_is_missing_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        InputError, match=r"FashionMNIST/raw has no .* dataset-fashion-mnist, or set"
    ):
        read_image_set("fashion_mnist", root=str(tmp_path))

    def offline(*arguments: object, **named: object) -> None:
        raise OSError("<urlopen error [Errno -2]\nName or service not known>")

    monkeypatch.setattr(published, "KMNIST", offline)
    with pytest.raises(InputError) as caught:
        read_image_set("kmnist", root=str(tmp_path), download=True)
    assert str(caught.value) == (
        "data=kmnist could not be downloaded (<urlopen error [Errno -2] Name or service not "
        f"known>); put its four IDX files, plain or .gz, in {tmp_path}/KMNIST/raw."
    )


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debian_has_fashion_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read_image_set("fashion_mnist")
    assert found.train.shape == (60_000, 28, 28)
    # The constants that every normalisation of Fashion-MNIST uses.
    assert found.train.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert found.train.std() / 255 == pytest.approx(0.3530, abs=5e-5)
    assert found.train_labels is not None
    assert np.bincount(found.train_labels).tolist() == [6000] * 10
    assert read_image_set("fashion_mnist", root=str(DEBIAN)).md5 == found.md5
