"""A small convolutional network that tells digits apart, for features and classes of images.

Trained here, once, and kept: distances of image distributions need features, and no weights are
downloaded. LeCun et al. (1998) for the architecture, Smith & Topin (2018) for the schedule.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from vaeq.errors import DiskError, InputError
from vaeq.files.foreign import require_regular
from vaeq.runs.record import lock, remove_temporaries, write_atomic
from vaeq.seeds import derive_seed

# Raise it when anything here changes what is trained.
VERSION = 1
ARCHITECTURE = "conv 5x5/2 16, conv 3x3 32, pool, conv 3x3 64, pool, linear 64, linear 10"
FEATURES = 64
EPOCHS = 4
BATCH_SIZE = 256
PEAK_LEARNING_RATE = 6e-3
WEIGHT_DECAY = 1e-2
# Its own: runs with different seeds are measured by the same classifier.
SEED = 0
_SIDE = 28


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Maximum and rectifier commute: the same bits, and a fourth of the rectifier's work.
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 9, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        images = x.view(-1, 1, _SIDE, _SIDE).contiguous(memory_format=torch.channels_last)
        features = self.body(images)
        return features, self.head(features)


@dataclass(frozen=True)
class Classifier:
    """A trained network: call it for the penultimate features (B, 64) and the logits (B, 10)."""

    network: _Network
    accuracy: float  # on images it was not trained on
    checksum: str  # of the weights: training repeats itself on one machine, not on all
    trained: bool  # here and now, rather than read from the folder

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 1000) -> tuple[Tensor, Tensor]:
        """Of images (B, pixels), uint8 or grey levels in [0, 1]."""
        parts = [self.network(_unit(part)) for part in images.split(batch_size)]
        return torch.cat([f for f, _ in parts]), torch.cat([logits for _, logits in parts])


def load_classifier(
    folder: Path,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    data_md5: str,
) -> Classifier:
    """The classifier kept in ``folder`` for this data, trained first where there is none.

    The file's name and its metadata carry a hash of the settings above, the data and the number of
    images; a file that is damaged, or holds something else, is not used but replaced. One process
    trains while others wait for its file.

    Args:
        folder: made if it does not exist.
        train, test: (N, 784) uint8, and labels (N,) below 10; test measures the accuracy alone.
        data_md5: what tells one data set from another.

    Raises:
        DiskError: the folder cannot be written.
    """
    for name, images in (("train", train), ("test", test)):
        if images.ndim != 2 or images.shape[1] != _SIDE**2:
            raise InputError(f"{name} must have shape (N, {_SIDE**2}), got {tuple(images.shape)}.")
    identity = classifier_hash(data_md5, len(train), len(test))
    path = folder / f"classifier-{identity[:8]}.safetensors"
    own = lock(path.with_suffix(".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.acquire()
    except OSError as error:
        raise DiskError(folder, error) from None
    with own:
        found = _read(path, identity, train.device)
        if found is not None:
            return found
        network = train_classifier(train, train_labels)
        accuracy = _accuracy(network, test, test_labels)
        tensors = _weights(network)
        checksum = _checksum(tensors, accuracy)
        metadata = {
            "identity": identity,
            "accuracy": json.dumps(accuracy),
            "checksum": checksum,
        }
        remove_temporaries(folder, f"{path.name}.*")
        write_atomic(path, save(tensors, metadata))
    return Classifier(network, accuracy, checksum, trained=True)


def classifier_hash(data_md5: str, n_train: int, n_test: int) -> str:
    """SHA-256 of what the weights and the accuracy depend on."""
    training = (EPOCHS, BATCH_SIZE, PEAK_LEARNING_RATE, WEIGHT_DECAY, SEED)
    content = json.dumps([VERSION, ARCHITECTURE, FEATURES, training, data_md5, n_train, n_test])
    return hashlib.sha256(content.encode()).hexdigest()


def train_classifier(train: Tensor, labels: Tensor) -> _Network:
    """A few epochs of AdamW on cross-entropy, the learning rate up and down once, images as are."""
    device = train.device
    # The initial weights come from torch's own initialisers, which know the global stream alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(SEED, "classifier", "weights"))
        network = _Network()
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    generator = torch.Generator().manual_seed(derive_seed(SEED, "classifier", "order"))
    targets = labels.to(device).long()
    # A last batch of few images would spoil the running statistics: it is left out.
    steps = max(1, len(train) // BATCH_SIZE)
    step = 0
    network.train()
    with torch.enable_grad():
        for _ in range(EPOCHS):
            order = torch.randperm(len(train), generator=generator).to(device)
            for index in order.split(BATCH_SIZE)[:steps]:
                rate = _one_cycle(step / (EPOCHS * steps))
                optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * rate
                _, logits = network(_unit(train[index]))
                loss = functional.cross_entropy(logits, targets[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
    network.eval()
    return network.requires_grad_(False)


def _one_cycle(progress: float) -> float:
    """From near 0 up to 1 in the first quarter, then down along half a cosine."""
    if progress < 0.25:
        return 0.05 + 0.95 * progress / 0.25
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.25) / 0.75))


@torch.no_grad()
def _accuracy(network: _Network, images: Tensor, labels: Tensor) -> float:
    logits = torch.cat([network(_unit(part))[1] for part in images.split(1000)])
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())


def _unit(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()


def _weights(network: _Network) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}


def _checksum(tensors: dict[str, Tensor], accuracy: float) -> str:
    digest = hashlib.sha256(repr(accuracy).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, identity: str, device: torch.device) -> Classifier | None:
    """The kept classifier, or None where there is none that can be trusted."""
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        accuracy = float(json.loads(metadata["accuracy"]))
        checksum = _checksum(tensors, accuracy)
        if metadata["identity"] != identity or metadata["checksum"] != checksum:
            return None
        network = _Network()
        network.load_state_dict(tensors)
    # Of safetensors, JSON, NumPy and torch, whatever they raise on a file that is not ours.
    except Exception:
        return None
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.eval()
    return Classifier(network.requires_grad_(False), accuracy, checksum, trained=False)
