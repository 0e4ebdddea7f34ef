"""Reports that compare: several folders and globs, where=, metrics=, baseline=."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import Run as Program
from tests.report_fixtures import default_sweep, estimate, full_sweep, write_json, write_run
from vaeq.errors import InputError
from vaeq.report import expand, write_report
from vaeq.report.baseline import compare, difference
from vaeq.report.costs import costs_of
from vaeq.report.runs import Run, read_runs
from vaeq.report.table import Aggregate, build_table
from vaeq.report.where import filter_runs

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """latent_dim 2, 8, 32 by depth 1, 2 by seed 0, 1."""
    folder = tmp_path_factory.mktemp("runs")
    return read_runs([full_sweep(folder, (2, 8, 32), (1, 2), (0, 1), samples=0)])[0]


@pytest.mark.parametrize(
    ("condition", "n"),
    [
        ("latent_dim>=8 and seed<1", 4),
        ("latent_dim == 2 or encoder_depth == 2 and seed == 1", 6),
        ("not latent_dim in (2, 8)", 4),
        ("2 < latent_dim <= 8", 4),
        ("activation == 'relu'", 12),
        ("data.name == null or data.name != null", 12),
        ("latent_dim not in [2]", 8),
        ("marginal_kl > 3", 8),
        ("kl_per_image > marginal_kl", 12),
        ("beta == 1", 12),
        ("-1 < seed", 12),
    ],
)
def test_where_keeps_what_python_would(runs: list[Run], condition: str, n: int) -> None:
    assert len(filter_runs(runs, condition)) == n


def test_a_number_that_a_run_lacks_satisfies_no_comparison(tmp_path: Path) -> None:
    default_sweep(tmp_path)
    write_run(tmp_path, 4, full=True)
    found = read_runs([tmp_path])[0]
    assert [run.settings["latent_dim"] for run in filter_runs(found, "inference_gap >= 0")] == [4]
    assert filter_runs(found, "inference_gap < 0 or latent_dim == 2")[0].settings["latent_dim"] == 2


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("latentdim >= 8", "latentdim is no column; did you mean latent_dim"),
        ("latent_dim = 8", "compare with =="),
        ("__import__('os').system('true')", "neither a column nor a number"),
        ("latent_dim.__class__ == 1", "latent_dim.__class__ is no column"),
        ("(lambda: 1)() == 1", "neither a column nor a number"),
        ("[x for x in (1,)] == 1", "neither a column nor a number"),
        ("latent_dim + 1 > 2", "latent_dim \\+ 1 is neither a column"),
        ("f'{seed}' == '1'", "neither a column nor a number"),
        ("seed if seed else 1", "neither a column nor a number"),
        ("latent_dim is 8", "compare with =="),
        ("latent_dim", "neither true nor false"),
        ("latent_dim == '8'", "compare like with like"),
        ("activation > 3", "compare like with like"),
        ("latent_dim in 8", "in wants a list"),
        ("8", "neither a column nor"),
        ("(" * 300 + "1" + ")" * 300, "is no condition"),
        ("seed < " + "9" * 2000, "at most 1000 are read"),
        ("", "is no condition"),
        ("seed > 5", "holds for none of 12 runs"),
    ],
)
def test_where_refuses_the_rest_in_one_line(runs: list[Run], condition: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        filter_runs(runs, condition)
    assert "\n" not in str(error.value)


def test_metrics_picks_and_orders_columns(runs: list[Run]) -> None:
    table = build_table(runs, ["mmd", "kl_per_image", "mmd"])
    assert table.telling() == ("mmd", "kl_per_image")
    with pytest.raises(InputError, match=r"metrics=kl_per_imge .* mean kl_per_image"):
        build_table(runs, ["kl_per_imge"])


def test_a_difference_combines_the_errors_of_both() -> None:
    a, b = Aggregate(3.0, 0.4, 4, 0.01), Aggregate(1.0, 0.6, 9, 0.02)
    found = difference(a, b)
    assert (found.value, found.over_seeds) == (2.0, True)
    assert found.error == pytest.approx(math.hypot(0.4 / 2, 0.6 / 3))
    assert found.text() == "+2.00 ± 0.28"
    one_seed = difference(Aggregate(1.0, None, 1, 0.03), b)
    assert one_seed.error == pytest.approx(math.hypot(0.03, 0.02))
    assert not one_seed.over_seeds
    assert difference(Aggregate(None, None, 0, None), b).text() == "n/a"


@pytest.mark.parametrize(
    "text", ["latent_dim=2,encoder_depth=1", "latent_dim=2,encoder_depth=1,seed=0-0123", "  "]
)
def test_a_baseline_is_named_by_settings_or_by_the_beginning_of_a_name(
    runs: list[Run], text: str
) -> None:
    table = build_table(runs)
    if not text.strip():
        with pytest.raises(InputError, match="names no run"):
            compare(table, text)
        return
    found = compare(table, text)
    assert found.label == "latent_dim=2, encoder_depth=1"
    assert len(found.rows) == 5
    row, cells = found.rows[-1]
    metric = found.metrics.index("kl_per_image")
    expected = row.metrics["kl_per_image"].mean - found.baseline.metrics["kl_per_image"].mean
    assert cells[metric].value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("latent_dim=2", "names 2 configurations; give latent_dim, encoder_depth"),
        ("latent_dim=3,encoder_depth=1", "names no run"),
        ("latent_dm=2", "names no run of this report; did you mean latent_dim="),
    ],
)
def test_a_baseline_that_is_not_one_is_refused(runs: list[Run], text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        compare(build_table(runs), text)


def test_folders_and_globs_are_expanded_and_copies_are_named(tmp_path: Path) -> None:
    default_sweep(tmp_path / "a")
    write_run(tmp_path / "b", 2, seed=1)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    folders = expand([str(tmp_path / "[ab]"), str(tmp_path / "c"), str(tmp_path / "a")])
    assert folders == [tmp_path / name for name in "abc"]
    stream = io.StringIO()
    result = write_report(folders, tmp_path / "out", Console(file=stream, width=200))
    assert len(result.runs) == 4
    assert [run.kind for run in result.excluded] == ["duplicate"] * 3
    assert "3 counted already" in stream.getvalue()
    with pytest.raises(InputError, match="matches no folder"):
        expand([str(tmp_path / "x*")])


def test_a_comparison_is_written_and_a_refused_one_writes_nothing(tmp_path: Path) -> None:
    default_sweep(tmp_path / "runs")
    output = tmp_path / "out"
    for wrong in ({"where": "x > 1"}, {"metrics": ["x"]}, {"baseline": "x"}):
        with pytest.raises(InputError):
            write_report([tmp_path / "runs"], output, QUIET, **wrong)
    assert not output.exists()
    write_report(
        [tmp_path / "runs"], output, QUIET, where="latent_dim < 32", metrics=["elbo"],
        baseline="latent_dim=8",
    )  # fmt: skip
    assert "−38.70 ± 0.44" in (output / "differences.md").read_text()
    assert (output / "table.csv").read_text().splitlines()[0].endswith("elbo_mc_error [nats]")
    page = (output / "report.html").read_text()
    assert "2 of 3 where latent_dim &lt; 32" in page
    write_report([tmp_path / "runs"], output, QUIET)
    assert not (output / "differences.md").exists()


def test_the_examples_of_the_help_work_in_a_shell(vaeq: Program, tmp_path: Path) -> None:
    for name in ("one", "two"):
        for seed in (0, 1):
            write_run(tmp_path / "outputs" / name, 8, seed, activation=name, encoder_depth=1)
    done = vaeq(
        "report", "runs=outputs/*", "where=latent_dim>=8 and seed<3 and activation!='x'",
        "baseline=activation=one", "metrics=kl_per_image,elbo",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "report" / "report.html").exists()
    refused = vaeq("report", "runs=[outputs/one,outputs/two]", "where=latentdim>=8", "output=x")
    assert refused.returncode == 2
    assert refused.stderr.startswith("vaeq: where=: latentdim is no column; did you mean")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
    for wrong in ("runs=3", "metrics={a:1}"):
        bad = vaeq("report", wrong)
        assert bad.returncode == 2
        assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (4.0, "= −3.65 nats: inference alone could account for the mismatch, so nothing follows"),
        (0.1, "0.350 − 0.100 = 0.250 nats: the generator misses the data by at least that much"),
        (None, "No bound: inference_gap was not measured."),
    ],
)
def test_the_bound_on_the_generator(tmp_path: Path, gap: float | None, words: str) -> None:
    directory = write_run(tmp_path, 2, numbers={"bracket": (0.35, 0.4)}, full=True)
    record = json.loads((directory / "record.json").read_text())
    record["estimates"]["inference_gap"] = estimate(gap, None, "nats", "" if gap else "why")
    write_json(directory / "record.json", record)
    costs = costs_of(build_table(read_runs([tmp_path])[0]))
    assert costs is not None
    assert words in costs.costs[0].bound
    assert next(source for source, _ in costs.costs[0].sources) == "training images (floor)"
