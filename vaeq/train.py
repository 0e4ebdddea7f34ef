"""Fit a VAE by stochastic gradient ascent on the ELBO with Adam (Kingma and Ba 2015).

The whole of the randomness of an epoch comes from one generator seeded by (seed, epoch): a run that
is resumed after any epoch gives the same bits as one that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vaeq.data import Images, epoch_batches
from vaeq.elbo import gaussian_kl, reconstruction
from vaeq.errors import TrainingDiverged
from vaeq.model import VAE
from vaeq.seeds import derive_seed

HISTORY_COLUMNS = (
    "epoch",
    "train_elbo",
    "train_reconstruction",
    "train_kl",
    "test_elbo",
    "test_reconstruction",
    "test_kl",
    "seconds",
)
# Steps between two calls of on_images: about ten a second, and none of them waits for the device.
_REPORT_EVERY = 32


@dataclass
class State:
    """Everything that training changes: enough to go on from the end of an epoch."""

    vae: VAE
    optimizer: torch.optim.Adam
    history: list[dict[str, float]] = field(default_factory=list)
    # Weights of the best held-out ELBO so far; kept only when early stopping is on.
    best: dict[str, Tensor] | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)


def fit(
    state: State,
    images: Images,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    beta: float = 1.0,
    kl_warmup_epochs: int = 0,
    schedule: str = "constant",
    early_stopping: int | None = None,
    bf16: bool = False,
    on_images: Callable[[int, int], None] = lambda epoch, done: None,
    on_epoch: Callable[[State], None] = lambda state: None,
) -> None:
    """Train ``state`` in place up to ``epochs`` epochs, from wherever it stands.

    The loss of a step is −mean(log p(x|z) − w KL(q(z|x) ‖ p)) in nats per image, z one
    reparameterised draw, w = β min(1, step / warm-up steps).

    Args:
        images: on the device of the weights.
        on_images: called with (epoch, images done in it) some ten times a second.
        on_epoch: called with the state after every epoch; the place to write a checkpoint.

    Raises:
        TrainingDiverged: the summed loss of an epoch, or its held-out ELBO, is not finite.
    """
    vae, optimizer, device = state.vae, state.optimizer, images.train.device
    steps = math.ceil(len(images.train) / batch_size)
    step = state.epoch * steps
    held_out = images.observed("test")
    while state.epoch < epochs and not _stalled(state, early_stopping):
        epoch = state.epoch + 1
        began = time.perf_counter()
        generator = torch.Generator(device).manual_seed(derive_seed(seed, "epoch", epoch))
        batches = epoch_batches(
            images.train, batch_size, generator, binarize=images.binarize == "dynamic"
        )
        totals = torch.zeros(2, device=device)
        for i, x in enumerate(batches):
            optimizer.param_groups[0]["lr"] = learning_rate * _lr_factor(
                schedule, step / (epochs * steps)
            )
            kl_weight = beta * min(1.0, (step + 1) / max(1, kl_warmup_epochs * steps))
            noise = torch.randn(len(x), vae.latent_dim, generator=generator, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, mean, logvar = vae(x, noise)
            log_px = reconstruction(logits.float(), x)
            kl = gaussian_kl(mean.float(), logvar.float())
            loss = (kl_weight * kl - log_px).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals += torch.stack((log_px.detach().sum(), kl.detach().sum()))
            step += 1
            if i % _REPORT_EVERY == 0:
                on_images(epoch, min((i + 1) * batch_size, len(images.train)))
        # The only wait for the device in an epoch: reading the sums.
        train_log_px, train_kl = (totals / len(images.train)).tolist()
        if not math.isfinite(train_log_px + train_kl):
            raise TrainingDiverged(epoch)
        test_log_px, test_kl = evaluate(vae, held_out, derive_seed(seed, "evaluate", epoch))
        if not math.isfinite(test_log_px + test_kl):
            raise TrainingDiverged(epoch)
        values = (
            epoch,
            train_log_px - train_kl,
            train_log_px,
            train_kl,
            test_log_px - test_kl,
            test_log_px,
            test_kl,
            time.perf_counter() - began,
        )
        state.history.append(dict(zip(HISTORY_COLUMNS, values, strict=True)))
        if early_stopping is not None and _epochs_since_best(state) == 0:
            state.best = {name: w.detach().clone() for name, w in vae.state_dict().items()}
        on_epoch(state)
    if state.best is not None:
        vae.load_state_dict(state.best)


def _lr_factor(schedule: str, progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0


def _epochs_since_best(state: State) -> int:
    elbos = [row["test_elbo"] for row in state.history]
    return len(elbos) - 1 - elbos.index(max(elbos))


def _stalled(state: State, early_stopping: int | None) -> bool:
    return (
        early_stopping is not None
        and state.epoch > 0
        and _epochs_since_best(state) >= early_stopping
    )


@torch.no_grad()
def evaluate(vae: VAE, images: Tensor, seed: int, batch_size: int = 4096) -> tuple[float, float]:
    """Mean reconstruction and KL in nats per image, for (M, pixels) uint8; one z an image."""
    generator = torch.Generator(images.device).manual_seed(seed)
    totals = torch.zeros(2, device=images.device)
    for part in images.split(batch_size):
        x = part.float().div_(255)
        noise = torch.randn(len(x), vae.latent_dim, generator=generator, device=x.device)
        logits, mean, logvar = vae(x, noise)
        totals += torch.stack((reconstruction(logits, x).sum(), gaussian_kl(mean, logvar).sum()))
    log_px, kl = (totals / len(images)).tolist()
    return log_px, kl
