"""Training: it learns, it is reproducible to the bit, it stops when the loss is no number."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from vaeq.data.images import Images
from vaeq.divergence import marginal_kl, moment_kl
from vaeq.errors import TrainingDiverged
from vaeq.models.elbo import gaussian_kl, reconstruction
from vaeq.models.mlp import VAE
from vaeq.posterior.aggregated import AggregatedPosterior
from vaeq.seeds import derive_seed
from vaeq.training.ensemble import Ensemble, encode_all
from vaeq.training.loop import (
    HISTORY_COLUMNS,
    Recipe,
    State,
    _divergence,
    _rate_factor,
    evaluate,
    fit,
    train_epoch,
)


def fresh(seed: int = 0, latent_dim: int = 3) -> State:
    vae = VAE(
        784,
        latent_dim,
        encoder_depth=1,
        encoder_width=24,
        decoder_depth=1,
        decoder_width=24,
        activation="relu",
        generator=torch.Generator().manual_seed(seed),
    )
    return State(vae)


def train(images: Images, state: State | None = None, **changes: Any) -> State:
    state = state or fresh()
    settings = {"epochs": 2, "batch_size": 64, "learning_rate": 1e-3, "seed": 0}
    own = ("precision", "on_images", "on_epoch")
    others = {name: changes.pop(name) for name in own if name in changes}
    fit(state, images, Recipe(**{**settings, **changes}), **others)
    return state


def weights(state: State) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.vae.parameters()])


def test_the_elbo_rises_on_held_out_digits(small: Images) -> None:
    history = train(small, epochs=8).history
    elbos = [row["test_elbo"] for row in history]
    # Nothing learned is 784 log 2 = 543 nats; constant grey levels are about 207.
    assert elbos[-1] > elbos[0] > -784 * math.log(2)
    assert elbos[-1] > -260
    assert tuple(history[0]) == HISTORY_COLUMNS
    for row in history:
        assert row["test_elbo"] == pytest.approx(row["test_reconstruction"] - row["test_kl"])
        assert row["seconds"] > 0


def test_the_divergence_of_the_held_out_codes_is_followed(small: Images) -> None:
    state = train(small, epochs=3)
    codes = encode_all([state.vae], small.test)[0]
    posterior = AggregatedPosterior(*codes)
    exact = marginal_kl(posterior, 20_000, torch.Generator().manual_seed(1))
    last = state.history[-1]
    assert exact.value is not None
    assert exact.std_error is not None
    # 1,000 draws against 20,000.
    error = exact.std_error * 20**0.5
    assert last["test_marginal_kl"] == pytest.approx(exact.value, abs=4 * error)
    assert last["test_moment_kl"] == pytest.approx(moment_kl(posterior).value, rel=1e-4)
    assert last["test_moment_kl"] < last["test_marginal_kl"] < last["test_kl"]


def test_same_seed_same_bits_and_another_seed_others(small: Images) -> None:
    first = weights(train(small))
    assert torch.equal(first, weights(train(small)))
    assert not torch.equal(first, weights(train(small, seed=1)))


def test_training_in_two_parts_gives_the_same_bits(small: Images) -> None:
    settings = {"schedule": "cosine", "kl_warmup_epochs": 2}
    whole = train(small, epochs=4, **settings)

    # The cosine runs over all four epochs: stop after two of them from outside, as a kill does.
    class StopAfterTwoError(Exception):
        pass

    def stop(state: State) -> None:
        if state.epoch == 2:
            raise StopAfterTwoError

    parts = fresh()
    with pytest.raises(StopAfterTwoError):
        train(small, parts, epochs=4, on_epoch=stop, **settings)
    train(small, parts, epochs=4, **settings)
    assert torch.equal(weights(whole), weights(parts))
    assert [r["test_elbo"] for r in whole.history] == [r["test_elbo"] for r in parts.history]


def test_the_gradient_step_is_adam_on_the_negative_elbo(small: Images) -> None:
    # One full-batch step, written out by hand.
    state = fresh()
    images = small.train[:50]
    one = Images("mnist", "", images, small.train_labels[:50], small.test, small.test_labels)
    reference = fresh()
    generator = torch.Generator().manual_seed(derive_seed(0, "epoch", 1))
    order = torch.randperm(50, generator=generator)
    x = images[order].float() / 255
    noise = torch.randn(50, 3, generator=generator)
    logits, mean, logvar = reference.vae(x, noise)
    loss = (0.5 * gaussian_kl(mean, logvar) - reconstruction(logits, x)).mean()
    loss.backward()
    expected = []
    for p in reference.vae.parameters():
        assert p.grad is not None
        # Adam's first step is lr·g/(|g| + ε): both moments are bias-corrected to g and g².
        expected.append((p - 1e-3 * p.grad / (p.grad.abs() + 1e-8)).detach().flatten())
    train(one, state, epochs=1, batch_size=50, beta=0.5)
    torch.testing.assert_close(weights(state), torch.cat(expected), rtol=1e-4, atol=1e-6)


def test_kl_warmup_and_beta_weigh_the_kl(small: Images) -> None:
    kl = {
        name: train(small, epochs=3, **changes).history[-1]["train_kl"]
        for name, changes in {
            "free": {"beta": 0.0},
            "warmup": {"kl_warmup_epochs": 3},
            "plain": {},
            "strong": {"beta": 20.0},
        }.items()
    }
    assert kl["free"] > kl["warmup"] > kl["plain"] > kl["strong"]


def test_cosine_ends_with_small_steps(small: Images) -> None:
    def last_epoch_moves(schedule: str) -> float:
        seen = []
        train(
            small, epochs=4, schedule=schedule, on_epoch=lambda state: seen.append(weights(state))
        )
        return float((seen[3] - seen[2]).norm() / (seen[1] - seen[0]).norm())

    # The last of four epochs has factors ½(1 + cos) of 0.15 down to 0, the first of 1 to 0.85.
    assert last_epoch_moves("cosine") < 0.25 < 0.5 < last_epoch_moves("constant")


def test_the_learning_rate_warms_up_to_its_value(small: Images) -> None:
    # Adam's first step moves every weight with a gradient by the rate, whatever the gradient is.
    one = replace(small, train=small.train[:50], train_labels=small.train_labels[:50])
    moved = {}
    for warmup in (0, 1, 4):
        start = fresh()
        before = weights(start).clone()
        state = train(one, start, epochs=1, batch_size=50, learning_rate_warmup_steps=warmup)
        moved[warmup] = (weights(state) - before).abs().max()
    assert moved[0] == moved[1]
    torch.testing.assert_close(moved[4], moved[0] / 4, rtol=1e-3, atol=0)
    # Over a whole training: cosine from the end of a warm-up of four steps.
    recipe = Recipe(2, 50, 1e-3, 0, learning_rate_warmup_steps=4, schedule="cosine")
    factors = [_rate_factor(recipe, i, steps=12) for i in range(24)]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 24)) for i in range(24)]
    assert factors == [c * min(1, (i + 1) / 4) for i, c in enumerate(cosine)]


def test_the_rate_of_burda_stays_three_times_as_long_at_each_step() -> None:
    recipe = Recipe(3280, 20, 1e-3, 0, schedule="burda")
    factors = [_rate_factor(recipe, i, steps=2) for i in range(2 * 3280)]
    assert factors == [10 ** (-k / 7) for k in range(8) for _ in range(2 * 3**k)]
    # Other numbers of epochs have the same shares of the steps.
    half = Recipe(1640, 20, 1e-3, 0, schedule="burda")
    assert [_rate_factor(half, i, steps=2) for i in range(3280)] == factors[::2]


def test_early_stopping_keeps_the_best_weights(small: Images) -> None:
    # A decoder that overfits 100 images within some epochs.
    few = Images(
        "mnist",
        "",
        small.train[:100],
        small.train_labels[:100],
        small.test,
        small.test_labels,
    )
    state = train(few, epochs=400, batch_size=10, learning_rate=5e-3, early_stopping=3)
    elbos = [row["test_elbo"] for row in state.history]
    best = elbos.index(max(elbos))
    assert len(elbos) == best + 1 + 3 < 400
    ensemble = Ensemble([state.vae], [state.moments], [5e-3])
    (row,) = evaluate(ensemble, few.test, [derive_seed(0, "evaluate", best + 1)])
    assert row["test_elbo"] == pytest.approx(max(elbos), abs=1e-4)


def test_a_loss_that_is_no_number_names_its_epoch(small: Images) -> None:
    with pytest.raises(TrainingDiverged, match="not finite in epoch 1") as caught:
        train(small, learning_rate=1e6, epochs=5)
    assert caught.value.epoch == 1


def test_codes_without_a_density_are_followed_as_no_number() -> None:
    codes = torch.zeros(2, 10, 3)
    codes[1] = -150.0
    found = _divergence((codes, torch.Generator().manual_seed(0)))
    assert found.keys() == {"test_marginal_kl", "test_moment_kl"}
    assert all(math.isnan(value) for value in found.values())


def test_bf16_learns_what_fp32_learns(small: Images) -> None:
    fp32, bf16 = (
        train(small, epochs=6, precision=p).history[-1]["test_elbo"] for p in ("fp32", "bf16")
    )
    assert bf16 != fp32
    # Six epochs move the ELBO by some 300 nats; two arithmetics may differ by a few.
    assert bf16 == pytest.approx(fp32, abs=8)


def batches_of(images: Images, batch_size: int, epoch: int = 1) -> list[torch.Tensor]:
    """What every step of an epoch is given to see."""
    state = fresh()
    ensemble = Ensemble([state.vae], [state.moments], [1e-3])
    seen: list[torch.Tensor] = []
    recipe = Recipe(epochs=9, batch_size=batch_size, learning_rate=1e-3, seed=0)
    train_epoch(ensemble, images, [recipe], epoch, lambda x, noise, w: seen.append(x[0].clone()))
    return seen


@pytest.mark.parametrize("n", [1, 7, 128, 600])
def test_an_epoch_shows_every_image_once(small: Images, n: int) -> None:
    batches = batches_of(small, n)
    assert [len(b) for b in batches[:-1]] == [n] * (len(batches) - 1)
    seen = torch.cat(batches)
    assert not torch.equal(seen, small.train)
    assert sorted(map(bytes, seen.numpy())) == sorted(map(bytes, small.train.numpy()))


def test_dynamic_binarization_draws_anew_each_epoch(small: Images) -> None:
    dynamic = replace(small, binarize="dynamic")
    first, second = (torch.cat(batches_of(dynamic, 64, epoch)) for epoch in (1, 2))
    assert set(first.unique().tolist()) == {0, 255}
    assert (first == 255).sum() != (second == 255).sum()
    # As bright as the grey levels are on average: 470,400 pixels, each a coin.
    share = small.train.double() / 255
    error = float((share * (1 - share)).sum().sqrt()) / share.numel()
    assert float((first == 255).double().mean() - share.mean()) == pytest.approx(0, abs=4 * error)


def test_images_are_counted_without_a_wait(small: Images) -> None:
    seen: list[tuple[int, int]] = []
    train(small, batch_size=10, on_images=lambda epoch, done: seen.append((epoch, done)))
    assert seen == [(1, 320), (1, 600), (2, 320), (2, 600)]


def test_seeds_of_different_purposes_and_epochs_differ() -> None:
    seeds = {derive_seed(s, "epoch", e) for s in range(20) for e in range(20)}
    seeds |= {derive_seed(s, "weights") for s in range(20)}
    assert len(seeds) == 420
    assert all(0 <= seed < 2**63 for seed in seeds)
