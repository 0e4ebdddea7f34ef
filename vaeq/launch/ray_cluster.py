"""A sweep as tasks of a Ray cluster. No torch in this module."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vaeq.config import RunConfig, check, key
from vaeq.errors import InputError, one_line
from vaeq.launch.cluster import gather, run_job, watched
from vaeq.launch.pool import available_cores
from vaeq.launch.sweep import SweepResult, require_folders

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RaySettings:
    """``hydra.launcher.*`` of ``hydra/launcher=ray``: which cluster, and what each run takes."""

    address: str | None = key(
        None, "HOST:PORT of a cluster, or auto; null: RAY_ADDRESS, else one on this machine"
    )
    num_cpus: float | None = key(
        None, "cores of a run; null: its threads, or 1", unit="cores", above=0, high=1024
    )
    num_gpus: float = key(
        0.0, "GPUs of a run, 0.25 for four runs on one; with 0 a run sees none", low=0, high=64
    )
    memory_gb: float | None = key(
        None, "memory of a run; null: not counted", unit="GB", above=0, high=100_000
    )
    resources: Any = key(None, "custom resources of a run, {name: amount}")  # noqa: RUF009

    def __post_init__(self) -> None:
        check(self, "hydra.launcher.")
        if self.resources is not None and not isinstance(self.resources, dict):
            raise InputError(
                f"hydra.launcher.resources must be {{name: amount}}, or null, got {self.resources}."
            )


def run_on_ray(
    configs: Sequence[RunConfig],
    result: SweepResult,
    console: Console,
    settings: RaySettings,
    n_jobs: int | None,
) -> None:
    """Run every config as a task; each one's end is in ``result``.

    Raises:
        InputError: Ray or its cluster is not there, or a folder cannot be written.
        KeyboardInterrupt: after the tasks have been cancelled; finished runs stay finished.
    """
    # Ray reports its use to its makers unless told not to before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Which devices a task without GPUs sees is then as the setting says.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        import ray
    except ImportError:
        raise InputError(
            "hydra/launcher=ray needs ray; install it with: pip install 'vaeq[ray]'."
        ) from None
    require_folders(configs)
    address = settings.address or os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {}
    if not address:
        local = {"num_cpus": n_jobs or available_cores(), "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"hydra.launcher.address={address} cannot be used: {one_line(str(error))}"
        ) from None
    asked: dict[str, Any] = {"num_gpus": settings.num_gpus, "resources": settings.resources}
    if settings.memory_gb is not None:
        asked["memory"] = int(settings.memory_gb * 2**30)
    task = ray.remote(
        **asked,
        # A run whose worker died is reported, and goes on from its last epoch when it is asked for.
        max_retries=0,
    )(run_job)
    runs = watched(configs)
    folder = str(Path.cwd())
    jobs = _RayJobs(
        [
            (
                task.options(num_cpus=settings.num_cpus or float(config.threads or 1)),
                (asdict(config), folder),
            )
            for config in configs
        ],
        n_jobs or len(configs),
    )
    try:
        gather(runs, jobs, result, console, _POLL_SECONDS)
    finally:
        ray.shutdown()


class _RayJobs:
    """Tasks, so many of them handed to Ray at a time."""

    def __init__(self, calls: list[tuple[Any, tuple[Any, ...]]], most: int) -> None:
        self._waiting = list(enumerate(calls))
        self._most = most
        self._running: dict[Any, int] = {}
        self._words: dict[int, str] = {}
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._most:
            i, (task, arguments) = self._waiting.pop(0)
            self._running[task.remote(*arguments)] = i

    def over(self, seconds: float) -> dict[int, str]:
        import ray

        if self._running:
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=seconds)
            if done:  # and whichever others
                done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            for one in done:
                self._words[self._running.pop(one)] = _word(one)
            self._fill()
        else:  # the files of the last ones are still to be seen
            time.sleep(seconds)
        return dict(self._words)

    def cancel(self) -> None:
        import ray

        self._waiting.clear()
        for one in self._running:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(one, force=True)


def _word(task: Any) -> str:
    """How a task ended, in a few words."""
    import ray

    try:
        ray.get(task)
    except ray.exceptions.OutOfMemoryError:
        return "Ray stopped its worker, as the memory of the node was used up"
    except ray.exceptions.WorkerCrashedError:
        return "Ray says that its worker died"
    except ray.exceptions.RayTaskError as error:
        return f"{type(error.cause).__name__}: {one_line(str(error.cause))}"
    except ray.exceptions.RayError as error:
        return f"Ray says {type(error).__name__}"
    return "Ray says that it ended well"
