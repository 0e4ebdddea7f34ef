"""A network of any layers in training: the steps of an ensemble, and all its promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.test_conv import conv
from tests.test_train import fresh, train, weights
from vaeq import experiment
from vaeq.config import RunConfig, SampleConfig
from vaeq.data.images import Images
from vaeq.errors import InputError, TrainingDiverged
from vaeq.generation.sample import sample
from vaeq.launch.progress import Event
from vaeq.models.elbo import gaussian_kl, reconstruction
from vaeq.runs.record import read_record, run_directory
from vaeq.training.autograd import Autograd
from vaeq.training.ensemble import Ensemble, Moments, encode_all
from vaeq.training.loop import State, evaluate


def fresh_conv(seed: int = 0) -> State:
    return State(conv(seed=seed, encoder_width=32, initialization="torch"))


@pytest.fixture
def few(small: Images) -> Images:
    return replace(
        small,
        train=small.train[:192],
        train_labels=None,
        test=small.test[:100],
        test_labels=None,
    )


@pytest.fixture
def conv_run(tiny: RunConfig) -> RunConfig:
    data = replace(tiny.data, n_train=256, n_test=100)
    return replace(tiny, model="conv", encoder_width=32, decoder_width=32, epochs=3, data=data)


def test_its_steps_are_those_of_the_ensemble(small: Images) -> None:
    # The same multilayer perceptron through both: autograd against the gradient written by hand.
    vae = fresh().vae
    programs = [kind([vae], [Moments()], [1e-3]) for kind in (Autograd, Ensemble)]
    generator = torch.Generator().manual_seed(0)
    for i in range(5):
        x = small.train[None, i * 32 : (i + 1) * 32]
        noise = torch.randn(1, 32, 3, generator=generator)
        for program in programs:
            program.scale_learning_rates(0.5 + 0.1 * i)
            program.step(x, noise, torch.full((1, 1, 1), 0.7))
    torch.testing.assert_close(programs[0].totals, programs[1].totals, rtol=1e-5, atol=0)
    (ours, our_moments), (theirs, their_moments) = (program.member(0) for program in programs)
    assert our_moments.step == their_moments.step == 5
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(
            our_moments.exp_avg[name], their_moments.exp_avg[name], rtol=1e-2, atol=1e-4
        )
    # What it was given is not what it trains.
    assert torch.equal(weights(State(vae)), weights(fresh()))


def test_the_loss_falls_on_held_out_digits_and_is_recorded(small: Images) -> None:
    state = train(small, fresh_conv(), epochs=6, learning_rate=3e-3)
    elbos = [row["test_elbo"] for row in state.history]
    # Constant grey levels are about 207 nats.
    assert elbos[-1] > elbos[0]
    assert elbos[-1] > -235
    ((mean, logvar),) = encode_all([state.vae], small.test, batch_size=64)
    with torch.no_grad():
        expected = state.vae.encode(small.test.float() / 255)
        torch.testing.assert_close((mean, logvar), expected, rtol=1e-4, atol=1e-5)
        kl = gaussian_kl(mean, logvar).mean()
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        logits = state.vae.decode(mean + torch.exp(0.5 * logvar) * noise)
        elbo = reconstruction(logits, small.test.float() / 255).mean() - kl
    assert float(elbo) == pytest.approx(elbos[-1], abs=3)


def test_same_seed_same_bits_also_in_two_parts(few: Images) -> None:
    settings = {"epochs": 4, "schedule": "cosine", "kl_warmup_epochs": 2}
    whole = train(few, fresh_conv(), **settings)
    assert not torch.equal(weights(whole), weights(train(few, fresh_conv(), **settings, seed=1)))

    class StopAfterTwoError(Exception):
        pass

    def stop(state: State) -> None:
        if state.epoch == 2:
            raise StopAfterTwoError

    parts = fresh_conv()
    with pytest.raises(StopAfterTwoError):
        train(few, parts, **settings, on_epoch=stop)
    train(few, parts, **settings)
    assert torch.equal(weights(whole), weights(parts))
    assert [r["test_elbo"] for r in whole.history] == [r["test_elbo"] for r in parts.history]


def test_early_stopping_keeps_the_best_weights(few: Images) -> None:
    tight = replace(few, train=few.train[:32])
    state = train(
        tight, fresh_conv(), epochs=300, batch_size=8, learning_rate=1e-2, early_stopping=3
    )
    elbos = [row["test_elbo"] for row in state.history]
    best = elbos.index(max(elbos))
    assert len(elbos) == best + 1 + 3 < 300
    (row,) = evaluate(Autograd([state.vae], [state.moments], [1e-3]), few.test, [0])
    assert row["test_elbo"] == pytest.approx(max(elbos), abs=5)


def test_a_loss_that_is_no_number_leaves_the_last_good_epoch(few: Images) -> None:
    state = fresh_conv()
    before = weights(state)
    with pytest.raises(TrainingDiverged, match="not finite in epoch 1"):
        train(few, state, learning_rate=1e6, epochs=5)
    assert torch.equal(weights(state), before)
    assert state.history == []


def test_bf16_learns_what_fp32_learns(few: Images) -> None:
    fp32, bf16 = (
        train(few, fresh_conv(), epochs=3, precision=p).history[-1]["test_elbo"]
        for p in ("fp32", "bf16")
    )
    assert bf16 != fp32
    # Three epochs move the ELBO by some hundred nats; two arithmetics may differ by a few.
    assert bf16 == pytest.approx(fp32, abs=8)


def stop_after(epoch: int) -> Callable[[Event], None]:
    def interrupt(event: Event) -> None:
        if event.kind == "epoch" and event.epoch == epoch:
            raise KeyboardInterrupt

    return interrupt


def test_a_run_is_interrupted_resumed_and_drawn_from(conv_run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        experiment.run(conv_run, stop_after(2), threads=1)
    events: list[Event] = []
    record = experiment.run(conv_run, events.append, threads=1)
    assert (events[0].kind, events[0].epoch) == ("start", 2)
    elsewhere = replace(conv_run, outputs=str(tmp_path / "whole"))
    whole = experiment.run(elsewhere, lambda event: None, threads=1)
    assert record.estimates == whole.estimates
    assert record.config["model"] == "conv"
    png, _ = sample(SampleConfig(run=str(run_directory(conv_run)), picture="reconstructions", n=5))
    assert png.stat().st_size > 0


def test_runs_of_an_ensemble_are_trained_one_after_the_other(
    conv_run: RunConfig, tmp_path: Path
) -> None:
    configs = [replace(conv_run, seed=seed, epochs=1) for seed in (0, 1)]
    bad = replace(conv_run, learning_rate=10.0, beta=1e6, activation="elu", encoder_depth=3)
    endings = experiment.run_ensemble([*configs, bad], lambda event: None, threads=1)
    assert isinstance(endings[2], TrainingDiverged)
    assert read_record(run_directory(bad) / "record.json").state == "failed"
    for config, ending in zip(configs, endings, strict=False):
        alone = replace(config, outputs=str(tmp_path / "alone"))
        expected = experiment.run(alone, lambda event: None, threads=1)
        assert not isinstance(ending, Exception)
        assert ending.estimates == expected.estimates


def test_more_convolutions_than_the_images_take_leave_no_folder(conv_run: RunConfig) -> None:
    with pytest.raises(InputError, match="encoder_depth must be between 1 and 4"):
        experiment.run(replace(conv_run, encoder_depth=5), lambda event: None, threads=1)
    assert not run_directory(conv_run).parent.exists()
