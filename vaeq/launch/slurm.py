"""A sweep as an array of Slurm jobs, submitted by submitit: its script, its folder of logs.

submitit asks ``sacct`` how a job is, which a Slurm without an accounting data base cannot answer;
``squeue`` can, and is asked here. No torch in this module.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vaeq.config import RunConfig, check, key
from vaeq.errors import InputError, VaeqError, one_line
from vaeq.launch.cluster import gather, run_job, watched
from vaeq.launch.sweep import SweepResult, require_folders

# Slurm takes 1001 jobs in an array where nobody has set more.
_ARRAY = 1_000
# States in which a job is over and will not begin again.
_OVER = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
     "PREEMPTED", "REVOKED", "TIMEOUT")
)  # fmt: skip
_LOGS = ".submitit"


@dataclass(frozen=True)
class SlurmSettings:
    """``hydra.launcher.*`` of ``hydra/launcher=submitit_slurm``: what each run asks Slurm for."""

    partition: str | None = key(None, "partition; null: the cluster's own")
    account: str | None = key(None, "account that pays; null: the user's own")
    qos: str | None = key(None, "quality of service; null: the cluster's own")
    timeout_min: int = key(240, "time limit of a run", unit="minutes", low=1, high=525_600)
    cpus_per_task: int | None = key(
        None, "cores of a run; null: its threads, or 1", unit="cores", low=1, high=1024
    )
    gpus_per_node: int | None = key(None, "GPUs of a run", unit="GPUs", low=1, high=64)
    gres: str | None = key(None, "generic resources of a run, such as gpu:a100:1")
    mem_gb: float | None = key(
        None, "memory of a run; null: the cluster's own", unit="GB", above=0, high=100_000
    )
    constraint: str | None = key(None, "features that a node must have")
    exclude: str | None = key(None, "nodes not to be used")
    nodelist: str | None = key(None, "nodes to be used")
    comment: str | None = key(None, "comment of the jobs")
    name: str = key("vaeq", "name of the jobs")
    array_parallelism: int | None = key(
        None, "jobs at a time; null: n_jobs, or 256", unit="jobs", low=1, high=100_000
    )
    signal_delay_s: int = key(
        90, "a run that meets its time limit is told so long before", unit="seconds", low=1
    )
    max_num_timeout: int = key(
        3, "times that such a run is queued again, to go on from its last epoch", low=0
    )
    setup: Any = key(None, "list of shell commands before each run, such as module load")  # noqa: RUF009
    additional_parameters: Any = key(None, "further options of sbatch, {name: value}")  # noqa: RUF009
    poll_seconds: float = key(5.0, "how often squeue is asked", unit="seconds", above=0, high=3600)

    def __post_init__(self) -> None:
        check(self, "hydra.launcher.")
        for name, kind, words in (
            ("setup", list, "a list of shell commands"),
            ("additional_parameters", dict, "options {name: value}"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise InputError(f"hydra.launcher.{name} must be {words}, or null, got {value}.")


class SlurmRun:
    """A run as submitit keeps and calls it."""

    def __init__(self, values: dict[str, Any], folder: str) -> None:
        self.values = values
        self.folder = folder

    def __call__(self) -> None:
        run_job(self.values, self.folder)

    def checkpoint(self) -> Any:
        """What to queue again where Slurm takes the node away or the time is over: the same run.

        It goes on from its last epoch, which unwinding this process has put on the disk.
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(SlurmRun(self.values, self.folder))


def run_on_slurm(
    configs: Sequence[RunConfig],
    result: SweepResult,
    console: Console,
    settings: SlurmSettings,
    n_jobs: int | None,
) -> None:
    """Run every config as a job of an array; each one's end is in ``result``.

    Raises:
        InputError: submitit or Slurm is not there, or a folder cannot be written.
        VaeqError: Slurm refused the array.
        KeyboardInterrupt: after the jobs have been cancelled; finished runs stay finished.
    """
    try:
        import submitit
    except ImportError:
        raise InputError(
            "hydra/launcher=submitit_slurm needs submitit; install it with: pip install "
            "'vaeq[slurm]'."
        ) from None
    missing = [word for word in ("sbatch", "squeue", "scancel") if shutil.which(word) is None]
    if missing:
        raise InputError(
            f"hydra/launcher=submitit_slurm needs {missing[0]}, which is not in PATH; start it on "
            "a machine that submits to Slurm."
        )
    require_folders(configs)
    threads = max(config.threads or 1 for config in configs)
    wanted = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.timeout_min,
        "cpus_per_task": settings.cpus_per_task or threads,
        "gpus_per_node": settings.gpus_per_node,
        "gres": settings.gres,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "nodelist": settings.nodelist,
        "comment": settings.comment,
        "job_name": settings.name,
        "array_parallelism": settings.array_parallelism or n_jobs or 256,
        "signal_delay_s": settings.signal_delay_s,
        "setup": settings.setup,
        "additional_parameters": settings.additional_parameters,
    }
    memory = settings.mem_gb
    if memory is not None:
        wanted["mem"] = f"{max(1, round(memory * 1024))}MB"
    logs = Path(configs[0].outputs).absolute() / _LOGS
    executor = submitit.SlurmExecutor(logs, max_num_timeout=settings.max_num_timeout)
    executor.update_parameters(**{name: v for name, v in wanted.items() if v is not None})
    jobs = _SlurmJobs([], logs)
    runs = watched(configs)
    folder = str(Path.cwd())
    calls = [SlurmRun(asdict(config), folder) for config in configs]
    try:
        for start in range(0, len(calls), _ARRAY):
            # submitit repeats the words of sbatch there, which are in its error as well.
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():
                array = [executor.submit(call) for call in calls[start : start + _ARRAY]]
            jobs.ids += [str(job.job_id) for job in array]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        jobs.cancel()
        raise VaeqError(f"Slurm refused the jobs: {_reason(error)}") from None
    console.print(
        f"Slurm array {jobs.ids[0].split('_')[0]}, {len(jobs.ids)} jobs; their output is in {logs}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    gather(runs, jobs, result, console, settings.poll_seconds)


def _reason(error: Exception) -> str:
    """The words of sbatch in the many lines that submitit wraps them in."""
    lines = [line.strip() for line in str(error).splitlines() if "sbatch: " in line]
    return one_line(" ".join(line[line.index("sbatch: ") :] for line in lines) or str(error))


class _SlurmJobs:
    """Jobs by their ids, ``12_0`` in an array and ``12`` alone, as ``squeue`` sees them."""

    def __init__(self, ids: list[str], logs: Path) -> None:
        self.ids = ids
        self._logs = logs
        self._known: dict[str, str] = {}  # the last state seen

    def over(self, seconds: float) -> dict[int, str]:
        time.sleep(seconds)
        states = self._states()
        if states is None:  # the controller does not answer: nothing is known to be over
            return {}
        result = {}
        for i, name in enumerate(self.ids):
            state = states.get(name, "")
            if not state or state in _OVER:
                word = state or self._known.get(name, "")
                said = f"Slurm says {word}" if word in _OVER else "Slurm no longer knows it"
                result[i] = f"{said}; see {self._logs / f'{name}_0_log.err'}"
            if state:
                self._known[name] = state
        return result

    def _states(self) -> dict[str, str] | None:
        arrays = ",".join(sorted({name.split("_")[0] for name in self.ids}))
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T"]
        try:
            asked = subprocess.run(
                [*command, f"--jobs={arrays}"], capture_output=True, text=True, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        # Some minutes after its end Slurm forgets a job, and says so in this way.
        if asked.returncode and "Invalid job id" not in asked.stderr:
            return None
        return dict(_rows(asked.stdout))

    def cancel(self) -> None:
        arrays = sorted({name.split("_")[0] for name in self.ids})
        if arrays:
            subprocess.run(["scancel", "--quiet", *arrays], capture_output=True, timeout=60)


def _rows(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, bar, state = line.strip().partition("|")
        if bar:
            yield name, state
