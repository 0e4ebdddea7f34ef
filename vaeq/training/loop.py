"""Fit VAEs by stochastic gradient ascent on the ELBO with Adam (Kingma and Ba 2015).

The whole of the randomness of an epoch comes from one generator a run, seeded by (seed, epoch): a
run that is resumed after any epoch gives the same bits as one that was never interrupted, and one
that trains beside others draws the same batches and noise as alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vaeq import lockstep
from vaeq.data.images import Images, bernoulli_draw
from vaeq.divergence import marginal_kl, moment_kl
from vaeq.errors import InputError, TrainingDiverged, VaeqError
from vaeq.models.conv import ConvVAE
from vaeq.models.elbo import gaussian_kl, reconstruction
from vaeq.models.mlp import VAE
from vaeq.posterior.aggregated import AggregatedPosterior
from vaeq.seeds import derive_seed
from vaeq.training.autograd import Autograd
from vaeq.training.ensemble import CapturedSteps, Ensemble, Moments

HISTORY_COLUMNS = (
    "epoch",
    "train_elbo",
    "train_reconstruction",
    "train_kl",
    "test_elbo",
    "test_reconstruction",
    "test_kl",
    # KL(q_M ‖ p) and moment_kl of the M held-out images' aggregated posterior: how far the codes
    # are, as training goes on. Its ceiling is the held-out KL − log M; the measures are elsewhere.
    "test_marginal_kl",
    "test_moment_kl",
    "seconds",
)
# Steps whose images and noise are drawn at once: a few calls of the generator an epoch, and memory
# that does not grow with the data. A part of what the seed means: another value, other draws.
_BLOCK = 32
# Draws for the divergence by epoch: an error of some hundredths of a nat, in milliseconds.
_DRAWS = 1000


Program = Ensemble | Autograd


@dataclass
class State:
    """Everything that training changes: enough to go on from the end of an epoch."""

    vae: VAE
    moments: Moments = field(default_factory=Moments)
    history: list[dict[str, float]] = field(default_factory=list)
    # Weights of the best held-out ELBO so far; kept only when early stopping is on.
    best: dict[str, Tensor] | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; the meanings are those of ``vaeq train --help``."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    beta: float = 1.0
    kl_warmup_epochs: int = 0
    learning_rate_warmup_steps: int = 0
    schedule: str = "constant"
    early_stopping: int | None = None


def fit(
    state: State,
    images: Images,
    recipe: Recipe,
    *,
    precision: str = "fp32",
    kernels: str = "torch",
    on_images: Callable[[int, int], None] = lambda epoch, done: None,
    on_epoch: Callable[[State], None] = lambda state: None,
) -> None:
    """Train ``state`` in place, from wherever it stands: an ensemble of one.

    Raises:
        TrainingDiverged: the summed loss of an epoch, or its held-out ELBO, is not finite.
    """

    def failed(member: int, error: VaeqError) -> None:
        raise error

    fit_together(
        [state],
        images,
        [recipe],
        precision=precision,
        kernels=kernels,
        on_images=on_images,
        on_epoch=lambda member: on_epoch(state),
        on_failed=failed,
    )


def fit_together(
    states: Sequence[State],
    images: Images,
    recipes: Sequence[Recipe],
    *,
    precision: str = "fp32",
    kernels: str = "torch",
    on_images: Callable[[int, int], None] = lambda epoch, done: None,
    on_epoch: Callable[[int], None] = lambda member: None,
    on_failed: Callable[[int, VaeqError], None],
) -> None:
    """Train all ``states`` in place as one program, each by its own recipe.

    The loss of a step is −mean(log p(x|z) − w KL(q(z|x) ‖ p)) in nats per image, z one
    reparameterised draw, w = β min(1, step / warm-up steps). A member that is done, by its epochs,
    by early stopping or because its loss is no number, leaves the program; the others go on. One
    whose ``on_epoch`` fails leaves, too.

    Args:
        states: at the same epoch; models of one shape but for the latent dimension, and a
            convolutional one by itself.
        images: on the device of the weights.
        recipes: with one epochs, batch_size, warm-up of the learning rate and schedule; the rest
            may differ.
        precision: of the matrix products of the training step, see ``ensemble.PRECISIONS``.
        kernels: what takes the steps, ``compiled`` or ``torch``, see ``kernels``.
        on_images: called with (epoch, images done in it) every 32 steps; nothing waits for it.
        on_epoch: called with a member's index after its every epoch; its state is up to date. A
            VaeqError that it raises is that member's failure.
        on_failed: called with a member's index and the reason; its state is that of the last good
            epoch.
    """
    held_out = images.observed("test")
    active = [i for i in range(len(states)) if not _done(states[i], recipes[i])]
    with _matmul_precision(precision):
        while active:
            ensemble = _program(
                [states[i].vae for i in active],
                [states[i].moments for i in active],
                [recipes[i].learning_rate for i in active],
                precision,
                kernels,
            )
            step: Callable[[Tensor, Tensor, Tensor], None] = ensemble.step
            if isinstance(ensemble, Ensemble) and ensemble.device.type == "cuda":
                step = CapturedSteps(ensemble)
            staying = active
            while staying == active:
                began = time.perf_counter()
                some = [recipes[i] for i in active]
                epoch = states[active[0]].epoch + 1
                train_epoch(ensemble, images, some, epoch, step, on_images)
                rows = _history_rows(ensemble, images, held_out, some, epoch, began)
                staying = []
                for place, (i, row) in enumerate(zip(active, rows, strict=True)):
                    if not math.isfinite(row["train_elbo"] + row["test_elbo"]):
                        on_failed(i, TrainingDiverged(epoch))
                        continue
                    _take(states[i], ensemble, place, row, recipes[i])
                    try:
                        on_epoch(i)
                    except VaeqError as error:
                        on_failed(i, error)
                        continue
                    if not _done(states[i], recipes[i]):
                        staying.append(i)
            active = staying
    for state in states:
        if state.best is not None:
            state.vae.load_state_dict(state.best)


def _program(
    vaes: Sequence[VAE],
    moments: Sequence[Moments],
    learning_rates: Sequence[float],
    precision: str,
    kernels: str,
) -> Program:
    """What takes the steps: stacked linear layers, or one network of others by autograd."""
    if isinstance(vaes[0], ConvVAE):
        return Autograd(vaes, moments, learning_rates, precision)
    return Ensemble(vaes, moments, learning_rates, precision, kernels)


def train_epoch(
    ensemble: Program,
    images: Images,
    recipes: Sequence[Recipe],
    epoch: int,
    step: Callable[[Tensor, Tensor, Tensor], None],
    on_images: Callable[[int, int], None] = lambda epoch, done: None,
) -> None:
    """All steps of one epoch; nothing in it waits for the device."""
    n, batch_size, device = len(images.train), recipes[0].batch_size, ensemble.device
    steps = math.ceil(n / batch_size)
    generators = [
        torch.Generator(device).manual_seed(derive_seed(recipe.seed, "epoch", epoch))
        for recipe in recipes
    ]
    orders = torch.stack([torch.randperm(n, generator=g, device=device) for g in generators])
    ensemble.totals.zero_()
    for block in range(0, steps, _BLOCK):
        chosen = orders[:, block * batch_size : (block + _BLOCK) * batch_size]
        x = images.train.index_select(0, chosen.flatten()).view(*chosen.shape, -1)  # (E, n, pixels)
        noise = torch.zeros(*chosen.shape, ensemble.widest, device=device)
        for e, generator in enumerate(generators):
            shape = chosen.shape[1], ensemble.latent_dims[e]
            noise[e, :, : shape[1]] = torch.randn(shape, generator=generator, device=device)
            if images.binarize == "dynamic":
                x[e] = bernoulli_draw(x[e], generator)
        first = (epoch - 1) * steps + block
        weights = _kl_weights(recipes, steps, range(first, first + _BLOCK)).to(device)
        parts = (x.split(batch_size, 1), noise.split(batch_size, 1), weights)
        for i, batch in enumerate(zip(*parts, strict=False), first):
            ensemble.scale_learning_rates(_rate_factor(recipes[0], i, steps))
            step(*batch)
        on_images(epoch, min((block + _BLOCK) * batch_size, n))


def _rate_factor(recipe: Recipe, i: int, steps: int) -> float:
    """The learning rate of step i, counted from 0, as a part of the recipe's own."""
    factor = min(1.0, (i + 1) / max(1, recipe.learning_rate_warmup_steps))
    if recipe.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * i / (recipe.epochs * steps)))
    elif recipe.schedule == "burda":
        # 10^(−k/7) for 3^k passes, k = 0, ..., 7, of 3,280 in all (Burda et al. 2016, section 5).
        passes = 3280 * i // (recipe.epochs * steps)
        factor *= 10 ** (-sum(passes >= (3**k - 1) // 2 for k in range(1, 8)) / 7)
    return factor


def _kl_weights(recipes: Sequence[Recipe], steps: int, block: range) -> Tensor:
    """w of every step of a block and every member, (steps, E, 1, 1)."""
    rows = [
        [r.beta * min(1.0, (i + 1) / max(1, r.kl_warmup_epochs * steps)) for r in recipes]
        for i in block
    ]
    return torch.tensor(rows)[:, :, None, None]


def _history_rows(
    ensemble: Program,
    images: Images,
    held_out: Tensor,
    recipes: Sequence[Recipe],
    epoch: int,
    began: float,
) -> list[dict[str, float]]:
    """One row of history a member. Reading the sums is the only wait for the device in an epoch."""
    train = (ensemble.totals / len(images.train)).T.tolist()
    test = evaluate(ensemble, held_out, [derive_seed(r.seed, "evaluate", epoch) for r in recipes])
    seconds = (time.perf_counter() - began) / len(ensemble)
    rows = []
    for (log_px, kl), held_out_row in zip(train, test, strict=True):
        row = {"epoch": epoch, "train_elbo": log_px - kl, "train_reconstruction": log_px}
        row |= {"train_kl": kl, **held_out_row, "seconds": seconds}
        rows.append({name: row[name] for name in HISTORY_COLUMNS})
    return rows


def _take(
    state: State, ensemble: Program, place: int, row: dict[str, float], recipe: Recipe
) -> None:
    """Bring the state of a member up to the end of the epoch."""
    weights, state.moments = ensemble.member(place)
    state.vae.load_state_dict(weights)
    state.history.append(row)
    if recipe.early_stopping is not None and _epochs_since_best(state) == 0:
        state.best = weights


def _done(state: State, recipe: Recipe) -> bool:
    stalled = (
        recipe.early_stopping is not None
        and state.epoch > 0
        and _epochs_since_best(state) >= recipe.early_stopping
    )
    return stalled or state.epoch >= recipe.epochs


def _epochs_since_best(state: State) -> int:
    elbos = [row["test_elbo"] for row in state.history]
    return len(elbos) - 1 - elbos.index(max(elbos))


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """TF32 products on a GPU where they were asked for, and never else; convolutions in order."""
    before = torch.get_float32_matmul_precision()
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def evaluate(
    ensemble: Program, images: Tensor, seeds: Sequence[int], batch_size: int = 1024
) -> list[dict[str, float]]:
    """The held-out columns of the history of every member, for images (M, pixels) uint8.

    In float32 whatever the training's precision; one z an image. A divergence that cannot be had
    is NaN.
    """
    device = ensemble.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    sums = torch.zeros(2, len(ensemble), dtype=torch.float64, device=device)
    codes = [torch.empty(2, len(images), d, device=device) for d in ensemble.latent_dims]
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        x = images[part].float().div_(255)[None]
        mean, logvar = ensemble.encode(x)
        noise = torch.zeros_like(mean)
        for e, own in enumerate(codes):
            latent_dim = own.shape[2]
            shape = x.shape[1], latent_dim
            noise[e, :, :latent_dim] = torch.randn(shape, generator=generators[e], device=device)
            own[0, part], own[1, part] = mean[e, :, :latent_dim], logvar[e, :, :latent_dim]
        logits = ensemble.decode(mean + torch.exp(0.5 * logvar) * noise)
        sums[0] += reconstruction(logits, x).sum(1)
        sums[1] += gaussian_kl(mean, logvar).sum(1)
    means = (sums / len(images)).T.tolist()
    divergences = lockstep.side_by_side(_divergence, zip(codes, generators, strict=True), device)
    return [
        {"test_elbo": log_px - kl, "test_reconstruction": log_px, "test_kl": kl, **divergence}
        for (log_px, kl), divergence in zip(means, divergences, strict=True)
    ]


def _divergence(member: tuple[Tensor, torch.Generator]) -> dict[str, float]:
    codes, generator = member
    names = "test_marginal_kl", "test_moment_kl"
    if not codes.isfinite().all():
        return dict.fromkeys(names, math.nan)
    try:
        posterior = AggregatedPosterior(codes[0], codes[1])
    except InputError:  # variances that no density is computed for; the others of a program go on
        return dict.fromkeys(names, math.nan)
    found = marginal_kl(posterior, _DRAWS, generator), moment_kl(posterior)
    values = (math.nan if estimate.value is None else estimate.value for estimate in found)
    return dict(zip(names, values, strict=True))
