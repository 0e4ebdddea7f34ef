"""A search for the settings that make one estimate smallest or largest: ``hydra/sweeper=optuna``.

Optuna (Akiba et al. 2019) proposes points by a tree-structured Parzen estimator (Bergstra et al.
2011, NeurIPS); each point is a run like any other, trained by the launcher of the sweep, and the
report reads them as it reads a grid. What is proposed depends on the settings, ``trial_seed`` and
the trials before alone, so that a search that was stopped goes on as if it had not been.

No torch at the top: a search that is refused is refused at once.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from filelock import Timeout
from rich.console import Console

from vaeq.config import RunConfig, SweepConfig, run_name, science
from vaeq.errors import InputError, RunsFailed, VaeqError, one_line
from vaeq.runs.record import (
    complete_record,
    lock,
    require_inside,
    require_writable,
    run_directory,
    write_atomic,
)
from vaeq.seeds import derive_seed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

# In the folder of the experiment. The journal is Optuna's, for optuna-dashboard too.
JOURNAL = "study.journal"
TABLE = "study.csv"

Point = list[str]  # overrides
Compose = Callable[[Sequence[Point]], list[RunConfig]]
Launch = Callable[[Sequence[Point], int], Any]


@dataclass(frozen=True)
class Axis:
    """A setting and the values a search may give it: ``choices``, or numbers from low to high."""

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    integer: bool = False

    def ends(self) -> list[str]:
        """All choices, or the smallest and the largest value, as text."""
        return list(self.choices) or [self.text(self.low), self.text(self.high)]

    def text(self, value: Any) -> str:
        """A value as it is written after ``name=``."""
        if self.choices:
            return str(value)
        return str(int(value)) if self.integer else repr(float(value))

    def distribution(self) -> BaseDistribution:
        """The same in Optuna's words."""
        from optuna import distributions as of

        if self.choices:
            return of.CategoricalDistribution(self.choices)
        if self.integer:
            step = 1 if self.step is None else int(self.step)
            return of.IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return of.FloatDistribution(self.low, self.high, log=self.log, step=self.step)


def search(
    settings: SweepConfig,
    axes: Sequence[Axis],
    *,
    compose: Compose,
    launch: Launch,
    console: Console,
) -> dict[str, str]:
    """Try ``n_trials`` points and return the best, as override values by setting.

    A point with several seeds (``seed=0,1,2``) is worth the mean of its runs. One whose run fails,
    or has no number for the objective, is a failed trial; the search goes on.

    Args:
        settings: objective, direction and size of the search, and what its runs share.
        axes: the settings to choose; ``seed`` is not chosen but tried with all its values.
        compose: the checked configs of some points.
        launch: trains points, the first of which is a run of this number; finished ones it skips.

    Raises:
        InputError: the objective, an axis or the folder cannot be used; nothing was started.
        VaeqError: no trial has a number for the objective.
    """
    seeds = next((axis.ends() for axis in axes if axis.name == "seed"), [])
    axes = [axis for axis in axes if axis.name != "seed"]
    base = _check(settings, axes, seeds, compose)
    folder = run_directory(base).parent
    require_inside(folder, Path(base.outputs))
    require_writable(folder)
    try:
        with lock(folder / ".study.lock", timeout=0):
            return _Search(settings, axes, seeds, base, folder, compose, launch, console).run()
    except Timeout:
        raise InputError(f"another process is at the search in {folder}; let it finish.") from None


def _check(
    settings: SweepConfig, axes: Sequence[Axis], seeds: Sequence[str], compose: Compose
) -> RunConfig:
    """Refuse what cannot be searched, before anything starts; the config at the first corner."""
    if settings.objective is None:
        raise InputError(
            "objective is missing: hydra/sweeper=optuna needs an estimate to search by, such as "
            "objective=marginal_kl."
        )
    if not axes:
        raise InputError(
            "there is nothing to search: give a setting several values, such as latent_dim=2,4,8 "
            "or latent_dim='range(2,33)'."
        )
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise InputError("hydra/sweeper=optuna needs pip install 'vaeq[optuna]'.") from None
    first = {axis.name: axis.ends()[0] for axis in axes}
    corners = [first | {axis.name: end} for axis in axes for end in axis.ends()]
    seeded = [{"seed": seed} for seed in seeds]
    configs = compose([_overrides(point) for point in [first, *corners, *seeded]])
    _check_objective(settings.objective, configs[0])
    return configs[0]


def _check_objective(objective: str, config: RunConfig) -> None:
    from vaeq.experiment import estimates_of

    names = estimates_of(config)
    if objective in names:
        return
    known = sorted(names)
    close = difflib.get_close_matches(objective, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise InputError(
        f"objective={objective} is not among the estimates of these runs; {hint}They are "
        f"{', '.join(known)}; measure.panel=full and generation.* have more."
    )


def _overrides(values: dict[str, str]) -> Point:
    return [f"{name}={value}" for name, value in values.items()]


@dataclass
class _Search:
    """A study on disk, and how its next trials are run."""

    settings: SweepConfig
    axes: Sequence[Axis]
    seeds: Sequence[str]
    base: RunConfig
    folder: Path
    compose: Compose
    launch: Launch
    console: Console

    def run(self) -> dict[str, str]:
        study = self._study()
        wanted, batch = self.settings.n_trials, self.settings.trial_batch
        while True:
            trials = study.get_trials(deepcopy=False)
            waiting = [trial for trial in trials if not trial.state.is_finished()]
            if not waiting and len(trials) >= wanted:
                return self._conclude(study)
            # Batches end at multiples of their size, also after a stop in the midst of one.
            start = (len(trials) - 1) // batch * batch if waiting else len(trials)
            if not any(trial.state.is_finished() for trial in trials[start:]):
                self._propose(study, min(wanted, (start // batch + 1) * batch))
            self._try(study)

    def _study(self) -> Study:
        """The study of this question: another objective, space or setting is another study."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.study import StudyDirection

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        shared = science(self.base)
        for name in [axis.name for axis in self.axes] + (["seed"] if self.seeds else []):
            section, _, key = name.rpartition(".")
            (shared[section] if section else shared).pop(key, None)
        question = {
            "objective": self.settings.objective,
            "direction": self.settings.direction,
            "trial_batch": self.settings.trial_batch,
            "trial_seed": self.settings.trial_seed,
            "axes": [asdict(axis) for axis in self.axes],
            "seeds": list(self.seeds),
            "shared": shared,
        }
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        journal = self.folder / JOURNAL
        if journal.is_symlink():
            raise InputError(f"{one_line(str(journal))} is a link, which no journal is; delete it.")
        try:
            return optuna.create_study(
                study_name=f"{self.settings.objective}-{digest[:8]}",
                storage=JournalStorage(JournalFileBackend(str(journal))),
                direction=StudyDirection[self.settings.direction.upper()],
                load_if_exists=True,
            )
        except Exception as error:  # of Optuna or JSON, whatever they raise on a file of others
            raise InputError(
                f"{one_line(str(journal))} cannot be read ({one_line(str(error), 80)}); delete it: "
                "finished runs stay, and the search finds them again."
            ) from None

    def _propose(self, study: Study, total: int) -> None:
        """Ask for trials until there are so many."""
        from optuna.samplers import TPESampler

        space = {axis.name: axis.distribution() for axis in self.axes}
        for number in range(len(study.get_trials(deepcopy=False)), total):
            # A generator a trial, so that it does not matter where a search was stopped.
            seed = derive_seed(self.settings.trial_seed, "trial", str(number)) % 2**32
            # Of those under way it expects the worst, and looks elsewhere.
            study.sampler = TPESampler(seed=seed, constant_liar=True)
            study.ask(fixed_distributions=space)

    def _try(self, study: Study) -> None:
        """Run the proposed trials side by side, and tell the study what they are worth."""
        from optuna.trial import TrialState

        trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        points = [point for trial in trials for point in self._points(trial)]
        with contextlib.suppress(RunsFailed):  # each said why when it fell
            self.launch(points, trials[0].number * max(1, len(self.seeds)))
        for trial in trials:
            found = self._worth(trial)
            if isinstance(found, str):
                study.tell(trial.number, state=TrialState.FAIL)
            else:
                study.tell(trial.number, found)
            worth = found if isinstance(found, str) else f"{found:.6g}"
            self._say(f"trial {trial.number}: {self._words(trial)}: {self._objective}={worth}")
        self._write_table(study)

    def _points(self, trial: FrozenTrial) -> list[Point]:
        """The overrides of a trial, one point a seed."""
        chosen = [f"{axis.name}={axis.text(trial.params[axis.name])}" for axis in self.axes]
        return [[*chosen, f"seed={seed}"] for seed in self.seeds] or [chosen]

    def _worth(self, trial: FrozenTrial) -> float | str:
        """The objective of a trial, or why it has none."""
        values = []
        for config in self.compose(self._points(trial)):
            record = complete_record(run_directory(config), config)
            if record is None:
                return f"no number, {run_name(config)} failed"
            entry = record.estimates.get(self._objective)
            if entry is None or entry["value"] is None:
                return (
                    f"no number, {'it is not in the record' if entry is None else entry['reason']}"
                )
            values.append(float(entry["value"]))
        return fmean(values)

    @property
    def _objective(self) -> str:
        assert self.settings.objective is not None
        return self.settings.objective

    def _words(self, trial: FrozenTrial) -> str:
        return ", ".join(self._points(trial)[0][: len(self.axes)])

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write_table(self, study: Study) -> None:
        """``study.csv``: a row a trial, with the folders of its runs."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["trial", "state", self._objective, *(a.name for a in self.axes), "runs"])
        for trial in study.get_trials(deepcopy=False):
            names = [run_name(config) for config in self.compose(self._points(trial))]
            values = [axis.text(trial.params[axis.name]) for axis in self.axes]
            value = "" if trial.value is None else repr(trial.value)
            state = trial.state.name.lower()
            writer.writerow([trial.number, state, value, *values, " ".join(names)])
        write_atomic(self.folder / TABLE, stream.getvalue())

    def _conclude(self, study: Study) -> dict[str, str]:
        """Say which trial is the best."""
        self._write_table(study)
        trials = study.get_trials(deepcopy=False)
        failed = sum(trial.value is None for trial in trials)
        if failed == len(trials):
            raise VaeqError(
                f"none of {len(trials)} trials has a number for objective={self._objective}; "
                f"see {self.folder / TABLE}."
            )
        best = study.best_trial
        self._say(
            f"best of {len(trials)} trials{f', {failed} failed' if failed else ''}: "
            f"{self._objective}={best.value:.6g} at {self._words(best)} (trial {best.number}); "
            f"all of them in {self.folder / TABLE}"
        )
        return {axis.name: axis.text(best.params[axis.name]) for axis in self.axes}
