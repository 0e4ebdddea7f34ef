"""Images as one uint8 tensor on the device: no loader, no workers, one gather a batch.

MNIST (LeCun, Cortes and Burges, 1998) ships inside the package as its four original IDX files; the
MD5 of the uncompressed bytes is checked at every load. Other data sets come through torchvision.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaeq.errors import InputError

# file → (MD5 of the uncompressed bytes, shape), of the original distribution.
MNIST_FILES = {
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", (60_000,)),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", (10_000,)),
}
# The fixed draws of data.binarize=static, and of the images that are measured when it is dynamic.
# They belong to the data, not to the run: two seeds of a run must see the same images.
BINARIZE_SEED = 20_080_623


@dataclass(frozen=True)
class Images:
    """Training and held-out images of one data set."""

    name: str
    md5: str
    train: Tensor  # (N, pixels) uint8
    train_labels: Tensor  # (N,) uint8
    test: Tensor  # (M, pixels) uint8
    test_labels: Tensor  # (M,) uint8
    binarize: str = "none"

    @property
    def pixels(self) -> int:
        return self.train.shape[1]

    def observed(self, part: str) -> Tensor:
        """The images an encoder is measured on, (N, pixels) uint8 in 0..255.

        With ``binarize=none`` the grey levels; else one fixed Bernoulli draw, the same for every
        run, so that an aggregated posterior is a mixture over N definite images.
        """
        images: Tensor = getattr(self, part)
        if self.binarize == "none":
            return images
        generator = torch.Generator().manual_seed(BINARIZE_SEED + (part == "test"))
        return bernoulli_draw(images.cpu(), generator).to(images.device)

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        return Images(
            self.name,
            self.md5,
            self.train.to(device),
            self.train_labels,
            self.test.to(device),
            self.test_labels,
            self.binarize,
        )


def bernoulli_draw(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels drawn 255 with probability level/255, else 0; uint8 of the shape of ``images``."""
    result = torch.empty_like(images)
    # In blocks: the uniforms of 60,000 images would take 190 MB at once.
    for rows, out in zip(images.split(4096), result.split(4096), strict=True):
        uniform = torch.rand(rows.shape, generator=generator, device=images.device)
        torch.mul(uniform * 255 < rows, 255, out=out)
    return result


def mean_image(images: Tensor) -> Tensor:
    """Each pixel's chance to be lit, (pixels,) float32 inside (0, 1), from (N, pixels) uint8.

    (Σ x + ½) / (N + 1), the estimate of Krichevsky and Trofimov (1981): no pixel is ever certain.
    """
    lit = images.sum(0, dtype=torch.float64) / 255
    return ((lit + 0.5) / (len(images) + 1)).float()


def load_images(
    name: str = "mnist",
    *,
    root: str | None = None,
    download: bool = False,
    binarize: str = "none",
    n_train: int | None = None,
    n_test: int | None = None,
) -> Images:
    """Read a data set.

    Args:
        name: ``mnist`` (packaged), ``fashion_mnist`` or ``kmnist`` (through torchvision).
        root: folder of the data files; None takes the packaged MNIST or ``~/.cache/vaeq``.
        download: let torchvision fetch what is missing.
        binarize: ``none``, ``dynamic`` or ``static``; static draws once, here.
        n_train, n_test: keep the first n images.

    Raises:
        InputError: a file is missing, truncated, not IDX, or its MD5 is not the known one; or n
            exceeds the number of images.
    """
    if name == "mnist":
        train, train_labels, test, test_labels, md5 = _read_mnist(root)
    else:
        train, train_labels, test, test_labels, md5 = _read_torchvision(name, root, download)
    for field, wanted, available in (
        ("data.n_train", n_train, len(train)),
        ("data.n_test", n_test, len(test)),
    ):
        if wanted is not None and wanted > available:
            raise InputError(
                f"{field} must be at most {available}, the images in {name}, got {wanted}."
            )
    images = Images(
        name,
        md5,
        train[:n_train].flatten(1),
        train_labels[:n_train],
        test[:n_test].flatten(1),
        test_labels[:n_test],
        binarize,
    )
    if binarize == "static":
        return Images(
            name,
            md5,
            images.observed("train"),
            images.train_labels,
            images.observed("test"),
            images.test_labels,
            "none",
        )
    return images


def _read_mnist(root: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    folder: Traversable = resources.files("vaeq.mnist") if root is None else Path(root)
    arrays: list[Tensor] = []
    digest = hashlib.md5(usedforsecurity=False)
    for name, (md5, shape) in MNIST_FILES.items():
        content = _read_gzip(folder / f"{name}.gz", 16 + int(np.prod(shape)))
        actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if actual != md5:
            raise InputError(
                f"{folder / name}.gz is not the original MNIST file: MD5 {actual} instead of "
                f"{md5}; restore the file, or leave data.root unset to use the packaged one."
            )
        digest.update(md5.encode())
        # The MD5 vouches for the header; an images file has 16 bytes of it, a labels file 8.
        arrays.append(torch.from_numpy(np.frombuffer(content, np.uint8).copy()))
        arrays[-1] = arrays[-1][4 + 4 * len(shape) :].view(shape)
    train, train_labels, test, test_labels = arrays
    return train, train_labels, test, test_labels, digest.hexdigest()


def _read_gzip(path: Traversable, limit: int) -> bytes:
    """The uncompressed bytes, at most ``limit`` + 1 of them: a larger file fails its MD5."""
    try:
        with path.open("rb") as raw, gzip.open(raw) as stream:
            return stream.read(limit + 1)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; put the four MNIST .gz files there, or leave data.root unset."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}; restore the file.") from None


def _read_torchvision(
    name: str, root: str | None, download: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    from torchvision import datasets

    family = {"fashion_mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}[name]
    folder = Path(root or "~/.cache/vaeq").expanduser()
    parts = []
    digest = hashlib.md5(usedforsecurity=False)
    for train in (True, False):
        try:
            part = family(folder, train=train, download=download)
        except (RuntimeError, OSError, EOFError) as error:
            place = folder / family.__name__ / "raw"
            reason = str(error).splitlines()[0]
            raise InputError(
                f"data={name} cannot be read ({reason}); put its four IDX files in {place}, "
                "or set data.download=true where the network allows it."
            ) from None
        digest.update(part.data.numpy().tobytes())
        parts += [part.data.to(torch.uint8), part.targets.to(torch.uint8)]
    return parts[0], parts[1], parts[2], parts[3], digest.hexdigest()
