"""Runs that are trained: encoded, judged and measured together, and recorded one by one."""

from __future__ import annotations

import time
import warnings
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from vaeq.config import RunConfig, config_hash
from vaeq.divergence.ex_post import ExPost
from vaeq.estimate import Estimate
from vaeq.experiment.preparation import measured_at_once
from vaeq.experiment.under_way import Run, fail
from vaeq.generation.panel import ANNEALED, LIKELIHOOD, Decoder, annealed, likelihoods
from vaeq.generation.quality import FLOOR, missing_quality
from vaeq.generation.samplers import SOURCES
from vaeq.launch.progress import Event
from vaeq.lockstep import side_by_side
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
    """Encode, measure and judge runs that were trained together, and record each.

    On a GPU as one program; on a CPU encoding and log p(x) are one, and what is measured of each is
    measured side by side, a run a core.
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
    ex_posts = side_by_side(_fit_ex_post, zip(runs, decoders, strict=True), images.train.device)
    known = _judge_together(runs, decoders, ex_posts)
    share = (time.perf_counter() - began) / len(runs)
    endings: list[RunRecord | Exception] = []
    at_once = measured_at_once(runs[0].config, images.train.device)
    for start in range(0, len(runs), at_once):
        some = slice(start, start + at_once)
        panels = _panels(runs[some], [(d.codes, d.test_codes) for d in decoders[some]])
        for run, decoder, ex_post, likelihood, panel in zip(
            runs[some], decoders[some], ex_posts[some], known[some], panels, strict=True
        ):
            judged = _Judged(ex_post, likelihood, share)
            endings.append(finish(run, partial(_measure_vae, run, decoder, judged, panel)))
    return endings


@dataclass(frozen=True)
class _Panel:
    """The estimates for the codes of a run, or why there are none; and the run's share of time."""

    ending: Measurement | Exception
    seconds: float

    @property
    def found(self) -> Measurement:
        """The estimates; what prevented them is raised."""
        if isinstance(self.ending, Exception):
            raise self.ending
        return self.ending


def _panels(runs: Sequence[Run], codes: Sequence[tuple[Codes, Codes]]) -> list[_Panel]:
    """The panel of each run: what is small in one would leave a second core, or a GPU, idle."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        # These are log variances, however a young encoder's may look.
        warnings.simplefilter("ignore", CodesWarning)
        device = codes[0][0][0].device
        found = side_by_side(_panel, zip(runs, codes, strict=True), device)
    share = (time.perf_counter() - began) / len(runs)
    return [_Panel(one, share) for one in found]


def _panel(one: tuple[Run, tuple[Codes, Codes]]) -> Measurement | Exception:
    run, (train, test) = one
    wanted = run.config.measure
    try:
        return measure(
            *train,
            *test,
            run.images.train_labels,
            n_samples=wanted.n_samples,
            seed=derive_seed(run.config.seed, "codes"),
            panel=wanted.panel,
            flow=wanted.flow,
        )
    except Exception as error:  # of this run alone
        return error


@dataclass(frozen=True)
class _Judged:
    """What was found of a decoder beside others, and the run's share of time."""

    ending: ExPost | Exception
    known: dict[str, Estimate]  # likelihoods that were had together
    seconds: float

    @property
    def ex_post(self) -> ExPost:
        """The mixture; what prevented it is raised."""
        if isinstance(self.ending, Exception):
            raise self.ending
        return self.ending


def _fit_ex_post(one: tuple[Run, Decoder]) -> ExPost | Exception:
    run, decoder = one
    try:
        return decoder.fit_ex_post(_generator(run, "ex-post"))
    except Exception as error:  # of this run alone
        return error


def _judge_together(
    runs: Sequence[Run], decoders: Sequence[Decoder], ex_posts: Sequence[ExPost | Exception]
) -> list[dict[str, Estimate]]:
    """log p(x) of all runs as one program, by importance sampling and by annealing, as asked for.

    Nothing for all where it fails: asked one by one, the run that cannot have it fails alone. Nor
    for a single run, whose decoder need not be one that can be stacked.
    """
    nothing: list[dict[str, Estimate]] = [{} for _ in runs]
    wanted = runs[0].config.generation
    densities = [one for one in ex_posts if isinstance(one, ExPost)]
    if len(runs) == 1 or len(densities) < len(runs):
        return nothing
    vaes = [run.state.vae for run in runs]
    stack = Ensemble(vaes, [Moments() for _ in vaes], [0.0] * len(vaes))
    found: list[list[dict[str, Estimate]]] = [nothing]
    try:
        if wanted.n_importance is not None:
            generators = [_generator(run, "likelihood") for run in runs]
            found.append(
                likelihoods(
                    decoders,
                    stack.decode,
                    densities,
                    generators,
                    n_importance=wanted.n_importance,
                    n_images=wanted.likelihood_images,
                )
            )
        if wanted.ais_images:
            generators = [_generator(run, "annealing") for run in runs]
            found.append(annealed(decoders, stack.decode, generators, n_images=wanted.ais_images))
    except Exception:
        return nothing
    return [dict(ChainMap(*parts)) for parts in zip(*found, strict=True)]


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


def _measure_vae(run: Run, decoder: Decoder, judged: _Judged, panel: _Panel) -> RunRecord:
    """What there is to know of a trained VAE."""
    found = panel.found
    began = time.perf_counter() - panel.seconds - judged.seconds
    generator = _generator(run, "measure")
    held_out = run.images.observed("test")
    estimates = held_out_elbo(decoder.decode, *decoder.test_codes, held_out, generator)
    more, settings, pictures = _generate(run, decoder, judged)
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
    (panel,) = _panels([run], [(codes, test_codes)])
    return _record(run, codes, panel.found, estimates, settings, generator, began, seconds)


def _generator(run: Run, *purpose: str) -> torch.Generator:
    seed = derive_seed(run.config.seed, *purpose)
    return torch.Generator(run.images.train.device).manual_seed(seed)


def _generate(
    run: Run, decoder: Decoder, judged: _Judged
) -> tuple[dict[str, Estimate], dict[str, Any], dict[str, torch.Tensor]]:
    """Likelihood, sample quality and pictures, as far as the config asks for them."""
    wanted = run.config.generation
    ex_post = judged.ex_post
    estimates = dict(judged.known)
    settings: dict[str, Any] = {"ex_post_components": ex_post.components}
    if wanted.n_importance is not None and not estimates.keys() >= {*LIKELIHOOD}:
        estimates |= decoder.likelihood(
            ex_post,
            _generator(run, "likelihood"),
            n_importance=wanted.n_importance,
            n_images=wanted.likelihood_images,
        )
    if wanted.ais_images and not estimates.keys() >= {*ANNEALED}:
        estimates |= decoder.annealed(_generator(run, "annealing"), wanted.ais_images)
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
