"""Runs that are trained: encoded, judged and measured together, and recorded one by one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save

from vaeq import lockstep
from vaeq.config import RunConfig, config_hash
from vaeq.divergence.ex_post import ExPost
from vaeq.estimate import Estimate
from vaeq.experiment.preparation import measured_at_once
from vaeq.experiment.under_way import Run, fail
from vaeq.generation.panel import ANNEALED, LIKELIHOOD, Decoder, annealed, likelihoods
from vaeq.generation.quality import FLOOR, missing_quality
from vaeq.generation.samplers import SOURCES
from vaeq.launch.progress import Event
from vaeq.measurement import Measurement, estimate_names, measure
from vaeq.models.elbo import held_out_elbo
from vaeq.models.ppca import fit_ppca
from vaeq.posterior.codes import CodesWarning
from vaeq.runs.record import (
    CACHE,
    CHECKPOINT,
    HISTORY,
    PICTURES,
    SAMPLES,
    RunRecord,
    columns,
    summary,
    write_history,
    write_record,
)
from vaeq.seeds import derive_seed
from vaeq.training.checkpoint import save_weights
from vaeq.training.ensemble import Ensemble, Moments, encode_all

S = TypeVar("S")
T = TypeVar("T")
Codes = tuple[torch.Tensor, torch.Tensor]  # mean and logvar, (N, D) each
# Samples of q(z|x) kept for the pictures of the report.
_KEPT_SAMPLES = 10_000


def estimates_of(config: RunConfig) -> set[str]:
    """The names of the estimates that a run of these settings has."""
    wanted = config.generation
    names = {"elbo", "reconstruction", *estimate_names(config.measure.panel)}
    if config.model == "ppca":
        return names | {"log_likelihood", "inference_gap", *_quality_names()}
    return names.union(
        LIKELIHOOD if wanted.n_importance is not None else (),
        ANNEALED if wanted.ais_images else (),
        _quality_names() if wanted.quality else (),
    )


def _quality_names() -> set[str]:
    return set(missing_quality([*SOURCES, FLOOR], "not asked for"))


def measure_together(runs: Sequence[Run]) -> list[RunRecord | Exception]:
    """Encode, judge and measure runs that were trained together, and record each.

    On a GPU as one program. On a CPU encoding is one, and the rest is done side by side.
    """
    began = time.perf_counter()
    for run in runs:
        run.notify(Event("stage", run.name, message="measuring"))
    images = runs[0].images
    vaes = [run.state.vae for run in runs]
    codes = [encode_all(vaes, images.observed(part)) for part in ("train", "test")]
    decoders = [
        Decoder(vae.decode, train, test, images)
        for vae, train, test in zip(vaes, *codes, strict=True)
    ]
    judged = _judge(runs, decoders)
    share = (time.perf_counter() - began) / len(runs)
    endings: list[RunRecord | Exception] = []
    at_once = measured_at_once(runs[0].config, images.train.device)
    for start in range(0, len(runs), at_once):
        some = slice(start, start + at_once)
        codes_of_some = [(decoder.codes, decoder.test_codes) for decoder in decoders[some]]
        panels, seconds = _panels(runs[some], codes_of_some)
        for run, decoder, known, panel in zip(
            runs[some], decoders[some], judged[some], panels, strict=True
        ):
            found = partial(_measure_vae, run, decoder, known, panel, share + seconds)
            endings.append(finish(run, found))
    return endings


def _panels(
    runs: Sequence[Run], codes: Sequence[tuple[Codes, Codes]]
) -> tuple[list[Measurement | Exception], float]:
    """The estimates for the codes of each run, or why there are none; and the seconds a run."""
    began = time.perf_counter()
    device = codes[0][0][0].device
    with warnings.catch_warnings():
        # These are log variances, however a young encoder's may look.
        warnings.simplefilter("ignore", CodesWarning)
        found = lockstep.side_by_side(
            partial(_attempt, _panel), zip(runs, codes, strict=True), device
        )
    return found, (time.perf_counter() - began) / len(runs)


def _panel(one: tuple[Run, tuple[Codes, Codes]]) -> Measurement:
    run, (train, test) = one
    wanted = run.config.measure
    return measure(
        *train,
        *test,
        run.images.train_labels,
        n_samples=wanted.n_samples,
        seed=derive_seed(run.config.seed, "codes"),
        panel=wanted.panel,
        flow=wanted.flow,
    )


@dataclass(frozen=True)
class _Judged:
    """The mixture that stands in for the prior of a decoder, and log p(x) as it is asked for."""

    ex_post: ExPost
    likelihood: dict[str, Estimate]


def _judge(runs: Sequence[Run], decoders: Sequence[Decoder]) -> list[_Judged | Exception]:
    """Every decoder, or why it cannot be judged."""
    device = runs[0].images.train.device
    pairs = list(zip(runs, decoders, strict=True))
    ex_posts = lockstep.side_by_side(partial(_attempt, _fit_ex_post), pairs, device)
    densities = [one for one in ex_posts if isinstance(one, ExPost)]
    if len(runs) == len(densities) > 1 and lockstep.stacks_pay(device):
        together = _attempt(_likelihoods_together, (runs, decoders, densities))
        if not isinstance(together, Exception):
            return [_Judged(one, found) for one, found in zip(densities, together, strict=True)]
        # One by one the run that cannot have it fails alone.
    triples = zip(runs, decoders, ex_posts, strict=True)
    return lockstep.side_by_side(partial(_attempt, _judge_alone), triples, device)


def _attempt(function: Callable[[S], T], item: S) -> T | Exception:
    try:
        return function(item)
    except Exception as error:  # of this run alone
        return error


def _had(ending: T | Exception) -> T:
    """What came of an attempt; what prevented it is raised."""
    if isinstance(ending, Exception):
        raise ending
    return ending


def _fit_ex_post(one: tuple[Run, Decoder]) -> ExPost:
    run, decoder = one
    return decoder.fit_ex_post(_generator(run, "ex-post"))


def _judge_alone(one: tuple[Run, Decoder, ExPost | Exception]) -> _Judged:
    run, decoder, ex_post = one
    mixture = _had(ex_post)
    wanted = run.config.generation
    found: dict[str, Estimate] = {}
    if wanted.n_importance is not None:
        found |= decoder.likelihood(
            mixture,
            _generator(run, "likelihood"),
            n_importance=wanted.n_importance,
            n_images=wanted.likelihood_images,
        )
    if wanted.ais_images:
        found |= decoder.annealed(_generator(run, "annealing"), wanted.ais_images)
    return _Judged(mixture, found)


def _likelihoods_together(
    all_of: tuple[Sequence[Run], Sequence[Decoder], Sequence[ExPost]],
) -> list[dict[str, Estimate]]:
    """log p(x) of all runs as one program, by importance sampling and by annealing."""
    runs, decoders, ex_posts = all_of
    wanted = runs[0].config.generation
    vaes = [run.state.vae for run in runs]
    stack = Ensemble(vaes, [Moments() for _ in vaes], [0.0] * len(vaes))
    found: list[dict[str, Estimate]] = [{} for _ in runs]
    if wanted.n_importance is not None:
        sampled = likelihoods(
            decoders,
            stack.decode,
            ex_posts,
            [_generator(run, "likelihood") for run in runs],
            n_importance=wanted.n_importance,
            n_images=wanted.likelihood_images,
        )
        found = [one | more for one, more in zip(found, sampled, strict=True)]
    if wanted.ais_images:
        generators = [_generator(run, "annealing") for run in runs]
        more_found = annealed(decoders, stack.decode, generators, n_images=wanted.ais_images)
        found = [one | more for one, more in zip(found, more_found, strict=True)]
    return found


def finish(run: Run, measured: Callable[[], RunRecord]) -> RunRecord | Exception:
    """Measure and record a run."""
    try:
        record = measured()
        run.lock.require_held()
        write_record(run.directory, record, len(run.history))
    except Exception as error:
        fail(run, error)
        return error
    run.log.finish(record.estimates, len(run.history))
    run.notify(Event("complete", run.name, message=summary(record)))
    return record


def _measure_vae(
    run: Run,
    decoder: Decoder,
    judged: _Judged | Exception,
    panel: Measurement | Exception,
    seconds: float,
) -> RunRecord:
    """What there is to know of a trained VAE, beside what took so many seconds already."""
    found = _had(panel)
    began = time.perf_counter() - seconds
    generator = _generator(run, "measure")
    held_out = run.images.observed("test")
    estimates = held_out_elbo(decoder.decode, *decoder.test_codes, held_out, generator)
    more, settings, pictures = _generate(run, decoder, _had(judged))
    content = save({name: values.cpu() for name, values in pictures.items()})
    run.keep(PICTURES, content)
    train_seconds = sum(row["seconds"] for row in run.history)
    return _record(
        run, decoder.codes, found, estimates | more, settings, generator, began, train_seconds
    )


def measure_ppca(run: Run) -> RunRecord:
    """Probabilistic PCA from its fit to its record: it has no epochs and nothing to resume."""
    began = time.perf_counter()
    run.tell("start", 0)
    images = run.images
    model = fit_ppca(
        images.observed("train"), run.config.latent_dim, generator=_generator(run, "weights")
    )
    run.history.extend(
        {"epoch": i, "train_elbo": value} for i, value in enumerate(model.log_likelihood)
    )
    run.files[HISTORY] = write_history(run.directory, run.history)
    for row in run.history:
        run.log.epoch(row)
    noise = torch.tensor(model.noise_variance, dtype=torch.float64)
    weights = {"mean": model.mean, "weight": model.weight, "noise_variance": noise}
    run.lock.require_held()
    run.files[CHECKPOINT] = save_weights(run.directory, weights, config_hash(run.config))
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    held_out = images.observed("test")
    reason = "samples of ppca are grey levels of a Gaussian, not Bernoulli means"
    estimates = model.evaluate(held_out) | missing_quality([*SOURCES, FLOOR], reason)
    settings = {
        "em": {
            "iterations": model.iterations,
            "converged": model.converged,
            "closed_form_gap_nats": model.closed_form_gap,
            "covariance_gap": model.covariance_gap,
        }
    }
    codes, test_codes = model.encode(images.observed("train")), model.encode(held_out)
    generator = _generator(run, "measure")
    run.notify(Event("stage", run.name, message="measuring"))
    (panel,), _ = _panels([run], [(codes, test_codes)])
    return _record(run, codes, _had(panel), estimates, settings, generator, began, seconds)


def _generator(run: Run, *purpose: str) -> torch.Generator:
    seed = derive_seed(run.config.seed, *purpose)
    return torch.Generator(run.images.train.device).manual_seed(seed)


def _generate(
    run: Run, decoder: Decoder, judged: _Judged
) -> tuple[dict[str, Estimate], dict[str, Any], dict[str, torch.Tensor]]:
    """Likelihood, sample quality and pictures, as far as the config asks for them."""
    wanted, ex_post = run.config.generation, judged.ex_post
    estimates = dict(judged.likelihood)
    settings: dict[str, Any] = {"ex_post_components": ex_post.components}
    if wanted.quality:
        cache = Path(run.config.outputs) / CACHE
        quality, classifier = decoder.quality(ex_post, _generator(run, "quality"), cache)
        estimates |= quality
        settings["classifier"] = classifier
    pictures = decoder.pictures(ex_post, _generator(run, "pictures"))
    return estimates, {"generation": settings}, pictures


def _record(
    run: Run,
    codes: Codes,
    measurement: Measurement,
    estimates: dict[str, Estimate],
    settings: dict[str, Any],
    generator: torch.Generator,
    began: float,
    train_seconds: float,
) -> RunRecord:
    """Keep some of the codes for the pictures, and put everything together."""
    config, images = run.config, run.images
    mean, logvar = codes
    found = measurement.to_dict()
    kept = slice(_KEPT_SAMPLES)
    noise = torch.randn(mean[kept].shape, generator=generator, device=mean.device)
    z = (mean[kept] + torch.exp(0.5 * logvar[kept]) * noise).float()
    samples = {"z": z.cpu()}
    if images.train_labels is not None:
        samples["label"] = images.train_labels[kept].contiguous()
    run.keep(SAMPLES, save(samples))
    measure_seconds = time.perf_counter() - began
    return RunRecord(
        "complete",
        asdict(config),
        config_hash(config),
        run.provenance,
        timing={
            "train_seconds": train_seconds,
            "measure_seconds": measure_seconds,
            "total_seconds": train_seconds + measure_seconds,
        },
        history=columns(run.history),
        estimates={name: value.to_dict() for name, value in estimates.items()} | found["estimates"],
        per_dimension=found["per_dimension"],
        curves=found["curves"],
        settings=found["settings"] | settings,
        files=dict(run.files),
    )
