"""Hydra plugins: sweepers for a grid and for a search, and launchers that hand the runs on.

Imported as ``hydra_plugins.vaeq``, the only name under which Hydra admits a plugin. Every Hydra
program that shares our environment may scan this module, so it imports no other part of vaeq at its
top.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from rich.console import Console

    from vaeq.config import RunConfig
    from vaeq.launch.sweep import SweepResult


class GridSweeper(BasicSweeper):
    """Every combination of the swept values, all handed to the launcher at once.

    Hydra's own sweeper writes a ``multirun.yaml`` before anything is checked; a refused sweep of
    ours leaves no trace.
    """

    def sweep(self, arguments: list[str]) -> Any:
        from vaeq.errors import InputError

        assert self.launcher is not None
        assert self.config is not None
        if self.config.objective is not None:
            raise InputError(
                "objective is for hydra/sweeper=optuna, which searches; add it, or drop objective."
            )
        # A value on the command line replaces the preset's for the same key.
        swept = _swept(self.params)
        overrides = OverridesParser.create().parse_overrides([*swept, *arguments])
        (jobs,) = self.split_arguments(overrides, max_batch_size=None)
        return [self.launcher.launch(jobs, initial_job_idx=0)]


class OptunaSweeper(Sweeper):
    """The swept values one after another, where Optuna expects the best of ``objective``.

    Args:
        params: as for a grid; integers also as ``range(2,33)``, numbers as ``interval(0,1)`` or,
            by their logarithm, ``tag(log,interval(1e-4,1e-2))``.
    """

    def __init__(self, params: DictConfig) -> None:
        self.params = params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from rich.console import Console

        from vaeq.compose import run_configs, search_space, sweep_config
        from vaeq.launch.study import search

        context, config, launcher = self.hydra_context, self.config, self.launcher
        assert context is not None
        assert config is not None
        assert launcher is not None
        swept = _swept(self.params)
        fixed, axes = search_space([*swept, *arguments])

        def jobs(points: Sequence[list[str]]) -> list[list[str]]:
            return [[*fixed, *point] for point in points]

        return search(
            sweep_config(config),
            axes,
            compose=lambda points: run_configs(context.config_loader, config, jobs(points)),
            launch=lambda points, first: launcher.launch(jobs(points), initial_job_idx=first),
            console=Console(),
        )


def _swept(params: Any) -> list[str]:
    """The values that a preset sweeps over, as overrides."""
    from vaeq.errors import InputError

    if params is not None and not isinstance(params, DictConfig | dict):
        raise InputError(
            "hydra.sweeper.params must hold settings with their values, as in "
            f"+hydra.sweeper.params.seed='0,1', got {str(params)!r}; add those or drop it."
        )
    return [f"{name!s}={value}" for name, value in (params or {}).items()]


class SweepLauncher(Launcher):
    """Checks every job of a sweep before any starts; how they run is its subclass's affair."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run what is not finished; raise at the end if any run failed."""
        from rich.console import Console

        from vaeq.compose import run_configs
        from vaeq.launch.sweep import run_sweep

        configs = run_configs(self.hydra_context.config_loader, self.config, job_overrides)
        console = Console()
        result = run_sweep(configs, console, lambda todo, ends: self.execute(todo, ends, console))
        result.raise_failures()
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=None) for _ in configs]

    @abstractmethod
    def execute(self, todo: list[RunConfig], result: SweepResult, console: Console) -> None:
        """Run every config and note its end in ``result``."""


class PoolLauncher(SweepLauncher):
    """One single-threaded process a run, as many at a time as there are cores."""

    def execute(self, todo: list[RunConfig], result: SweepResult, console: Console) -> None:
        from vaeq.launch.pool import Pool, available_cores

        # A run that was given more threads takes the place of as many workers.
        threads = max(config.threads or 1 for config in todo)
        n_jobs = self.config.n_jobs or max(1, available_cores() // threads)
        Pool(console, n_jobs).run(todo, result)


class EnsembleLauncher(SweepLauncher):
    """Runs of one shape train as one program, in this process, on one device.

    Args:
        members: runs in one program at most; the others follow in further programs.
    """

    def __init__(self, members: int = 64) -> None:
        self.members = members

    def execute(self, todo: list[RunConfig], result: SweepResult, console: Console) -> None:
        from vaeq.config import run_name
        from vaeq.errors import Taken
        from vaeq.loading import loading

        with loading():
            from vaeq.experiment import prepare, run_ensemble
        from vaeq.launch.pool import available_cores
        from vaeq.launch.progress import Event, display
        from vaeq.launch.sweep import ensembles, require_folders
        from vaeq.memory import needed

        groups = ensembles(todo, self.members)
        for group in groups:
            prepare(max(group, key=lambda config: needed(config).total), len(group))
        require_folders(todo)
        with display(console, [run_name(config) for config in todo]) as screen:

            def notify(event: Event) -> None:
                result.note(event)
                screen.update(event)

            waited = False
            while groups:
                taken: list[RunConfig] = []  # by another process: they come last
                for group in groups:
                    endings = run_ensemble(group, notify, group[0].threads or available_cores())
                    for config, ending in zip(group, endings, strict=True):
                        if isinstance(ending, Taken):
                            taken.append(config)
                        elif isinstance(ending, Exception):
                            notify(Event("failed", run_name(config), message=str(ending)))
                if taken and not waited:
                    waited = True
                    screen.line(f"another process is at what is left ({len(taken)}); waiting")
                if taken:
                    time.sleep(1)
                groups = ensembles(taken, self.members)


class SlurmLauncher(SweepLauncher):
    """One Slurm job a run, in an array; ``vaeq.launch.slurm.SlurmSettings`` are its arguments."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def execute(self, todo: list[RunConfig], result: SweepResult, console: Console) -> None:
        from vaeq.launch.cluster import settings
        from vaeq.launch.slurm import SlurmSettings, run_on_slurm

        asked = settings(SlurmSettings, self.settings)
        run_on_slurm(todo, result, console, asked, self.config.n_jobs)


class RayLauncher(SweepLauncher):
    """One Ray task a run; ``vaeq.launch.ray_cluster.RaySettings`` are its arguments."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def execute(self, todo: list[RunConfig], result: SweepResult, console: Console) -> None:
        from vaeq.launch.cluster import settings
        from vaeq.launch.ray_cluster import RaySettings, run_on_ray

        asked = settings(RaySettings, self.settings)
        run_on_ray(todo, result, console, asked, self.config.n_jobs)
