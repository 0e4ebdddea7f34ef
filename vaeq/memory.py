"""How much memory a run takes, before it takes it, and how much there is.

    bytes = process + images + the larger of (training, measuring)

No torch in this module: a sweep asks before any worker starts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vaeq.config import RunConfig
from vaeq.errors import InputError
from vaeq.models.sizes import (
    Sizes,
    convolutional_decoder,
    convolutional_encoder,
    perceptron,
)

# A worker with torch and its kernels loaded, what its first steps allocate included.
PROCESS = 480 * 2**20
# Images of the largest data set that ships or is read by name, and their height and width.
_IMAGES, _TEST_IMAGES, _SHAPE = 60_000, 10_000, (28, 28)
# Images encoded at a time, when training is over, and in the evaluation after an epoch.
_ENCODED_BATCH, _EVALUATED_BATCH = 4096, 1024
# Steps whose images and noise are drawn at once.
_BLOCK = 32
# Models encoded together, and on a GPU measured: their codes are held at once.
TOGETHER = 16
# What the estimators hold beside the codes: tiles, panels, fitted mixtures.
_ESTIMATORS = 150 * 2**20


@dataclass(frozen=True)
class Need:
    """Bytes of a run at its peak, by what they are for."""

    process: int
    images: int
    training: int  # weights, gradients, Adam's moments, activations, and the checkpoint in writing
    measuring: int  # weights, codes, activations of encoding, estimators

    @property
    def more(self) -> int:
        """Beyond what a process holds that has its images; training and measuring take turns."""
        return max(self.training, self.measuring)

    @property
    def total(self) -> int:
        """Of a process from its start to its end."""
        return self.process + self.images + self.more


def networks(config: RunConfig, shape: Sequence[int] = _SHAPE) -> tuple[Sizes, Sizes]:
    """Encoder and decoder of a run of images (height, width[, channels]), not ppca's."""
    encoder = config.encoder_depth, config.encoder_width
    decoder = config.decoder_depth, config.decoder_width
    if config.model == "conv":
        return (
            convolutional_encoder(shape, *encoder, config.latent_dim),
            convolutional_decoder(shape, *decoder, config.latent_dim),
        )
    pixels = math.prod(shape)
    return (
        perceptron(pixels, *encoder, 2 * config.latent_dim),
        perceptron(config.latent_dim, *decoder, pixels),
    )


def needed(
    config: RunConfig,
    *,
    members: int = 1,
    at_once: int = 1,
    shape: Sequence[int] = _SHAPE,
    n_train: int | None = None,
    n_test: int | None = None,
) -> Need:
    """The memory that runs of networks, so many members in one program, take at their peak.

    In units of the parameters of one member, four bytes each: a member holds its weights and both
    moments (3), and in the program weights, gradients, moments and what is multiplied (5), and of
    those is copied what the end of an epoch keeps (2). For one member at a time a copy of the whole
    (2) and its checkpoint in writing, twice (6). A layer's inputs and outputs stay until the step,
    or the batch that is encoded, is over.

    Args:
        config: of the run; where ``members`` is larger, the one with most weights.
        members: of an ensemble; 1 for a run by itself.
        at_once: members that are measured side by side.
        shape, n_train, n_test: of its images, where they are known; else MNIST's, or what
            ``data.n_train`` and ``data.n_test`` leave of them.

    Returns:
        Bytes, within a factor of 1.5 of the peak resident memory that ``tests/test_memory.py``
        measures.
    """
    n_train = n_train or config.data.n_train or _IMAGES
    n_test = n_test or config.data.n_test or _TEST_IMAGES
    encoder, decoder = networks(config, shape)
    pixels = math.prod(shape)
    parameters = 4 * (encoder.weights + decoder.weights)
    held = 2 * 4 * sum(encoder.units + decoder.units)  # an image's inputs and outputs of all layers
    # Data sets are read whole, in one copy more than is kept.
    images = 2 * max(n_train + n_test, _IMAGES + _TEST_IMAGES) * pixels
    batch = min(config.batch_size, n_train)
    block = members * min(_BLOCK * batch, n_train) * (pixels + 4 * config.latent_dim)
    steps = max(2 * batch * held, min(_EVALUATED_BATCH, n_test) * held)
    codes = 8 * config.latent_dim * (n_train + n_test)
    training = members * (10 * parameters + steps) + 8 * parameters + block
    together = min(members, TOGETHER)
    encoding = min(_ENCODED_BATCH, n_train) * 8 * sum(encoder.units) * together
    estimators = min(members, at_once) * (_ESTIMATORS + 3 * codes)
    measuring = members * 3 * parameters + together * (parameters + codes)
    measuring += max(encoding, estimators)
    return Need(PROCESS, images, training, measuring)


def require_memory(need: Need, available: int, place: str, config: RunConfig) -> None:
    """Refuse a run that would not fit, before it begins but with its images at hand.

    Args:
        available: bytes that can still be taken at ``place``.
        place: where, in words: ``this machine``, or the name of a GPU.

    Raises:
        InputError: with the estimate, what there is, and what makes it smaller.
    """
    if need.more > available:
        encoder, decoder = (sum(network.units) for network in networks(config))
        larger = "encoder" if encoder >= decoder else "decoder"
        width, depth = (getattr(config, f"{larger}_{name}") for name in ("width", "depth"))
        raise InputError(
            f"a run of {larger}_width={width}, {larger}_depth={depth}, "
            f"latent_dim={config.latent_dim} needs about {gigabytes(need.more)} of memory, and "
            f"{place} has {gigabytes(available)} free; lower {larger}_width, {larger}_depth or "
            "batch_size."
        )


def gigabytes(count: int) -> str:
    """``3.2 GiB``."""
    return f"{count / 2**30:.1f} GiB"


def fitting(configs: Sequence[RunConfig], available: int) -> int:
    """How many of the largest of some runs fit side by side, a process each; at least 1."""
    total = count = 0
    for need in sorted((needed(config).total for config in configs), reverse=True):
        total += need
        if total > available:
            break
        count += 1
    return max(1, count)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: what the machine has free, and its control groups allow.

    Where neither says anything it is 2^63.
    """
    free = [2**63]
    try:
        for line in (root / "proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        groups = (root / "proc/self/cgroup").read_text("utf-8", "surrogateescape").splitlines()
    except (OSError, ValueError, IndexError):
        return min(free)
    for group in groups:
        number, controllers, path = group.split(":", 2)
        if number == "0":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = Path(path.lstrip("/"))
        for folder in {base / own, *(base / parent for parent in own.parents), base}:
            with contextlib.suppress(OSError, ValueError):  # no limit here, or it is "max"
                limit, used = (int((folder / name).read_text("utf-8")) for name in names)
                free.append(max(0, limit - used))
    return min(free)
