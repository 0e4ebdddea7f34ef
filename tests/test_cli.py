"""The program as a user meets it: help, errors of one line, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY, Run
from vaeq.compose import check_overrides
from vaeq.errors import InputError


def refused(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """The one line of a refusal, having checked that it is one and that nothing was written."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("vaeq: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert os.listdir(folder) == []
    return done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["latent_dim=-3"], "latent_dim must be an integer between 1 and 4096, got -3."),
        (["latent_dim=0"], "latent_dim must be an integer between 1 and 4096, got 0."),
        (["latent_dim=abc"], "latent_dim must be an integer between 1 and 4096, got abc."),
        (["latent_dim=2.5"], "latent_dim must be an integer between 1 and 4096, got 2.5."),
        (["laten_dim=8"], "laten_dim is not a setting of vaeq train; did you mean latent_dim?"),
        (["+laten_dim=8"], "laten_dim is not a setting of vaeq train; did you mean latent_dim?"),
        (["epochs=0"], "epochs must be an integer between 1 and 1000000, got 0."),
        (["learning_rate=nan"], "learning_rate must be a number > 0 and <= 10, got nan."),
        (["latent_dim=2,8"], "use vaeq sweep latent_dim=2,8."),
        (["experiment=fnding"], "experiment must be one of burda_vae, cross_validated,"),
        (["data.binarize=yes"], "data.binarize must be one of none, dynamic, static, got"),
    ],
)
def test_train_refuses_bad_values_in_one_line(
    vaeq: Run, tmp_path: Path, words: list[str], sentence: str
) -> None:
    assert sentence in refused(vaeq("train", *words), tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["latent_dim=2,-3"], "latent_dim must be an integer between 1 and 4096, got -3."),
        (["latent_dim=2,abc"], "latent_dim must be an integer between 1 and 4096, got abc."),
        (["laten_dim=2,8"], "did you mean latent_dim?"),
        (["n_jobs=0"], "n_jobs must be an integer between 1 and 1024, or null, got 0."),
        (["hydra.sweeper.params="], "hydra.sweeper.params must hold settings with their values"),
    ],
)
def test_a_sweep_with_one_illegal_value_starts_no_job(
    vaeq: Run, tmp_path: Path, words: list[str], sentence: str
) -> None:
    assert sentence in refused(vaeq("sweep", *words), tmp_path)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("+latent_dim=8", "latent_dim is a setting already; drop the '\\+'"),
        ("~beta", "beta cannot be removed"),
        ("foo", "'foo' is not an override; write key=value"),
        ("x=(", "is not an override"),
        ("measure=full", r"did you mean measure\.panel\?"),
        ("n_jobs=2", "n_jobs is not a setting of vaeq train"),
        ("qqqqq=2", r"qqqqq is not a setting of vaeq train; vaeq train --help"),
        ("beta=interval(0,1)", "is no list of values"),
    ],
)
def test_overrides_are_checked_before_anything_is_composed(argument: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_overrides("train", [argument])


def test_legal_overrides_pass() -> None:
    check_overrides(
        "sweep",
        ["latent_dim=2,8", "++beta=2", "data.n_train=5", "data=kmnist", "hydra.verbose=true"],
    )


def test_a_device_that_is_not_there(vaeq: Run, tmp_path: Path) -> None:
    for command in ("train", "sweep"):
        done = vaeq(command, "device=cuda:63")
        assert "device=cuda:63 is not available" in refused(done, tmp_path)


def test_an_unreadable_data_file(vaeq: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08 truncated")
    for command in ("train", "sweep"):
        done = vaeq(command, "experiment=smoke", f"data.root={data}")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "train-images-idx3-ubyte.gz cannot be read" in done.stderr
        assert os.listdir(tmp_path) == ["data"]


def test_an_outputs_folder_that_cannot_be_written(vaeq: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for command in ("train", "sweep"):
        done = vaeq(command, "experiment=smoke", "outputs=file/below")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "outputs=file/below/smoke cannot be written" in done.stderr
        assert "choose another place with outputs=..." in done.stderr
        assert os.listdir(tmp_path) == ["file"]


def test_a_misspelt_command_and_the_overview(vaeq: Run, tmp_path: Path) -> None:
    assert "did you mean vaeq sweep?" in refused(vaeq("swep"), tmp_path)
    overview = vaeq(check=True).stdout
    assert overview == vaeq("--help", check=True).stdout
    for command in ("train", "sweep", "report", "measure"):
        assert f"vaeq {command}" in overview


def test_help_lists_every_setting_with_its_range(vaeq: Run) -> None:
    words = vaeq("sweep", "--help", check=True, COLUMNS="200").stdout
    for part in ("latent_dim=2 ", "beta=1.0", "n_jobs=null", "data.binarize=none", "finding"):
        assert part in words
    assert "an integer between 1 and 4096" in words
    assert "\x1b" not in words


def test_cfg_job_prints_the_composed_settings(vaeq: Run, tmp_path: Path) -> None:
    words = vaeq("sweep", "experiment=finding", "--cfg", "job", check=True).stdout
    assert "panel: full\n" in words
    assert "experiment: finding\n" in words
    words = vaeq("train", "experiment=cross_validated", "--cfg", "job", check=True).stdout
    for line in ("activation: softplus", "batch_size: 100", "epochs: 75", "encoder_width: 500"):
        assert f"{line}\n" in words
    assert os.listdir(tmp_path) == []


def test_completion_knows_commands_settings_and_presets(vaeq: Run) -> None:
    def complete(line: str) -> list[str]:
        done = vaeq("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)), check=True)
        return done.stdout.split()

    assert complete("vaeq ") == ["train", "sweep", "report", "measure", "sample"]
    assert complete("vaeq sw") == ["sweep"]
    assert complete("vaeq train laten") == ["latent_dim="]
    assert "experiment=finding" in complete("vaeq sweep experiment=")
    assert "complete -o nospace" in vaeq("-sc", "install=bash", check=True).stdout


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["report", "--cfg", "job"]])
def test_light_commands_do_not_import_torch(tmp_path: Path, words: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        "from vaeq.cli import main\n"
        f"sys.argv = ['vaeq', *{words!r}]\n"
        "main()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_train_fits_measures_and_is_skipped_the_second_time(vaeq: Run, tmp_path: Path) -> None:
    first = vaeq("train", *TINY, "latent_dim=3", check=True)
    assert "epoch 2/2  ELBO -" in first.stdout
    assert "images/s" in first.stdout
    assert "\x1b" not in first.stdout
    (directory,) = (tmp_path / "outputs" / "smoke").iterdir()
    assert directory.name.startswith("latent_dim=3,encoder_depth=1,encoder_width=16,seed=0-")
    record = json.loads((directory / "record.json").read_text())
    assert record["state"] == "complete"
    assert record["config"]["latent_dim"] == 3
    before = {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}
    second = vaeq("train", *TINY, "latent_dim=3", check=True)
    assert "skipped: finished before" in second.stdout
    assert before == {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}


def test_a_diverging_run_ends_with_its_epoch_and_status_1(vaeq: Run, tmp_path: Path) -> None:
    done = vaeq("train", *TINY, "learning_rate=10", "beta=1e6")
    assert done.returncode == 1
    assert "the training loss is not finite in epoch 1" in done.stderr
    assert "Traceback" not in done.stderr
    (directory,) = (tmp_path / "outputs" / "smoke").iterdir()
    record = json.loads((directory / "record.json").read_text())
    assert record["state"] == "failed"
    assert record["failure"]["type"] == "TrainingDiverged"
    assert json.loads((directory / "status.json").read_text())["state"] == "failed"
