"""MNIST: the original bytes or a clear error, also when they were begun ahead."""

from __future__ import annotations

import gzip
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from vaeq.data import mnist as reader
from vaeq.data.images import Images, load_images
from vaeq.data.mnist import MNIST_FILES, read_ahead, read_mnist
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


def test_files_begun_ahead_are_read_once_and_come_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _copy_of_mnist(tmp_path)
    read: list[str] = []
    unpack = reader._unpack

    def counted(path: Path, limit: int) -> bytes:
        read.append(path.name)
        return unpack(path, limit)

    monkeypatch.setattr(reader, "_unpack", counted)
    read_ahead(str(folder))
    read_ahead(str(folder))
    found = read_mnist(str(folder))
    assert sorted(read) == sorted(f"{name}.gz" for name in MNIST_FILES)
    assert [len(values) for values in found] == [47_040_000, 60_000, 7_840_000, 10_000]
    assert found == read_mnist(None)
    # Nothing is kept: what is changed on disk is seen by the next one.
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\.gz does not exist"):
        read_mnist(str(folder))


def test_what_goes_wrong_ahead_is_said_when_it_is_asked_for(tmp_path: Path) -> None:
    read_ahead(str(tmp_path))
    assert len(read_mnist(None)) == 4
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz does not exist"):
        load_images(root=str(tmp_path))


def test_threads_may_ask_for_the_same_files_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Barrier(4)

    class Begun(dict[str | None, Any]):
        """All four have seen that the files are under way before one takes them."""

        def pop(self, *arguments: Any) -> Any:
            seen.wait()
            return super().pop(*arguments)

    monkeypatch.setattr(reader, "_under_way", Begun())

    def ask(root: str) -> str:
        with pytest.raises(InputError) as caught:
            read_mnist(root)
        return str(caught.value)

    with ThreadPoolExecutor(4) as pool:
        read_ahead(str(tmp_path))
        assert len(set(pool.map(ask, [str(tmp_path)] * 4))) == 1
