"""A run in somebody's dashboard: ``logger=tensorboard``, ``trackio`` or ``wandb_offline``.

The run's own files stay the truth; a tracker shows them elsewhere and may fail without harm.
Nothing leaves the machine: trackio writes SQLite, wandb a folder that ``wandb sync`` can send.

A log holds the epochs of ``history.csv``, each once: a run that is taken up again writes its log
anew from the first epoch on. Names are those of the run's files, in four groups: by epoch
``epoch/test_elbo``, at the end ``estimate/marginal_kl`` with ``std_error/marginal_kl``, and the
report's figures of this one run, ``figure/latent_plane``.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import io
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vaeq.config import RunConfig, config_hash, run_name
from vaeq.errors import InputError
from vaeq.runs.record import require_inside, run_directory

Picture = npt.NDArray[np.uint8]  # (height, width, 3)
# Beside the experiments: what trackers keep for all runs together.
FOLDER = ".trackers"
# The package of each logger; its extra in pyproject.toml has the same name.
PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb_offline": "wandb"}


class Tracker(ABC):
    """The log of one run, open from its first epoch to its last figure."""

    @abstractmethod
    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        """The numbers of one epoch, by name; written at once, for a run may be killed."""

    @abstractmethod
    def estimates(self, values: Mapping[str, float], table: str, epoch: int) -> None:
        """What was measured after the last epoch, by name, and the same as a Markdown table."""

    @abstractmethod
    def picture(self, name: str, picture: Picture, epoch: int) -> None:
        """A figure."""

    @abstractmethod
    def close(self) -> None:
        """Write what is not written yet."""


def require(config: RunConfig) -> None:
    """Prove that the package of the logger is there, before anything starts.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    if config.logger == "none":
        return
    logger, package = config.logger, PACKAGES[config.logger]
    folder = Path(config.outputs).absolute() / FOLDER
    require_inside(folder, Path(config.outputs))
    _keep_at_home(package, folder)
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        raise InputError(f"logger={logger} needs pip install 'vaeq[{package}]'.") from None
    except Exception as error:
        raise InputError(
            f"logger={logger} cannot be used: import {package} fails ({error}); "
            f"try pip install 'vaeq[{package}]'."
        ) from None


class Log:
    """What a run tells its tracker; a tracker that raises is dropped with a word, not the run.

    Args:
        config: of the run; with ``logger=none`` nothing is written.
        history: the epochs that are done already, one row each.
        warn: receives one sentence if the tracker fails.
    """

    def __init__(
        self,
        config: RunConfig,
        history: Iterable[Mapping[str, float]],
        warn: Callable[[str], None],
    ) -> None:
        self._config = config
        self._warn = warn
        self._tracker: Tracker | None = None
        if config.logger != "none":
            with self._guarded():
                self._tracker = _TRACKERS[config.logger](config)
        for row in history:
            self.epoch(row)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            tracker, self._tracker = self._tracker, None
            if tracker is not None:
                with contextlib.suppress(Exception):
                    tracker.close()
            words = " ".join(str(error).split())
            self._warn(
                f"logger={self._config.logger} failed and is left out, the run goes on: "
                f"{type(error).__name__}: {words}"
            )

    def epoch(self, row: Mapping[str, float]) -> None:
        """The scalars of an epoch, a row of ``history.csv``."""
        if self._tracker is not None:
            with self._guarded():
                values = {f"epoch/{name}": v for name, v in row.items() if name != "epoch"}
                self._tracker.epoch(values, int(row["epoch"]))

    def finish(self, estimates: Mapping[str, Mapping[str, Any]], epoch: int) -> None:
        """The estimates of a finished run, whose files are written, and its figures."""
        if self._tracker is None:
            return
        with self._guarded():
            values: dict[str, float] = {}
            for name, entry in estimates.items():
                for part, number in (
                    ("estimate", entry["value"]),
                    ("std_error", entry["std_error"]),
                ):
                    if number is not None:
                        values[f"{part}/{name}"] = number
            self._tracker.estimates(values, _markdown(estimates), epoch)
            for name, picture in figures(run_directory(self._config)):
                self._tracker.picture(f"figure/{name}", picture, epoch)
        self.close()

    def close(self) -> None:
        """Write what is not written yet; a second call does nothing."""
        if self._tracker is not None:
            with self._guarded():
                self._tracker.close()
            self._tracker = None


def figures(directory: Path) -> Iterator[tuple[str, Picture]]:
    """The figures of the report that a single run allows."""
    from PIL import Image

    from vaeq.report.figures import draw, files
    from vaeq.report.runs import read_runs
    from vaeq.report.table import build_table

    drawings, _ = draw(build_table(read_runs([directory])[0]))
    for drawing in drawings:
        png = files(drawing, kinds=("png",))["png"]
        yield drawing.name, np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _markdown(estimates: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the estimates with their units, and why some are missing."""
    lines = ["| name | value | s.e. | unit |", "|---|---|---|---|"]
    for name, entry in estimates.items():
        value, error, unit = entry["value"], entry["std_error"], entry["unit"]
        shown = f"not available: {entry.get('reason')}" if value is None else f"{value:.6g}"
        lines.append(f"| {name} | {shown} | {'' if error is None else f'{error:.2g}'} | {unit} |")
    return "\n".join(lines)


def _keep_at_home(package: str, folder: Path) -> None:
    """No word over a network, no file in the home directory; all of it is read at the import."""
    if package == "trackio":
        for name in ("SPACE_ID", "SERVER_URL", "BUCKET_ID", "DATASET_ID", "WEBHOOK_URL"):
            os.environ.pop(f"TRACKIO_{name}", None)
        # Else trackio asks its hub for the name of the user.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    if package == "wandb":
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb"))


def _emptied(folder: Path, config: RunConfig) -> Path:
    """The folder of a log that begins anew; a link out of ``outputs`` is refused."""
    require_inside(folder, Path(config.outputs))
    shutil.rmtree(folder, ignore_errors=True)
    return folder


class TensorBoard(Tracker):
    """Event files in the run's folder: ``tensorboard --logdir outputs``."""

    def __init__(self, config: RunConfig) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = _emptied(run_directory(config) / "tensorboard", config)
        self._writer = SummaryWriter(str(folder))
        settings = "\n".join(f"    {name}: {value}" for name, value in asdict(config).items())
        self._writer.add_text("config", settings)

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def estimates(self, values: Mapping[str, float], table: str, epoch: int) -> None:
        self._writer.add_text("estimates", table, epoch)
        self.epoch(values, epoch)

    def picture(self, name: str, picture: Picture, epoch: int) -> None:
        self._writer.add_image(name, picture, epoch, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Trackio(Tracker):
    """SQLite, one project an experiment: in TRACKIO_DIR, else in ``outputs/.trackers/trackio``."""

    def __init__(self, config: RunConfig) -> None:
        import trackio

        self._trackio = trackio
        name = run_name(config)
        with contextlib.suppress(ValueError):  # there is no such project yet
            for earlier in trackio.Api().runs(config.experiment):
                if earlier.name == name:
                    earlier.delete()
        # In a context of its own: trackio ends the run before it, and an ensemble has many at once.
        with _silent():
            self._run = contextvars.copy_context().run(
                trackio.init,
                config.experiment,
                name=name,
                config=asdict(config),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        self._run.log(dict(values), step=epoch)

    def estimates(self, values: Mapping[str, float], table: str, epoch: int) -> None:
        self._run.log({**values, "estimates": self._trackio.Markdown(table)}, step=epoch)

    def picture(self, name: str, picture: Picture, epoch: int) -> None:
        self._run.log({name: self._trackio.Image(picture)}, step=epoch)

    def close(self) -> None:
        with _silent():
            self._run.finish()


class WandbOffline(Tracker):
    """A folder in the run's own that nothing sends anywhere until ``wandb sync`` is told to."""

    def __init__(self, config: RunConfig) -> None:
        import wandb

        self._wandb = wandb
        directory = _emptied(run_directory(config) / "wandb", config).parent
        self._run = wandb.init(
            project=config.experiment,
            name=run_name(config),
            # The same at every sync: a run that went on is one run.
            id=config_hash(config)[:16],
            dir=str(directory),
            config=asdict(config),
            settings=wandb.Settings(
                mode="offline",
                reinit="create_new",
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                # A run that is killed loses seconds.
                x_transaction_log_flush_interval=1.0,
            ),
        )

    def epoch(self, values: Mapping[str, float], epoch: int) -> None:
        # Without commit an epoch waits for the next one before it is written.
        self._run.log(dict(values), step=epoch, commit=True)

    def estimates(self, values: Mapping[str, float], table: str, epoch: int) -> None:
        self._run.summary.update({**values, "estimates": table})

    def picture(self, name: str, picture: Picture, epoch: int) -> None:
        # All in the step after the last epoch, which is closed.
        self._run.log({name: self._wandb.Image(picture)}, commit=False)

    def close(self) -> None:
        self._run.finish()


def _silent() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())


_TRACKERS: dict[str, Callable[[RunConfig], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb_offline": WandbOffline,
}
