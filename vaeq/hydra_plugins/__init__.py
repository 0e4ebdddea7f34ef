"""Hydra plugins: a sweeper that writes nothing, and a launcher that hands the runs to the pool.

Imported as ``hydra_plugins.vaeq``, the only name under which Hydra admits a plugin. Every Hydra
program that shares our environment may scan this module, so it imports no other part of vaeq at its
top.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class GridSweeper(BasicSweeper):
    """Every combination of the swept values, all handed to the launcher at once.

    Hydra's own sweeper writes a ``multirun.yaml`` before anything is checked; a refused sweep of
    ours leaves no trace.
    """

    def sweep(self, arguments: list[str]) -> Any:
        assert self.launcher is not None
        # A value on the command line replaces the preset's for the same key.
        swept = [f"{name}={value}" for name, value in self.params.items()]
        overrides = OverridesParser.create().parse_overrides([*swept, *arguments])
        (jobs,) = self.split_arguments(overrides, max_batch_size=None)
        return [self.launcher.launch(jobs, initial_job_idx=0)]


class PoolLauncher(Launcher):
    """One single-threaded process a run, as many at a time as there are cores."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Check every job, then run them; raise at the end if any failed."""
        from rich.console import Console

        from vaeq.compose import run_configs
        from vaeq.pool import raise_failures, run_sweep

        configs = run_configs(self.hydra_context.config_loader, self.config, job_overrides)
        result = run_sweep(configs, self.config.n_jobs, Console())
        raise_failures(result)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=None) for _ in configs]
