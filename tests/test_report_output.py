"""What a report prints and writes: readable at any width, literal, atomic, without torch."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file

from tests.report_fixtures import (
    config_of,
    default_sweep,
    full_sweep,
    list_files,
    write_json,
    write_run,
    write_samples,
    write_status,
)
from vaeq.config import SCHEMA_VERSION
from vaeq.errors import InputError
from vaeq.report import Report, write_report
from vaeq.report.figures import DRAWINGS
from vaeq.report.figures.codes import latent_plane
from vaeq.report.figures.drawing import FigureError, svg
from vaeq.report.runs import read_runs
from vaeq.report.table import Table, build_table
from vaeq.report.terminal import print_report
from vaeq.report.verdict import judge

PLANE, MARGINALS, DIVERGENCE = "latent_plane", "marginals", "divergence_by_latent_dim"
TEXTS = ["report.html", "table.csv", "table.md", "table.tex", "verdict.md"]


def report(folder: Path, width: int = 100, output: Path | None = None) -> tuple[str, Report]:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    result = write_report([folder], output or folder / "report", console)
    return stream.getvalue(), result


def printed(folder: Path, console: Console) -> Table:
    """The report on a terminal alone; what it writes is tested once, not at every width."""
    complete, excluded = read_runs([folder])
    table = build_table(complete)
    print_report(console, table, judge(complete), excluded)
    return table


def text_at(folder: Path, width: int = 100) -> tuple[str, Table]:
    stream = io.StringIO()
    table = printed(folder, Console(file=stream, width=width))
    return stream.getvalue(), table


@pytest.mark.parametrize("width", [40, 80, 100, 160, 300])
@pytest.mark.parametrize("seeds", [1, 2])
def test_every_number_is_readable_at_every_width(tmp_path: Path, width: int, seeds: int) -> None:
    for seed in range(seeds):
        for latent_dim in (2, 8, 32):
            write_run(tmp_path, latent_dim, seed)
    text, table = text_at(tmp_path, width)
    assert max(map(len, text.splitlines())) <= max(width, 60)
    assert "…" not in text
    for row in table.rows:
        for metric in table.telling():
            mean, _, mc_error = table.parts(row, metric)
            assert mean in text
            assert mc_error in text
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width
        for heading in ("marginal_kl", "dimension_kl_mean", "kl_per_image"):
            assert heading in text
        assert "closer" in text
        assert "saturated, further" in text


def test_layouts_wide_turned_and_folded(tmp_path: Path) -> None:
    default_sweep(tmp_path)
    wide, turned, folded = (text_at(tmp_path, width)[0] for width in (400, 110, 80))
    assert "dimension_kl_mean_active [nats/dimension]" in turned
    assert turned.count("latent_dim  ") < folded.count("latent_dim  ")
    first = wide.splitlines().index(next(line for line in wide.splitlines() if "─" in line))
    assert wide.splitlines()[first + 1].split()[0] == "2"


def test_no_escape_codes_when_not_a_terminal(tmp_path: Path) -> None:
    text, _ = text_at(default_sweep(tmp_path))
    assert "\x1b" not in text


def test_colours_on_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system="standard")
    printed(default_sweep(tmp_path), console)
    assert "\x1b[32mcloser" in stream.getvalue()


def test_names_from_files_are_printed_literally(tmp_path: Path) -> None:
    names = ("[red]markup[bold]", ":smile:", "a\x1b[31mb")
    for name in names:
        (tmp_path / name).mkdir()
        write_status(tmp_path / name, "running", 1)
    write_run(tmp_path, 2, activation="[bold]$x^2$")
    write_run(tmp_path, 8, activation="[bold]$x^2$")
    text, _ = text_at(tmp_path, 160)
    assert "[red]markup[bold] (unfinished)" in text
    assert ":smile: (unfinished)" in text
    assert "a\\x1b[31mb (unfinished)" in text
    assert "activation=[bold]$x^2$" in text


def test_a_terminal_without_utf_8(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    default_sweep(tmp_path)
    write_run(tmp_path, 2, seed=1)
    printed(tmp_path, Console(file=stream, width=80))
    stream.flush()
    assert b"+/-" in raw.getvalue()
    assert b"->" in raw.getvalue()


def test_counts_and_names_of_runs_that_are_left_out(tmp_path: Path) -> None:
    default_sweep(tmp_path)
    (tmp_path / "late").mkdir()
    write_status(tmp_path / "late", "running", 3)
    failure = {"type": "TrainingDiverged", "message": "the loss is not finite"}
    record = {
        "schema_version": SCHEMA_VERSION,
        "state": "failed",
        "config": config_of(4, 0),
        "config_hash": "",
    }
    write_json(tmp_path / "nan" / "record.json", record | {"failure": failure})
    write_status(tmp_path / "nan", "failed", 2)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "record.json").write_text('{"schema_version": 2,')
    text, result = report(tmp_path)
    assert text.startswith("6 runs: 3 complete, 1 failed, 1 unfinished, 1 unreadable\n")
    flat = " ".join(text.split())
    assert "late (unfinished): epoch 3 of 10" in flat
    assert "nan (failed): epoch 2 of 10, TrainingDiverged: the loss is not finite" in flat
    assert "torn (unreadable): record.json is not valid JSON" in flat
    markdown = (tmp_path / "report" / "table.md").read_text()
    assert all(f"{run.name} ({run.kind}): {run.reason}" in markdown for run in result.excluded)


def test_without_a_complete_run_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "late").mkdir()
    write_status(tmp_path / "late", "running", 3)
    text, result = report(tmp_path)
    assert "0 complete, 1 unfinished" in text
    assert result.verdict is None
    assert not (tmp_path / "report").exists()


def test_one_run_alone_is_a_report_too(tmp_path: Path) -> None:
    write_run(tmp_path, 2, samples=200)
    text, result = report(tmp_path)
    assert "did not vary in these runs" in text
    names = [path.name for path in result.files]
    assert names[: len(TEXTS)] == TEXTS
    assert {f"{PLANE}.png", f"{PLANE}.pdf", f"{MARGINALS}.png"} <= set(names)
    assert DIVERGENCE in result.left_out


def test_files_are_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    full_sweep(tmp_path / "runs", (2, 8), (1, 2), (0, 1), samples=300)
    output = tmp_path / "a" / "b"
    _, result = report(tmp_path / "runs", output=output)
    drawn = DRAWINGS.keys() - result.left_out.keys()
    assert DRAWINGS.keys() - drawn == {"divergence_by_encoder_width"}
    expected = [*TEXTS, *(f"{name}.{kind}" for name in drawn for kind in ("png", "pdf"))]
    assert sorted(path.name for path in result.files) == sorted(expected)
    assert sorted(path.name for path in output.iterdir()) == sorted(expected)
    # A second report of the same runs is the same, to the byte.
    report(tmp_path / "runs", output=tmp_path / "again")
    for name in expected:
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes(), name
    for name in drawn:
        assert (output / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(output / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 400
            # Something is drawn: a blank page has one colour.
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_a_stale_figure_does_not_stand_beside_a_new_table(tmp_path: Path) -> None:
    default_sweep(tmp_path / "runs", samples=100)
    report(tmp_path / "runs", output=tmp_path / "out")
    for path in (tmp_path / "runs").glob("*/samples.safetensors"):
        path.unlink()
    text, result = report(tmp_path / "runs", output=tmp_path / "out")
    assert not (tmp_path / "out" / f"{PLANE}.png").exists()
    assert f"No {PLANE}: there is no samples.safetensors" in " ".join(text.split())
    assert (tmp_path / "out" / f"{DIVERGENCE}.png") in result.files


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (None, "cannot be read"),
        ({"x": np.zeros((5, 2), np.float32)}, "no array z"),
        ({"z": np.zeros((5, 3), np.float32)}, "no array z"),
        ({"z": np.full((5, 2), np.nan, np.float32)}, "not finite"),
        ({"z": np.zeros((5, 2), np.float32), "label": np.zeros(4, np.uint8)}, "label"),
    ],
)
def test_unusable_samples_cost_the_figure_alone(
    tmp_path: Path, arrays: dict[str, np.ndarray] | None, reason: str
) -> None:
    path = write_run(tmp_path, 2) / "samples.safetensors"
    if arrays is None:
        path.write_bytes(b"\xff" * 20)
    else:
        save_file(arrays, path)
    list_files(path.parent)
    with pytest.raises(FigureError, match=reason):
        latent_plane(build_table(read_runs([tmp_path])[0]))


def test_the_plane_is_drawn_from_the_first_seed_that_has_samples(tmp_path: Path) -> None:
    write_run(tmp_path, 2, seed=0)
    write_samples(write_run(tmp_path, 2, seed=1), 2, 200)
    drawing = latent_plane(build_table(read_runs([tmp_path])[0]))
    assert drawing.source.endswith("seed 1")


@pytest.mark.parametrize("classes", [1, 10, 47])
def test_the_plane_takes_any_number_of_classes_and_no_labels(tmp_path: Path, classes: int) -> None:
    z = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
    label = (np.arange(300) % classes).astype(np.uint8)
    path = write_run(tmp_path, 2) / "samples.safetensors"
    save_file({"z": z, "label": label} if classes > 1 else {"z": z}, path)
    list_files(path.parent)
    drawing = latent_plane(build_table(read_runs([tmp_path])[0]))
    assert "<svg" in svg(drawing.rows[0][0], "plane")


def test_divergence_over_many_lines_and_over_width(tmp_path: Path) -> None:
    for width in (64, 256, 1024):
        for depth in range(10):
            write_run(tmp_path / "deep", 8, encoder_depth=depth, encoder_width=width)
        write_run(tmp_path / "wide", 8, encoder_width=width, data={"name": "$\\frac"})
    for folder in ("deep", "wide"):
        _, result = report(tmp_path / folder)
        assert "divergence_by_encoder_width" not in result.left_out


def test_an_output_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    default_sweep(tmp_path / "runs")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output=.*file.* cannot be written") as error:
        report(tmp_path / "runs", output=tmp_path / "file")
    assert "\n" not in str(error.value)


def test_no_runs_at_all_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no runs"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_imports_neither_torch_nor_hydra_nor_pyplot(tmp_path: Path) -> None:
    default_sweep(tmp_path, samples=50)
    code = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from vaeq.report import write_report\n"
        "light = {'matplotlib', 'scipy', 'pandas', 'safetensors'} & set(sys.modules)\n"
        "write_report([Path(sys.argv[1])], Path(sys.argv[1]) / 'out', Console(quiet=True))\n"
        "heavy = {'torch', 'hydra', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'{light} {heavy}' if light or heavy else 0)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / f"{PLANE}.png").exists()
