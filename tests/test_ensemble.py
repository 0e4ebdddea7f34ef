"""Stacked training: the gradient is autograd's, and a member is what it would be alone."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_train import fresh
from vaeq import experiment, lockstep
from vaeq.config import GenerationConfig, MeasureConfig, RunConfig
from vaeq.data.images import Images
from vaeq.errors import TrainingDiverged, VaeqError
from vaeq.experiment import measuring, training
from vaeq.launch.progress import Event
from vaeq.measurement import Measurement, measure
from vaeq.models.elbo import gaussian_kl, reconstruction
from vaeq.models.mlp import ACTIVATIONS, VAE
from vaeq.runs.record import RunRecord, read_record, run_directory
from vaeq.training.checkpoint import save_checkpoint
from vaeq.training.ensemble import CapturedSteps, Ensemble, Moments, encode_all
from vaeq.training.kernels import resolve_kernels
from vaeq.training.loop import Recipe, State, fit, fit_together, train_epoch

PIXELS = 12


def small_vae(latent_dim: int = 3, seed: int = 0, **changes: Any) -> VAE:
    shape: dict[str, Any] = {
        "encoder_depth": 2,
        "encoder_width": 7,
        "decoder_depth": 1,
        "decoder_width": 5,
        "activation": "relu",
        "initialization": "torch",
    }
    source = torch.Generator().manual_seed(seed)
    return VAE(PIXELS, latent_dim, generator=source, **{**shape, **changes})


def stacked(*vaes: VAE, precision: str = "fp32", kernels: str = "torch") -> Ensemble:
    return Ensemble(vaes, [Moments() for _ in vaes], [1e-3] * len(vaes), precision, kernels)


def autograd(vae: VAE, x: torch.Tensor, noise: torch.Tensor, w: float) -> dict[str, torch.Tensor]:
    """The gradient of the loss as torch differentiates it."""
    logits, mean, logvar = vae(x, noise)
    vae.zero_grad()
    (w * gaussian_kl(mean, logvar) - reconstruction(logits, x)).mean().backward()
    return {name: p.grad for name, p in vae.named_parameters() if p.grad is not None}


def gradients(ensemble: Ensemble, i: int) -> dict[str, torch.Tensor]:
    return ensemble._get(ensemble._grads[i], ensemble.latent_dims[i])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * scale + 1e-8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("depths", [(2, 1), (0, 0), (1, 3)])
def test_the_gradient_is_autograds(activation: str, depths: tuple[int, int], kernels: str) -> None:
    source = torch.Generator().manual_seed(1)
    vae = small_vae(activation=activation, encoder_depth=depths[0], decoder_depth=depths[1])
    x = torch.rand(9, PIXELS, generator=source)
    noise = torch.randn(9, 3, generator=source)
    ensemble = stacked(vae, kernels=kernels)
    ensemble.gradient(255 * x[None], noise[None], torch.full((1, 1, 1), 0.7))
    assert_same(gradients(ensemble, 0), autograd(vae, x, noise, 0.7))
    logits, mean, logvar = vae(x, noise)
    expected = torch.stack([reconstruction(logits, x).sum(), gaussian_kl(mean, logvar).sum()])
    torch.testing.assert_close(ensemble.totals[:, 0].float(), expected)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.floats(0, 4)), min_size=1, max_size=4),
    st.integers(1, 8),
)
def test_members_know_nothing_of_each_other(
    kernels: str, members: list[tuple[int, float]], batch: int
) -> None:
    source = torch.Generator().manual_seed(2)
    vaes = [small_vae(d, seed) for seed, (d, _) in enumerate(members)]
    ensemble = stacked(*vaes, kernels=kernels)
    x = torch.rand(len(vaes), batch, PIXELS, generator=source)
    noise = torch.zeros(len(vaes), batch, ensemble.widest)
    for e, (d, _) in enumerate(members):
        noise[e, :, :d] = torch.randn(batch, d, generator=source)
    weights = torch.tensor([w for _, w in members]).view(-1, 1, 1)
    ensemble.gradient(255 * x, noise, weights)
    for e, (d, w) in enumerate(members):
        assert_same(gradients(ensemble, e), autograd(vaes[e], x[e], noise[e, :, :d], w))
    # What pads the narrower members has no gradient at all, so that it stays 0.
    own = sum(sum(v.numel() for v in gradients(ensemble, e).values()) for e in range(len(vaes)))
    assert int(ensemble._grads.ne(0).sum()) <= own
    mean, logvar = ensemble.encode(x)
    for e, (d, _) in enumerate(members):
        assert not mean[e, :, d:].any()
        assert not logvar[e, :, d:].any()


def test_what_goes_in_comes_out() -> None:
    vaes = [small_vae(d, seed=d) for d in (2, 5, 3)]
    moments = [
        Moments(d, *({n: torch.rand_like(p) for n, p in vae.named_parameters()} for _ in range(2)))
        for d, vae in enumerate(vaes)
    ]
    ensemble = Ensemble(vaes, moments, [1e-3, 1e-3, 2e-3])
    for i, vae in enumerate(vaes):
        weights, own = ensemble.member(i)
        assert own.step == moments[i].step
        for name, value in vae.named_parameters():
            assert torch.equal(weights[name], value)
            assert torch.equal(own.exp_avg[name], moments[i].exp_avg[name])
            assert torch.equal(own.exp_avg_sq[name], moments[i].exp_avg_sq[name])


def test_every_member_has_its_own_learning_rate(kernels: str) -> None:
    vaes = [small_vae(seed=0) for _ in range(3)]
    rates = [1e-3, 1e-3, 1e-2]
    ensemble = Ensemble(vaes, [Moments() for _ in vaes], rates, kernels=kernels)
    ensemble.scale_learning_rates(0.5)
    source = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (1, 6, PIXELS), generator=source, dtype=torch.uint8).expand(3, -1, -1)
    noise = torch.randn(1, 6, 3, generator=source).expand(3, -1, -1)
    ensemble.step(x, noise, torch.ones(3, 1, 1))
    before = dict(vaes[0].named_parameters())["decoder.2.bias"]
    for i, rate in enumerate(rates):
        # Adam's first step is the rate in the direction of the gradient's sign.
        moved = (ensemble.member(i)[0]["decoder.2.bias"] - before).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * rate), rtol=1e-3, atol=0)


def states(latent_dims: list[int]) -> list[State]:
    return [fresh(seed, latent_dim) for seed, latent_dim in enumerate(latent_dims)]


def refuse(member: int, error: VaeqError) -> None:
    raise error


def test_members_end_as_they_would_alone(small: Images, kernels: str) -> None:
    dims = [2, 5, 5, 3]
    recipes = [
        Recipe(3, 64, rate, seed, beta=beta, kl_warmup_epochs=warmup)
        for seed, (rate, beta, warmup) in enumerate(
            [(1e-3, 1.0, 0), (1e-3, 4.0, 2), (3e-3, 1.0, 0), (3e-3, 0.5, 1)]
        )
    ]
    together, alone = states(dims), states(dims)
    fit_together(together, small, recipes, kernels=kernels, on_failed=refuse)
    for member, solo, own in zip(together, alone, recipes, strict=True):
        fit(solo, small, own, kernels=kernels)
        for ours, theirs in zip(member.history, solo.history, strict=True):
            for name in ("train_elbo", "train_kl", "test_elbo", "test_kl"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_compiled_training_hangs_on_no_thread(small: Images) -> None:
    if resolve_kernels("auto", torch.device("cpu")) != "compiled":
        pytest.skip("nothing compiles C here")
    weights = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        (state,) = states([3])
        fit(state, small, Recipe(2, 64, 1e-3, 0), kernels="compiled")
        weights.append(state.vae.state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert torch.equal(other[name], value), name


class Recorded:
    """In the place of a CUDA graph: what was called, without effect, while it was recorded.

    Like a graph it reads its inputs where they lay, and knows nothing of later ones.
    """

    recording: Recorded | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The graphs that are captured, on the CPU."""
    graphs: list[Recorded] = []
    real = Ensemble.step

    @contextlib.contextmanager
    def capture(graph: Recorded) -> Iterator[None]:
        graphs.append(graph)
        Recorded.recording = graph
        yield
        Recorded.recording = None

    def step(self: Ensemble, *inputs: torch.Tensor) -> None:
        if Recorded.recording is None:
            real(self, *inputs)
        else:
            Recorded.recording.calls.append(lambda: real(self, *inputs))

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(Ensemble, "step", step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    return graphs


def test_captured_steps_are_the_steps(small: Images, recorded: list[Recorded]) -> None:
    # 600 images in batches of 64: the last of an epoch has 24, and a graph of its own.
    recipes = [Recipe(2, 64, 1e-3, seed, kl_warmup_epochs=1) for seed in range(2)]
    ends = []
    for captured in (True, False):
        members = states([2, 3])
        ensemble = Ensemble([m.vae for m in members], [m.moments for m in members], [1e-3] * 2)
        step = CapturedSteps(ensemble) if captured else ensemble.step
        sums = []
        for epoch in (1, 2):
            train_epoch(ensemble, small, recipes, epoch, step)
            sums.append(ensemble.totals.clone())
        ends.append((sums, [ensemble.member(i) for i in range(2)]))
    assert len(recorded) == 2
    (sums, members), (expected_sums, expected) = ends
    torch.testing.assert_close(sums, expected_sums, rtol=0, atol=0)
    for (weights, moments), (their_weights, theirs) in zip(members, expected, strict=True):
        assert moments.step == theirs.step == 20
        for name, value in their_weights.items():
            assert torch.equal(weights[name], value), name
            assert torch.equal(moments.exp_avg[name], theirs.exp_avg[name]), name
            assert torch.equal(moments.exp_avg_sq[name], theirs.exp_avg_sq[name]), name


def test_a_member_that_diverges_leaves_and_the_others_go_on(small: Images, kernels: str) -> None:
    recipes = [Recipe(3, 64, rate, seed) for seed, rate in enumerate([1e-3, 1e6, 1e-3])]
    together, alone = states([2, 2, 4]), states([2, 2, 4])
    fallen: dict[int, VaeqError] = {}
    epochs: list[int] = []
    fit_together(
        together,
        small,
        recipes,
        kernels=kernels,
        on_epoch=epochs.append,
        on_failed=fallen.__setitem__,
    )
    assert list(fallen) == [1]
    assert fallen[1].epoch == 1
    assert epochs == [0, 2] * 3
    assert together[1].history == []
    for i in (0, 2):
        fit(alone[i], small, recipes[i], kernels=kernels)
        assert together[i].history[-1]["test_elbo"] == pytest.approx(
            alone[i].history[-1]["test_elbo"], rel=1e-4
        )


def test_a_member_that_stops_early_leaves_with_its_best_weights(small: Images) -> None:
    few = replace(small, train=small.train[:100], train_labels=small.train_labels[:100])
    recipes = [Recipe(300, 10, 5e-3, 0, early_stopping=3), Recipe(300, 10, 5e-3, 1)]
    recipes[1] = replace(recipes[1], early_stopping=8)
    both = states([2, 2])
    fit_together(both, few, recipes, on_failed=refuse)
    lengths = [state.epoch for state in both]
    assert lengths[0] != lengths[1]
    for state, own in zip(both, recipes, strict=True):
        elbos = [row["test_elbo"] for row in state.history]
        assert own.early_stopping is not None
        assert state.epoch == elbos.index(max(elbos)) + 1 + own.early_stopping


def test_bf16_rounds_the_products_and_nothing_else(small: Images, kernels: str) -> None:
    source = torch.Generator().manual_seed(1)
    vae = small_vae()
    x, noise = torch.rand(1, 64, PIXELS, generator=source), torch.randn(1, 64, 3, generator=source)
    exact, rounded = (stacked(vae, precision=p, kernels=kernels) for p in ("fp32", "bf16"))
    for ensemble in (exact, rounded):
        ensemble.gradient(255 * x, noise, torch.ones(1, 1, 1))
    # bf16 has eight significant bits; errors of single products average out over the batch.
    error = (rounded._grads - exact._grads).norm() / exact._grads.norm()
    assert 0 < float(error) < 2**-6
    assert rounded._weights.dtype == rounded._exp_avg.dtype == torch.float32
    # Encoding is for measures, and exact.
    assert torch.equal(rounded.encode(x)[0], exact.encode(x)[0])


def test_encoding_together_is_encoding_alone(small: Images) -> None:
    vaes = [state.vae for state in states([2, 5])]
    for vae, (mean, logvar) in zip(vaes, encode_all(vaes, small.train, 256), strict=True):
        assert mean.shape == logvar.shape == (600, vae.latent_dim)
        with torch.no_grad():
            expected = vae.encode(small.train.float() / 255)
        torch.testing.assert_close(mean, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logvar, expected[1], rtol=1e-4, atol=1e-5)


def configs(tiny: RunConfig, **changes: Any) -> list[RunConfig]:
    return [
        replace(tiny, precision="fp32", latent_dim=d, seed=seed, **changes)
        for d in (2, 3)
        for seed in (0, 1)
    ]


@pytest.fixture(params=["threads", "lockstep"])
def beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How runs are measured: as on a CPU, and as on a GPU."""
    if request.param == "lockstep":
        monkeypatch.setattr(lockstep, "stacks_pay", lambda device: True)
    name: str = request.param
    return name


@pytest.mark.usefixtures("beside")
def test_an_ensemble_leaves_the_files_of_single_runs(tiny: RunConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    asked = GenerationConfig(n_importance=20, likelihood_images=100, ais_images=2, quality=False)
    members = configs(replace(tiny, generation=asked, measure=MeasureConfig(panel="bracket")))
    endings = experiment.run_ensemble(members, events.append, threads=1)
    assert [event.kind for event in events].count("complete") == 4
    for config, ending in zip(members, endings, strict=True):
        solo = replace(config, outputs=str(tmp_path / "solo"))
        expected = experiment.run(solo, lambda event: None, threads=1)
        ours, theirs = run_directory(config), run_directory(solo)
        assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
        record = read_record(ours / "record.json")
        assert record == ending
        assert record.config_hash == expected.config_hash
        for name, values in expected.history.items():
            if name != "seconds":
                assert record.history[name] == pytest.approx(values, rel=1e-4), name
        for name, entry in expected.estimates.items():
            found = record.estimates[name]
            assert found["value"] == pytest.approx(entry["value"], rel=0.02, abs=0.02), name


def test_writing_takes_a_twentieth_of_the_time_however_many_train(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By this clock an epoch of a member takes 0.05 s, and as long to write.
    clock, written = [0.0], []
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def saved(directory: Path, state: State, config_hash: str, *, final: bool) -> str:
        if not final:
            clock[0] += 0.05
            written.append(state.epoch)
        return save_checkpoint(directory, state, config_hash, final=final)

    def told(event: Event) -> None:
        clock[0] += 0.05 * (event.kind == "epoch")

    monkeypatch.setattr(training, "save_checkpoint", saved)
    experiment.run_ensemble(configs(tiny, epochs=100), told, threads=1)
    epochs = sorted(set(written))
    assert len(epochs) >= 4
    assert written == [epoch for epoch in epochs for _ in range(4)]  # all members or none
    # The round that is due is written whole.
    assert 0.05 * (len(written) - 4) <= clock[0] / 20


@pytest.mark.parametrize("beside", ["lockstep"], indirect=True)
@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("failing", ["likelihoods", "annealed"])
def test_likelihoods_that_fail_together_are_asked_one_by_one(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not together")

    monkeypatch.setattr(measuring, failing, fail)
    asked = GenerationConfig(n_importance=20, likelihood_images=100, ais_images=2, quality=False)
    endings = experiment.run_ensemble(
        configs(replace(tiny, generation=asked)), lambda event: None, threads=1
    )
    for ending in endings:
        assert isinstance(ending, RunRecord)
        assert ending.estimates["log_likelihood"]["value"] < 0
        assert ending.estimates["ais_log_likelihood"]["value"] < 0


def test_members_are_measured_side_by_side(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each waits inside its measure for another one to come there.
    both = threading.Barrier(2, timeout=120)

    def measured(*args: Any, **kwargs: Any) -> Measurement:
        both.wait()
        found = measure(*args, **kwargs)
        again = measure(*args, **kwargs)
        assert found.to_dict() == again.to_dict()
        return found

    monkeypatch.setattr(measuring, "measure", measured)
    before = torch.get_num_threads()
    try:
        endings = experiment.run_ensemble(configs(tiny), lambda event: None, threads=2)
    finally:
        torch.set_num_threads(before)
    records = [ending for ending in endings if isinstance(ending, RunRecord)]
    assert len(records) == 4
    for record in records:
        assert record.timing["measure_seconds"] > 0
        parts = (record.estimates[name]["value"] for name in ("mutual_information", "marginal_kl"))
        assert sum(parts) == pytest.approx(record.estimates["kl_per_image"]["value"], abs=1e-9)


@pytest.mark.usefixtures("beside")
def test_a_member_that_cannot_be_measured_fails_alone(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(mean: torch.Tensor, *args: Any, **kwargs: Any) -> Measurement:
        if mean.shape[1] == 3:
            raise RuntimeError("not this one")
        return measure(mean, *args, **kwargs)

    monkeypatch.setattr(measuring, "measure", measured)
    members = configs(tiny)
    endings = experiment.run_ensemble(members, lambda event: None, threads=1)
    for config, ending in zip(members, endings, strict=True):
        record = read_record(run_directory(config) / "record.json")
        if config.latent_dim == 3:
            assert isinstance(ending, RuntimeError)
            assert record.state == "failed"
            assert record.failure is not None
            assert record.failure["message"] == "RuntimeError: not this one"
        else:
            assert record == ending


def test_a_member_is_resumed_alone_and_the_others_are_skipped(
    tiny: RunConfig, tmp_path: Path
) -> None:
    members = configs(tiny, epochs=4)

    def interrupt(event: Event) -> None:
        if event.kind == "epoch" and event.epoch == 2 and event.run.startswith("latent_dim=3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run_ensemble(members, interrupt, threads=1)
    # One of them alone, then the others: each from its second epoch, to the result of a whole run.
    events: list[Event] = []
    alone = experiment.run(members[0], events.append, threads=1)
    assert events[0].epoch == 2
    events.clear()
    endings = experiment.run_ensemble(members, events.append, threads=1)
    assert endings[0] == alone
    assert [e.kind for e in events[:1]] == ["skipped"]
    whole = [replace(config, outputs=str(tmp_path / "whole")) for config in members]
    for config, ending in zip(whole, endings, strict=True):
        expected = experiment.run(config, lambda event: None, threads=1)
        assert not isinstance(ending, Exception)
        assert ending.history["test_elbo"] == pytest.approx(expected.history["test_elbo"], rel=1e-4)


def test_a_member_that_diverges_is_recorded_as_failed(tiny: RunConfig) -> None:
    members = [replace(tiny, seed=0), replace(tiny, seed=1, learning_rate=10.0, beta=1e6)]
    good, bad = experiment.run_ensemble(members, lambda event: None, threads=1)
    assert isinstance(bad, TrainingDiverged)
    assert read_record(run_directory(members[1]) / "record.json").state == "failed"
    assert read_record(run_directory(members[0]) / "record.json") == good
    assert math.isfinite(good.history["test_elbo"][-1])  # type: ignore[union-attr]
