"""One sweep point, end to end: the only place that joins data, model and measures."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from vaeq import __version__
from vaeq.config import DataConfig, RunConfig, config_hash, identified, run_name
from vaeq.data.images import Images, load_images, mean_image
from vaeq.divergence.ex_post import ExPost
from vaeq.errors import DiskError, NeverTrained, Taken, VaeqError
from vaeq.estimate import Estimate
from vaeq.files.checksum import DamagedFile
from vaeq.generation.panel import ANNEALED, LIKELIHOOD, Decoder, likelihoods
from vaeq.generation.quality import FLOOR, missing_quality
from vaeq.generation.samplers import SOURCES
from vaeq.hardware import free_memory, resolve_device, resolve_precision
from vaeq.interrupts import held_back
from vaeq.launch.progress import Event
from vaeq.measurement import estimate_names, measure
from vaeq.memory import needed, require_memory
from vaeq.models.conv import ConvVAE, require_depth
from vaeq.models.elbo import held_out_elbo
from vaeq.models.mlp import VAE
from vaeq.models.ppca import fit_ppca
from vaeq.posterior.codes import CodesWarning
from vaeq.runs.lock import RunLock
from vaeq.runs.record import (
    CACHE,
    CHECKPOINT,
    CONFIG,
    HISTORY,
    PICTURES,
    SAMPLES,
    RunRecord,
    columns,
    complete_record,
    inspect_run,
    remove_temporaries,
    require_inside,
    require_writable,
    run_directory,
    summary,
    write_config,
    write_history,
    write_listed,
    write_record,
    write_status,
)
from vaeq.seeds import derive_seed
from vaeq.trackers import Log, require
from vaeq.training.checkpoint import load_checkpoint, save_checkpoint, save_weights
from vaeq.training.ensemble import Ensemble, Moments, encode_all
from vaeq.training.loop import Recipe, State, fit_together

Notify = Callable[[Event], None]
Codes = tuple[torch.Tensor, torch.Tensor]  # mean and logvar, (N, D) each
# Samples of q(z|x) kept for the pictures of the report.
_KEPT_SAMPLES = 10_000
# Seconds between two looks at a run that another process is at.
_LOOK = 1.0
# Models encoded together: their codes are held at once, 31 MB each at D = 64.
_ENCODED = 16


@lru_cache(maxsize=1)
def _images(data: DataConfig, device: torch.device) -> Images:
    # A worker's next run mostly wants the images of its last one.
    return load_images(**asdict(data)).to(device)


def prepare(config: RunConfig, members: int = 1) -> tuple[str, Images]:
    """What a run needs from outside: its precision, and its images on its device; its tracker.

    Args:
        members: of the program it trains in, of which the run is the largest.

    Raises:
        InputError: before anything is written; also where it would need more memory than is free.
    """
    require(config)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    images = _images(config.data, device)
    if config.model == "conv":
        require_depth(images.shape, config.encoder_depth, config.decoder_depth)
    if config.model != "ppca":
        n = {"n_train": len(images.train), "n_test": len(images.test)}
        need = needed(config, members=members, shape=images.shape, **n)
        require_memory(need, *free_memory(device), config)
    return precision, images


def build(config: RunConfig, images: Images) -> State:
    """A model with its initial weights, untrained, on the device of the images."""
    names = ("encoder_depth", "encoder_width", "decoder_depth", "decoder_width", "activation")
    network: dict[str, Any] = {name: getattr(config, name) for name in names}
    network["initialization"] = config.initialization
    network["generator"] = torch.Generator().manual_seed(derive_seed(config.seed, "weights"))
    if config.model == "conv":
        vae: VAE = ConvVAE(images.shape, config.latent_dim, **network)
    else:
        vae = VAE(images.pixels, config.latent_dim, **network)
    if config.initialization == "mean_image":
        vae.start_at(mean_image(images.train))
    return State(vae.to(images.train.device))


def recipe(config: RunConfig) -> Recipe:
    """The settings of a config that training itself takes."""
    return Recipe(**{item.name: getattr(config, item.name) for item in fields(Recipe)})


@dataclass(frozen=True)
class _Run:
    """A run under way; its lock is held."""

    config: RunConfig
    directory: Path
    lock: RunLock
    images: Images
    provenance: dict[str, Any]
    notify: Notify
    history: list[dict[str, float]]  # one row an epoch, growing
    first: int  # epochs it had when this process took it up
    log: Log
    files: dict[str, str]  # SHA-256 of those written so far, for the record
    initial: str  # digest of the weights before the first step
    _state: State | None

    @property
    def state(self) -> State:
        """What is trained; ppca has none."""
        assert self._state is not None
        return self._state

    @property
    def name(self) -> str:
        return run_name(self.config)

    def keep(self, name: str, content: bytes) -> None:
        """Write one of its files, which its record will list.

        Raises:
            DiskError: it cannot be written, or the folder is not this run's any more.
        """
        self.lock.require_held()
        self.files[name] = write_listed(self.directory / name, content)

    def tell(self, kind: str, epoch: int, done: int = 0, elbo: float | None = None) -> None:
        """An event of training, ``done`` images into the epoch after ``epoch``."""
        n = len(self.images.train)
        seen, total = (epoch - self.first) * n + done, (self.config.epochs - self.first) * n
        shown = epoch + 1 if done else epoch
        self.notify(Event(kind, self.name, shown, self.config.epochs, seen, total, elbo))


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


def run(config: RunConfig, notify: Notify, threads: int, *, wait: bool = True) -> RunRecord:
    """Train, measure and record one configuration, or return the record it already has.

    A run that was stopped goes on from its last epoch on disk. A failure is recorded and raised.

    Args:
        notify: receives an Event a step; it must be quick.
        threads: CPU threads of this process; part of what makes weights bit-identical.
        wait: for another process that is at the run, to take it up where that leaves it.

    Raises:
        InputError: the device, the data or the folder cannot be used; nothing is written.
        Taken: another process is at the run, and ``wait`` is false.
        TrainingDiverged: the loss is not finite; the run is recorded as failed.
        DiskError: a file cannot be written; the run is recorded as failed, if that can be written.
    """
    (ending,) = run_ensemble([config], notify, threads)
    if wait and isinstance(ending, Taken):
        notify(Event("note", run_name(config), message="another process is at it; waiting for it"))
        while isinstance(ending, Taken):
            time.sleep(_LOOK)
            (ending,) = run_ensemble([config], notify, threads)
    if isinstance(ending, Exception):
        raise ending
    return ending


def run_ensemble(
    configs: Sequence[RunConfig], notify: Notify, threads: int
) -> list[RunRecord | Exception]:
    """Train runs of one shape as one program, then measure and record each as if it were alone.

    Finished ones are skipped; half-trained ones go on, those at the same epoch together, and those
    of model=conv one after the other. A member that fails is recorded, and the others go on; one
    that another process is at is left to it.

    Args:
        configs: of one network but for latent_dim, and one data, batch_size, epochs, warm-up of
            the learning rate, schedule, precision and device; see ``vaeq.launch.sweep.ensembles``.

    Returns:
        The record of each, or why it has none: Taken where another process is at it.
    """
    configs = identified(configs)
    torch.set_num_threads(threads)
    endings: list[RunRecord | Exception | None] = [None] * len(configs)
    with ExitStack() as locks:
        runs: dict[int, _Run] = {}
        for i, config in enumerate(configs):
            try:
                begun: _Run | RunRecord = _begin(config, notify, threads, locks)
            except VaeqError as error:
                endings[i] = error
                continue
            if isinstance(begun, RunRecord):
                endings[i] = begun
            else:
                runs[i] = begun
        for i, one in runs.items():
            if one.config.model == "ppca":
                endings[i] = _finish(one, partial(_measure_ppca, one))
        networks = {i: one for i, one in runs.items() if endings[i] is None}
        for together in _programs(networks):
            failures = dict(zip(together, _train(list(together.values())), strict=True))
            for i, failure in failures.items():
                if failure is not None:
                    _fail(runs[i], failure)
                    endings[i] = failure
            trained = [i for i in together if failures[i] is None]
            for start in range(0, len(trained), _ENCODED):
                some = trained[start : start + _ENCODED]
                for i, ending in zip(some, _measure([runs[i] for i in some]), strict=True):
                    endings[i] = ending
    return [ending for ending in endings if ending is not None]


def _programs(runs: dict[int, _Run]) -> list[dict[int, _Run]]:
    """Runs that take their steps together: at the same epoch, and convolutions by themselves."""
    found: dict[tuple[int, int], dict[int, _Run]] = {}
    for i, one in runs.items():
        alone = i if one.config.model == "conv" else -1
        found.setdefault((one.first, alone), {})[i] = one
    return [found[key] for key in sorted(found)]


def _begin(config: RunConfig, notify: Notify, threads: int, locks: ExitStack) -> RunRecord | _Run:
    """The record of a finished run, or the run, locked, at its last epoch on disk.

    Raises:
        Taken: another process is at the run.
        InputError: the device, the data or the folder of its experiment cannot be used.
        DiskError: its own folder cannot be written.
    """
    directory = run_directory(config)
    found = complete_record(directory, config)
    if found is not None:
        # Who begins runs has sorted out what was finished.
        notify(Event("skipped", run_name(config), message="finished by another process"))
        return found
    precision, images = prepare(config)
    for folder in (directory, directory.parent, Path(config.outputs) / CACHE):
        require_inside(folder, Path(config.outputs))
    require_writable(directory.parent)
    lock = locks.enter_context(RunLock(directory))
    # Another process may have finished it before this one had the lock.
    found, damaged = inspect_run(directory, config)
    if found is not None and not damaged:
        notify(Event("skipped", run_name(config), message="finished by another process"))
        return found
    if lock.by_file:
        words = "its file system has no flock: do not run it on two machines at once"
        notify(Event("note", run_name(config), message=words))
    remove_temporaries(directory)
    state = build(config, images) if config.model != "ppca" else None
    initial = _matrices_digest(state) if state is not None else ""
    if state is not None:
        state = _resume(config, directory, images, state, damaged)
    history = state.history if state is not None else []
    if damaged:
        notify(Event("note", run_name(config), message=_damage_words(damaged, len(history))))
    # The record of a damaged run stays until a new one takes its place, but vouches for none of the
    # files that are written from here on: one that is killed goes on from its checkpoint.
    files = {CONFIG: write_config(directory, config)}
    if not history:
        # Of a training that is over; it would contradict the checkpoints to come.
        (directory / HISTORY).unlink(missing_ok=True)
    provenance = _provenance(images, precision, threads)
    log = Log(config, history, lambda text: notify(Event("note", run_name(config), message=text)))
    locks.callback(log.close)
    first = len(history)
    return _Run(
        config,
        directory,
        lock,
        images,
        provenance,
        notify,
        history,
        first,
        log,
        files,
        initial,
        state,
    )


def _matrices_digest(state: State) -> str:
    """SHA-256 of the weights, without the biases: those begin at 0 and any step moves them."""
    found = hashlib.sha256()
    for value in state.vae.parameters():
        if value.ndim > 1:
            found.update(value.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def _damage_words(damaged: dict[str, str], epochs: int) -> str:
    """One line: which files are not sound, and what becomes of the run."""
    words = "; ".join(f"{name} {what.removesuffix('.')}" for name, what in damaged.items())
    remedy = f"goes on from its checkpoint at epoch {epochs}" if epochs else "is trained again"
    return f"{words}. The run {remedy}."


def _provenance(images: Images, precision: str, threads: int) -> dict[str, Any]:
    device = images.train.device
    return {
        "vaeq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.machine(),
        "precision": precision,
        "threads": threads,
        "data": {
            "name": images.name,
            "md5": images.md5,
            "n_train": len(images.train),
            "n_test": len(images.test),
        },
    }


def _resume(
    config: RunConfig, directory: Path, images: Images, state: State, damaged: dict[str, str]
) -> State:
    """``state`` at the last epoch on disk, or at the beginning; why so, in ``damaged``."""
    try:
        load_checkpoint(directory, state, config_hash(config))
    except DamagedFile as error:
        damaged.setdefault(CHECKPOINT, str(error).removeprefix(f"{directory / CHECKPOINT} "))
        return build(config, images)
    return state


class _Keeper:
    """Writes the state of a run after an epoch, but spends a twentieth of the time on it at most.

    A network that trains thirty epochs a second would do nothing else but write. What is lost to a
    SIGKILL is seconds of work and no result: the same bits are computed again.
    """

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._due = 0.0
        self._kept = run.first

    def epoch_done(self) -> None:
        if time.monotonic() >= self._due:
            began = time.monotonic()
            self.write()
            ended = time.monotonic()
            self._due = ended + 20 * (ended - began)

    def write(self, *, final: bool = False) -> None:
        """Bring the files up to the state, if they are behind.

        Raises:
            DiskError: they cannot be written, or are not this run's any more.
        """
        run, state = self._run, self._run.state
        if final or state.epoch > self._kept:
            run.lock.require_held()
            checkpoint = save_checkpoint(run.directory, state, config_hash(run.config), final=final)
            history = write_history(run.directory, state.history)
            run.files.update({CHECKPOINT: checkpoint, HISTORY: history})
            write_status(run.directory, run.config, "running", state.epoch)
            self._kept = state.epoch


def _train(runs: Sequence[_Run]) -> list[Exception | None]:
    """Fit the runs together; what went wrong with each, if anything did.

    Ctrl-C and SIGTERM are let in between steps, where the state of every run is that of the end of
    an epoch: one that came as it is brought up to the next would keep a mixture of the two.
    """
    failures: list[Exception | None] = [None] * len(runs)
    keepers = [_Keeper(run) for run in runs]
    told = 0.0

    def on_images(epoch: int, done: int) -> None:
        nonlocal told
        let_in()
        if time.monotonic() - told < 0.1:
            return
        told = time.monotonic()
        for run, failure in zip(runs, failures, strict=True):
            if failure is None:
                run.tell("images", epoch - 1, done)

    def on_epoch(i: int) -> None:
        keepers[i].epoch_done()
        history = runs[i].history
        runs[i].log.epoch(history[-1])
        runs[i].tell("epoch", len(history), elbo=history[-1]["test_elbo"])

    with held_back() as let_in:
        for run in runs:
            run.tell("start", run.first)
        # Adam's moments of pixels that are seldom lit decay into denormals: 100 cycles each.
        torch.set_flush_denormal(True)
        try:
            for i, run in enumerate(runs):
                try:
                    write_status(run.directory, run.config, "running", run.first)
                except DiskError as error:
                    failures[i] = error
            whole = [i for i, failure in enumerate(failures) if failure is None]
            fit_together(
                [runs[i].state for i in whole],
                runs[0].images,
                [recipe(runs[i].config) for i in whole],
                precision=runs[0].provenance["precision"],
                on_images=on_images,
                on_epoch=lambda member: on_epoch(whole[member]),
                on_failed=lambda member, error: failures.__setitem__(whole[member], error),
            )
        except Exception as error:
            failures = [failure or error for failure in failures]
        except BaseException:
            for keeper in keepers:
                # The last epoch of one whose disk is full is lost, and that of the others is not.
                with contextlib.suppress(DiskError):
                    keeper.write()
            raise
        finally:
            torch.set_flush_denormal(False)
        for i, (run, keeper) in enumerate(zip(runs, keepers, strict=True)):
            if failures[i] is None and _matrices_digest(run.state) == run.initial:
                failures[i] = NeverTrained(run.state.epoch, run.config.learning_rate)
            try:
                keeper.write(final=failures[i] is None)
            except DiskError as error:
                failures[i] = failures[i] or error
    return failures


def _measure(runs: Sequence[_Run]) -> list[RunRecord | Exception]:
    """Encode runs that were trained together as one program, and measure and record each."""
    images = runs[0].images
    vaes = [run.state.vae for run in runs]
    codes = [encode_all(vaes, images.observed(part)) for part in ("train", "test")]
    decoders = [
        Decoder(vae.decode, train, test, images)
        for vae, train, test in zip(vaes, *codes, strict=True)
    ]
    judged = _judge_together(runs, decoders) if len(runs) > 1 else [None] * len(runs)
    return [
        _finish(run, partial(_measure_vae, run, decoder, known))
        for run, decoder, known in zip(runs, decoders, judged, strict=True)
    ]


def _judge_together(
    runs: Sequence[_Run], decoders: Sequence[Decoder]
) -> Sequence[tuple[ExPost, dict[str, Estimate]] | None]:
    """The ex-post mixture of every run, and log p(x) of all as one program, where it is asked for.

    None for all also where it fails: asked one by one, the run that cannot have it fails alone.
    """
    nothing = [None] * len(runs)
    wanted = runs[0].config.generation
    if wanted.n_importance is None:
        return nothing
    vaes = [run.state.vae for run in runs]
    stack = Ensemble(vaes, [Moments() for _ in vaes], [0.0] * len(vaes))
    try:
        ex_posts = [
            decoder.fit_ex_post(_generator(run, "ex-post"))
            for run, decoder in zip(runs, decoders, strict=True)
        ]
        found = likelihoods(
            decoders,
            stack.decode,
            ex_posts,
            [_generator(run, "likelihood") for run in runs],
            n_importance=wanted.n_importance,
            n_images=wanted.likelihood_images,
        )
    except Exception:
        return nothing
    return list(zip(ex_posts, found, strict=True))


def _finish(run: _Run, measured: Callable[[], RunRecord]) -> RunRecord | Exception:
    """Measure and record a run."""
    run.notify(Event("stage", run.name, message="measuring"))
    try:
        record = measured()
        run.lock.require_held()
        write_record(run.directory, record, len(run.history))
    except Exception as error:
        _fail(run, error)
        return error
    run.log.finish(record.estimates, len(run.history))
    run.notify(Event("complete", run.name, message=summary(record)))
    return record


def _measure_vae(
    run: _Run, decoder: Decoder, judged: tuple[ExPost, dict[str, Estimate]] | None
) -> RunRecord:
    """What there is to know of a trained VAE; its likelihood may be ``judged`` by now."""
    began = time.perf_counter()
    generator = _generator(run, "measure")
    held_out = run.images.observed("test")
    estimates = held_out_elbo(decoder.decode, *decoder.test_codes, held_out, generator)
    more, settings, pictures = _generate(run, decoder, judged)
    content = save({name: values.cpu() for name, values in pictures.items()})
    run.keep(PICTURES, content)
    seconds = sum(row["seconds"] for row in run.history)
    codes, test_codes = decoder.codes, decoder.test_codes
    return _record(run, codes, test_codes, estimates | more, settings, generator, began, seconds)


def _measure_ppca(run: _Run) -> RunRecord:
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
    return _record(run, codes, test_codes, estimates, settings, generator, began, seconds)


def _generator(run: _Run, *purpose: str) -> torch.Generator:
    seed = derive_seed(run.config.seed, *purpose)
    return torch.Generator(run.images.train.device).manual_seed(seed)


def _generate(
    run: _Run, decoder: Decoder, judged: tuple[ExPost, dict[str, Estimate]] | None
) -> tuple[dict[str, Estimate], dict[str, Any], dict[str, torch.Tensor]]:
    """Likelihood, sample quality and pictures, as far as the config asks for them."""
    wanted = run.config.generation
    estimates: dict[str, Estimate] = {}
    if judged is not None:
        ex_post, likelihood = judged
        estimates |= likelihood
    else:
        ex_post = decoder.fit_ex_post(_generator(run, "ex-post"))
    settings: dict[str, Any] = {"ex_post_components": ex_post.components}
    if wanted.n_importance is not None and judged is None:
        estimates |= decoder.likelihood(
            ex_post,
            _generator(run, "likelihood"),
            n_importance=wanted.n_importance,
            n_images=wanted.likelihood_images,
        )
    if wanted.ais_images:
        estimates |= decoder.annealed(_generator(run, "annealing"), wanted.ais_images)
    if wanted.quality:
        cache = Path(run.config.outputs) / CACHE
        quality, classifier = decoder.quality(ex_post, _generator(run, "quality"), cache)
        estimates |= quality
        settings["classifier"] = classifier
    pictures = decoder.pictures(ex_post, _generator(run, "pictures"))
    return estimates, {"generation": settings}, pictures


def _record(
    run: _Run,
    codes: Codes,
    test_codes: Codes,
    estimates: dict[str, Estimate],
    settings: dict[str, Any],
    generator: torch.Generator,
    began: float,
    train_seconds: float,
) -> RunRecord:
    """Measure the codes, keep some of them for the pictures, and put everything together."""
    config, images = run.config, run.images
    mean, logvar = codes
    with warnings.catch_warnings():
        # These are log variances, however a young encoder's may look.
        warnings.simplefilter("ignore", CodesWarning)
        found = measure(
            mean,
            logvar,
            *test_codes,
            images.train_labels,
            n_samples=config.measure.n_samples,
            seed=derive_seed(config.seed, "codes"),
            panel=config.measure.panel,
            flow=config.measure.flow,
        ).to_dict()
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


def _fail(run: _Run, error: Exception) -> None:
    """Leave word of a failure where the report and the next sweep look for it."""
    kind = type(error).__name__
    expected = isinstance(error, VaeqError)
    failure = {"type": kind, "message": str(error) if expected else f"{kind}: {error}"}
    if not expected:
        failure["traceback"] = "".join(traceback.format_exception(error))
    record = RunRecord(
        "failed",
        asdict(run.config),
        config_hash(run.config),
        run.provenance,
        history=columns(run.history),
        failure=failure,
    )
    # Where nothing can be written, the run is no less failed: it has no record, and is tried again.
    with contextlib.suppress(DiskError):
        run.lock.require_held()
        write_record(run.directory, record, len(run.history))
