"""The command line: sub-commands that are Hydra applications, and errors of one line."""

from __future__ import annotations

import codecs
import difflib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vaeq import __version__
from vaeq.errors import InputError, VaeqError, one_line
from vaeq.interrupts import handle_between
from vaeq.loading import loading

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = {
    "train": "fit one VAE and measure it",
    "sweep": "fit every combination of the values given; finished runs are skipped",
    "report": "verdict, tables, figures and report.html of the runs in some folders",
    "measure": "measure the codes of any VAE, trained anywhere",
    "sample": "pictures and arrays from a trained decoder",
}
EXAMPLES = {
    "train": (
        "vaeq train",
        "vaeq train latent_dim=8 encoder_depth=3 seed=1",
        "vaeq train model=ppca latent_dim=8",
        "vaeq train logger=tensorboard",
    ),
    "sweep": (
        "vaeq sweep latent_dim=2,8,32",
        "vaeq sweep experiment=finding",
        "vaeq sweep experiment=width n_jobs=1 epochs=5",
        "vaeq sweep experiment=finding hydra/launcher=ensemble",
        "vaeq sweep experiment=finding hydra/launcher=submitit_slurm hydra.launcher.partition=cpu",
        "vaeq sweep experiment=finding hydra/launcher=ray hydra.launcher.address=auto",
        "vaeq sweep hydra/sweeper=optuna objective=marginal_kl latent_dim='range(2,33)' "
        "learning_rate='tag(log,interval(1e-4,1e-2))' seed=0,1",
    ),
    "measure": (
        "vaeq measure codes=codes.npz output=codes.json",
        "vaeq measure codes=FOLDER shards=16 panel=decomposition",
    ),
    "sample": (
        "vaeq sample run=outputs/default/latent_dim=2,... source=aggregated n=400",
        "vaeq sample run=outputs/default/latent_dim=2,... picture=plane",
    ),
    "report": (
        "vaeq report",
        "vaeq report runs='outputs/*' output=/tmp/all",
        "vaeq report runs='[outputs/finding,outputs/width]' metrics=kl_per_image,marginal_kl",
        "vaeq report where='latent_dim>=8 and seed<3' baseline=latent_dim=8,encoder_depth=1",
    ),
}
_RUN_FILES = (
    "outputs/<experiment>/<axes>-<hash>/, a folder a run: config.yaml, status.json, history.csv, "
    "checkpoint.safetensors, samples.safetensors, pictures.safetensors and, last, record.json; "
    "with logger=tensorboard or wandb_offline a folder tensorboard or wandb",
    "outputs/.cache, the digit classifier; outputs/.trackers, with logger=trackio, wandb_offline",
)
WRITES = {
    "train": _RUN_FILES,
    "sweep": (
        *_RUN_FILES,
        "outputs/<experiment>/study.journal and study.csv, with hydra/sweeper=optuna",
    ),
    "report": (
        "report.html, table.csv, table.md, table.tex, verdict.md, with baseline=... "
        "differences.md, and each figure as .png and .pdf, in output",
    ),
    "measure": ("output, with every estimate; without it nothing",),
    "sample": ("samples-<source>, plane, interpolations or reconstructions, .png and .npz",),
}
BAD_INPUT = 2
FAILED = 1
_RUN_FAILED = "1 a run failed, the others are finished; "
_SHELL_COMPLETION = ("-sc", "--shell-completion")


def main() -> None:
    """Entry point of ``vaeq``; exits 0, 1 (a run failed), 2 (bad input), 130 or 143 (stopped)."""
    _print_in_any_encoding()
    # Read once, when torch loads OpenMP. A thread that spins for a millisecond at every barrier is
    # what makes a step ten times slower where another program has its core; one that sleeps at once
    # doubles the time of a step where none has. Some ten microseconds cost neither much.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        handle_between(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may ignore it
            handle_between(signal.SIGINT, signal.default_int_handler)
        _dispatch(sys.argv[1:])
        sys.stdout.flush()  # what a full disk refuses is said here, not by Python at its exit
    except InputError as error:
        _exit(str(error), BAD_INPUT)
    except VaeqError as error:
        _exit(str(error), FAILED)
    except KeyboardInterrupt:
        _exit("stopped; finished runs and epochs are kept, the same command goes on.", 130)
    except _Terminated:
        _exit("terminated; finished runs and epochs are kept, the same command goes on.", 143)
    except BrokenPipeError:
        # The reader of our output has gone (vaeq ... | head).
        _drop_output()
        sys.exit(FAILED)
    except OSError as error:
        # Output into a file on a full disk, say.
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        _exit(f"{where}{error.strerror or error}.", FAILED)


class _Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that workers are stopped and temporary files removed."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _drop_output() -> None:
    """What cannot be written is not tried again: Python would complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_in_any_encoding() -> None:
    """Let no character end the program where the terminal's encoding has none for it."""
    codecs.register_error("vaeq.stand_in", _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vaeq.stand_in")


def _stand_in(error: UnicodeError) -> tuple[bytes, int]:
    """±, say, as +/-; the bytes of a file name as they were given; anything else as its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    from vaeq.report.words import ASCII

    shown = b""
    for character in error.object[error.start : error.end]:
        if "\udc80" <= character <= "\udcff":
            shown += character.encode("ascii", "surrogateescape")
        else:
            shown += character.translate(ASCII).encode("ascii", "backslashreplace")
    return shown, error.end


def _exit(sentence: str, status: int) -> None:
    # A name from a file must not act on the terminal either.
    print(f"vaeq: {one_line(sentence, 5000)}", file=sys.stderr)  # noqa: T201
    sys.exit(status)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        print(f"vaeq {__version__}")  # noqa: T201
    elif not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_overview()
    elif arguments[0] in _SHELL_COMPLETION:
        _complete(arguments)
    elif arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean vaeq {close[0]}?" if close else "."
        raise InputError(
            f"{arguments[0]!r} is not a command (they are {', '.join(COMMANDS)}){hint}"
        )
    elif any(word in ("-h", "--help") for word in arguments[1:]):
        _print_help(arguments[0])
    else:
        _run_hydra(arguments[0], arguments[1:])


def _run_hydra(command: str, arguments: list[str]) -> None:
    """Compose the config of a command with Hydra and run its task."""
    with loading():
        import hydra
        from hydra._internal.utils import get_args_parser
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from vaeq import compose

    arguments = [compose.literal(command, argument) for argument in arguments]
    overrides = get_args_parser().parse_args(arguments).overrides
    if not any(word in _SHELL_COMPLETION for word in arguments):
        compose.check_overrides(command, overrides)
    compose.register_schemas()
    _register_plugins()
    sys.argv = [sys.argv[0], *arguments]
    # Hydra prints errors over several lines; with this set it raises them, and main() prints one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    errors: list[Exception] = []

    def task(cfg: DictConfig) -> None:
        # Hydra announces a failed job in a line of its own before it raises: hand the error
        # round it.
        try:
            TASKS[command](cfg)
        except Exception as error:
            errors.append(error)

    application = hydra.main(
        version_base="1.3", config_path="pkg://vaeq.configs", config_name=command
    )(_sweep_job if command == "sweep" else task)
    try:
        application()
        if errors:
            raise errors[0]
    except (HydraException, OmegaConfBaseException) as error:
        sentence = compose.explain(error, compose.SCHEMAS[command], overrides)
        raise InputError(sentence) from error


def _register_plugins() -> None:
    from hydra.core.plugins import Plugins

    # Hydra's scan executes the modules of its own plugins again: a class derived from one of them
    # must be made after it. In a development install the scan does not find ours by itself.
    plugins = Plugins.instance()
    from hydra_plugins.vaeq import (
        EnsembleLauncher,
        GridSweeper,
        OptunaSweeper,
        PoolLauncher,
        RayLauncher,
        SlurmLauncher,
    )

    for plugin in (
        GridSweeper,
        OptunaSweeper,
        PoolLauncher,
        EnsembleLauncher,
        SlurmLauncher,
        RayLauncher,
    ):
        plugins.register(plugin)


def _train(cfg: DictConfig) -> None:
    from rich.console import Console

    from vaeq.compose import typed
    from vaeq.config import RunConfig, identified, run_name
    from vaeq.data.mnist import read_ahead
    from vaeq.launch.pool import available_cores
    from vaeq.launch.progress import Event, display
    from vaeq.runs.record import complete_record, run_directory

    (config,) = identified([typed(cfg, RunConfig)])
    console = Console()
    directory = run_directory(config)
    name = run_name(config)
    with display(console, [name]) as screen:
        if complete_record(directory, config) is not None:
            screen.update(Event("skipped", name, message=f"finished before, in {directory}"))
            return
        if config.data.name == "mnist":
            read_ahead(config.data.root)
        with loading():
            from vaeq.experiment import run

        try:
            run(config, screen.update, config.threads or available_cores())
        except VaeqError as error:
            if os.path.isdir(directory):  # Path.exists() raises for a name that is too long
                screen.update(Event("failed", name, message=f"see {directory}"))
            raise error
    console.print(f"results in {directory}", markup=False, highlight=False, soft_wrap=True)


def _sweep_job(cfg: DictConfig) -> None:
    """One job of a sweep under a launcher other than vaeq's own."""
    from vaeq.compose import typed
    from vaeq.config import SweepConfig
    from vaeq.experiment import run
    from vaeq.launch.progress import Event

    def notify(event: Event) -> None:
        if event.kind == "note":
            print(f"{event.run}: {event.message}", file=sys.stderr)  # noqa: T201

    config = typed(cfg, SweepConfig).run_config()
    run(config, notify, config.threads or 1)


def _report(cfg: DictConfig) -> None:
    from rich.console import Console

    from vaeq.compose import typed
    from vaeq.config import ReportConfig

    with loading():
        from vaeq.report import expand, newest_experiment, write_report

    config = typed(cfg, ReportConfig)

    def listed(value: str | list[str] | None) -> list[str]:
        return [] if value is None else [value] if isinstance(value, str) else value

    runs = expand(listed(config.runs)) or [newest_experiment(Path("outputs"))]
    several = Path(os.path.commonpath([path.absolute() for path in runs])) / "report"
    output = config.output or (runs[0] if len(runs) == 1 else several)
    write_report(
        runs,
        Path(output),
        Console(),
        where=config.where,
        metrics=listed(config.metrics),
        baseline=config.baseline,
    )


def _measure(cfg: DictConfig) -> None:
    import warnings

    from vaeq.compose import typed
    from vaeq.config import CodesConfig
    from vaeq.launch.pool import available_cores
    from vaeq.posterior.sources import find_arrays

    config = typed(cfg, CodesConfig)
    assert config.codes is not None
    find_arrays(config.codes)  # what is not there is said at once
    with loading():
        import torch

        from vaeq.measurement import measure_file
        from vaeq.posterior.codes import CodesWarning

    torch.set_num_threads(config.threads or available_cores())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CodesWarning)
        found = measure_file(
            config.codes,
            config.output,
            n_samples=config.n_samples,
            seed=config.seed,
            panel=config.panel,
            flow=config.flow,
            shards=config.shards,
        )
    for warning in caught:
        print(f"vaeq: warning: {warning.message}", file=sys.stderr)  # noqa: T201
    print(found)  # noqa: T201
    if config.output is not None:
        print(f"written to {config.output}")  # noqa: T201


def _sample(cfg: DictConfig) -> None:
    from vaeq.compose import typed
    from vaeq.config import SampleConfig

    config = typed(cfg, SampleConfig)
    with loading():
        from vaeq.generation.sample import sample

    for path in sample(config):
        print(f"written to {path}")  # noqa: T201


TASKS: dict[str, Callable[[Any], None]] = {
    "train": _train,
    "report": _report,
    "measure": _measure,
    "sample": _sample,
}


def _complete(arguments: list[str]) -> None:
    """Shell completion: the commands first, then Hydra's completion of the command's own words."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if any(word.startswith("query=") for word in arguments):
        typed_command = words[1] if len(words) > 1 else ""
        if typed_command not in COMMANDS or line.endswith(typed_command):
            print(" ".join(name for name in COMMANDS if name.startswith(typed_command)))  # noqa: T201
            return
        rest = line.split(typed_command, 1)[1]
        os.environ["COMP_LINE"] = words[0] + rest
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
        _run_hydra(typed_command, arguments)
    else:
        _run_hydra("train", arguments)


def _print_overview() -> None:
    lines = ["vaeq: how well does a VAE's aggregated posterior match its prior N(0, I)?", ""]
    lines += [f"  vaeq {name:<8} {words}" for name, words in COMMANDS.items()]
    lines += [
        "",
        "vaeq COMMAND --help lists the settings of a command; they are written key=value.",
        'Shell completion: eval "$(vaeq -sc install=bash)" (or fish, zsh).',
        "vaeq --version prints the version.",
    ]
    print("\n".join(lines))  # noqa: T201


def yaml_words(value: object) -> str:
    """A default as one would type it: null, true, 0.001."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _print_help(command: str) -> None:
    from importlib import resources

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vaeq.compose import SCHEMAS
    from vaeq.config import keys_of

    console = Console()
    console.print(f"vaeq {command}: {COMMANDS[command]}\n", highlight=False)
    for example in EXAMPLES[command]:
        console.print(f"  {example}", highlight=False, markup=False, soft_wrap=True)
    # Two columns: the override to type, and what it means.
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, (spec, type_name, default) in keys_of(SCHEMAS[command]).items():
        shown = yaml_words(default)
        unit = f" [{spec.unit}]" if spec.unit else ""
        table.add_row(
            f"  {name}={shown}", escape(f"{spec.help}{unit}; {spec.range_words(type_name)}")
        )
    console.print("\nSettings, with their defaults:", highlight=False)
    console.print(table, highlight=False)
    if command in ("train", "sweep"):
        groups = ("experiment", "data", "hydra/launcher", "hydra/sweeper")
        for group in groups if command == "sweep" else groups[:2]:
            files = resources.files("vaeq.configs").joinpath(group).iterdir()
            names = sorted(file.name[:-5] for file in files if file.name.endswith(".yaml"))
            console.print(f"\n{group}= {', '.join(names)}", highlight=False, markup=False)
    console.print("\nWrites:", highlight=False)
    for files_written in WRITES[command]:
        console.print(f"  {files_written}", highlight=False, markup=False)
    failed = _RUN_FAILED if command in ("train", "sweep") else ""
    console.print(
        f"\nExit status: 0 done; {failed}2 bad input, one line says which, and nothing was "
        "started; 130 or 143 stopped by Ctrl-C or SIGTERM.",
        highlight=False,
    )
    console.print(
        "\nHydra's own: --cfg job prints the composed settings, --info, --config-dir DIR adds a "
        "folder of your own presets, --hydra-help lists the rest.",
        highlight=False,
        markup=False,
    )
