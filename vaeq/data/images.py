"""Images as one uint8 tensor on the device: no loader, no workers, one gather a batch.

MNIST is read by ``vaeq.data.mnist``, others by ``vaeq.data.datasets``, or drawn by
``vaeq.data.synthetic``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vaeq.data.datasets import read_image_set
from vaeq.data.mnist import MNIST_FILES, read_mnist
from vaeq.data.synthetic import draw_images
from vaeq.errors import InputError

# The fixed draws of data.binarize=static, and of the images that are measured when it is dynamic.
# They belong to the data, not to the run: two seeds of a run must see the same images.
BINARIZE_SEED = 20_080_623


@dataclass(frozen=True)
class Images:
    """Training and held-out images of one data set."""

    name: str
    md5: str
    train: Tensor  # (N, pixels) uint8
    train_labels: Tensor | None  # (N,) integers
    test: Tensor  # (M, pixels) uint8
    test_labels: Tensor | None  # (M,) integers
    binarize: str = "none"
    shape: tuple[int, ...] = (28, 28)  # height, width and, of colour images, 3 channels

    @property
    def pixels(self) -> int:
        """Observed variables in an image: a colour pixel is three."""
        return self.train.shape[1]

    def unflatten(self, images: Tensor) -> Tensor:
        """Images (n, pixels) in their shape, (n, height, width) or (n, height, width, 3)."""
        return images.view(-1, *self.shape).cpu().contiguous()

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
        return replace(self, train=self.train.to(device), test=self.test.to(device))


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
    path: str | None = None,
    md5: str | None = None,
    split: str | None = None,
    download: bool = False,
    binarize: str = "none",
    n_train: int | None = None,
    n_test: int | None = None,
    synthetic_dim: int = 4,
    synthetic_side: int = 8,
    synthetic_signal: float = 4.0,
    synthetic_seed: int = 0,
) -> Images:
    """Read a data set.

    Args:
        name: ``mnist`` (packaged), ``synthetic_ppca``, or one of :mod:`vaeq.data.datasets`.
        root: folder of the files of a named data set; None takes the packaged MNIST or
            ``~/.cache/vaeq``.
        path: the folder of ``idx``, the file of ``npz``.
        md5: what the MD5 of the images must be; None takes any.
        split: of ``emnist``.
        download: let torchvision fetch what is missing.
        binarize: ``none``, ``dynamic`` or ``static``; static draws once, here.
        n_train, n_test: keep the first n images.
        synthetic_dim, synthetic_side, synthetic_signal, synthetic_seed: see
            :mod:`vaeq.data.synthetic`.

    Raises:
        InputError: a file is missing, damaged or not what its name says; its images are none that
            are read; their MD5 is another; or n exceeds the number of images.
    """
    if name == "mnist":
        images = _read_mnist(root)
    elif name == "synthetic_ppca":
        images = _draw_synthetic(synthetic_dim, synthetic_side, synthetic_signal, synthetic_seed)
    else:
        images = _read_files(name, root, download, split, path)
    if md5 is not None and md5 != images.md5:
        raise InputError(
            f"data.md5={md5} is asked for, and data={name} has MD5 {images.md5} now; restore the "
            "files, or leave data.md5 out for another run of its own."
        )
    for field, wanted, available in (
        ("data.n_train", n_train, len(images.train)),
        ("data.n_test", n_test, len(images.test)),
    ):
        if wanted is not None and wanted > available:
            raise InputError(
                f"{field} must be at most {available}, the images in {name}, got {wanted}."
            )
    images = replace(
        images,
        train=images.train[:n_train],
        train_labels=None if images.train_labels is None else images.train_labels[:n_train],
        test=images.test[:n_test],
        test_labels=None if images.test_labels is None else images.test_labels[:n_test],
        binarize=binarize,
    )
    if binarize == "static":
        train, test = images.observed("train"), images.observed("test")
        return replace(images, train=train, test=test, binarize="none")
    return images


def _read_mnist(root: str | None) -> Images:
    arrays = [
        torch.frombuffer(content, dtype=torch.uint8).view(shape)
        for content, (_, shape) in zip(read_mnist(root), MNIST_FILES.values(), strict=True)
    ]
    train, train_labels, test, test_labels = arrays
    digest = hashlib.md5(usedforsecurity=False)
    for md5, _ in MNIST_FILES.values():
        digest.update(md5.encode())
    return Images(
        "mnist", digest.hexdigest(), train.flatten(1), train_labels, test.flatten(1), test_labels
    )


def _read_files(
    name: str, root: str | None, download: bool, split: str | None, path: str | None
) -> Images:
    found = read_image_set(name, root=root, download=download, split=split, path=path)
    train, test = torch.from_numpy(found.train), torch.from_numpy(found.test)
    labels = (
        None if part is None else torch.from_numpy(part)
        for part in (found.train_labels, found.test_labels)
    )
    train_labels, test_labels = labels
    return Images(
        name,
        found.md5,
        train.flatten(1),
        train_labels,
        test.flatten(1),
        test_labels,
        shape=tuple(train.shape[1:]),
    )


def _draw_synthetic(dim: int, side: int, signal: float, seed: int) -> Images:
    train, test = draw_images(dim, side, signal, seed)
    digest = hashlib.md5(usedforsecurity=False)
    for part in (train, test):
        digest.update(part.numpy().data)
    return Images("synthetic_ppca", digest.hexdigest(), train, None, test, None, shape=(side, side))
