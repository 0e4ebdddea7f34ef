"""What is written for people is true: every example, every setting, the guide to an estimator."""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.conftest import TINY
from tests.soak import SOAK
from tests.test_experiment import FILES
from vaeq import cli, compose
from vaeq.config import RunConfig, keys_of
from vaeq.launch import study, sweep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Numbers without a unit.
BARE = {
    "beta",
    "learning_rate",
    "scale",
    "seed",
    "synthetic_seed",
    "synthetic_signal",
    "trial_seed",
}

Words = list[str]
Said = Callable[[Words], str]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What ``vaeq ...`` prints, run in this process: a tenth of the time of a new one."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", "400")

    def run(words: Words) -> str:
        monkeypatch.setattr("sys.argv", ["vaeq", *words])
        cli.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_the_whole_page_of_a_command(command: str, said: Said) -> None:
    words = said([command, "--help"])
    lines = {line.split("=")[0].strip(): line for line in words.splitlines() if line[:2] == "  "}
    for name, (spec, type_name, default) in keys_of(compose.SCHEMAS[command]).items():
        line = lines[name]
        assert line.startswith(f"  {name}={cli.yaml_words(default)} "), name
        assert spec.help in line
        assert line.rstrip().endswith(f"; {spec.range_words(type_name)}"), name
        numeric = "int" in type_name or "float" in type_name
        if numeric and name.rpartition(".")[2] not in BARE:
            assert spec.unit, f"{name} has no unit"
        assert not spec.unit or f" [{spec.unit}];" in line
    assert len(re.findall(rf"^  vaeq {command}\b", words, re.MULTILINE)) >= 2
    assert "\nWrites:\n  " in words
    for status in ("0 done", "2 bad input", "130 or 143 stopped"):
        assert status in words
    assert ("1 a run failed" in words) == (command in ("train", "sweep"))
    if command in ("train", "sweep"):
        for file in FILES - {".lock"}:
            assert file in words
        for group in ("experiment", "data"):
            for file in (ROOT / "configs" / group).glob("*.yaml"):
                assert re.search(rf"^{group}= .*\b{file.stem}\b", words, re.MULTILINE)


def test_help_names_the_files_that_are_written() -> None:
    """The other commands; those of train are compared with a run's folder."""
    report = (ROOT / "vaeq" / "report" / "__init__.py").read_text()
    written = set(re.findall(r'"(\w+\.(?:html|csv|md|tex))"', report))
    assert written == {"report.html", "table.csv", "table.md", "table.tex", "verdict.md",
                       "differences.md"}  # fmt: skip
    for name in written:
        assert name in cli.WRITES["report"][0]
    for name in (study.JOURNAL, study.TABLE):
        assert name in cli.WRITES["sweep"][-1]


def commands_of(text: str) -> list[str]:
    """Indented command lines of a document, without what stands beside them, and inline ones."""
    text = re.sub(r"\\\n\s*", " ", text)  # a continued line is one command
    indented = re.findall(r"^    (?:\S*/)?vaeq ((?:train|sweep|report|measure|sample)\b.*)$", text,
                          re.MULTILINE)  # fmt: skip
    inline = re.findall(r"`vaeq ((?:train|sweep|report|measure|sample) [^`]*)`", text)
    found = [re.split(r"\s{2,}", line)[0] for line in indented] + inline
    # A synopsis is none, and mine is the preset of the guide, which is walked below.
    return [line for line in found if "[output=" not in line and "experiment=mine" not in line]


EXAMPLES = [example.removeprefix("vaeq ") for each in cli.EXAMPLES.values() for example in each]
MAKE = re.findall(r"\$\(BIN\)/vaeq (.*)", (ROOT / "Makefile").read_text())


def test_the_documents_have_examples() -> None:
    assert len(EXAMPLES) >= 2 * len(cli.COMMANDS)
    assert len(commands_of(README)) >= 10
    assert len(MAKE) == 2


@pytest.mark.parametrize("line", dict.fromkeys([*EXAMPLES, *commands_of(README), *MAKE]))
def test_every_command_line_in_the_documents_is_right(
    line: str, said: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Composed, checked and taken up to the point where work would begin."""
    if "optuna" in line:
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    begun: list[object] = []
    words = shlex.split(line)
    if "--help" in words:
        assert f"vaeq {words[0]}: {cli.COMMANDS[words[0]]}" in said(words)
        return

    def task(command: str) -> Callable[[Any], None]:
        return lambda cfg: begun.append(compose.typed(cfg, compose.SCHEMAS[command]))

    for command in cli.TASKS:
        monkeypatch.setitem(cli.TASKS, command, task(command))

    def run_sweep(configs: list[RunConfig], *rest: object) -> sweep.SweepResult:
        begun.extend(configs)
        return sweep.SweepResult()

    def search(settings: Any, axes: Any, *, compose: Any, **rest: object) -> None:
        seeds = next((axis.ends() for axis in axes if axis.name == "seed"), [])
        others = [axis for axis in axes if axis.name != "seed"]
        begun.append(study._check(settings, others, seeds, compose))

    monkeypatch.setattr(sweep, "run_sweep", run_sweep)
    monkeypatch.setattr(study, "search", search)
    said(words)
    assert begun
    if words[0] == "sweep":
        assert all(isinstance(config, RunConfig) for config in begun)
    assert list(tmp_path.iterdir()) == []


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = OmegaConf.to_object(OmegaConf.load(ROOT / "CITATION.cff"))
    assert isinstance(citation, dict)
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert {"cff-version", "message", "title"} <= citation.keys()


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def blocks(text: str) -> list[str]:
    """The indented blocks of a section, without their indentation."""
    found = re.findall(r"^    .*\n(?:(?:    .*)?\n)*", text, re.MULTILINE)
    return [textwrap.dedent(block).rstrip() + "\n" for block in found]


def built(folder: Path) -> dict[str, str]:
    """A copy of the package as a wheel lays it out; the environment that runs it."""
    for source, place in (
        ("vaeq", "vaeq"),
        ("configs", "vaeq/configs"),
        ("vaeq/hydra_plugins", "hydra_plugins/vaeq"),
    ):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, folder / place, ignore=ignored)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def insert(file: Path, after: str, line: str) -> None:
    """Put a line after the first place where a text ends."""
    text = file.read_text()
    at = text.index(after) + len(after)
    file.write_text(f"{text[:at]}{line}\n{text[at:]}")


# What a reader of the guide types; but for the page, which make soak draws.
STEPS = """
import sys
import pytest
from vaeq.cli import main
assert pytest.main(["-q", "test_mean_square.py"]) == 0
for words in {commands}:
    sys.argv = ["vaeq", *words]
    main()
from pathlib import Path
from vaeq.report.runs import read_runs
from vaeq.report.table import build_table, to_csv
table = build_table(read_runs([Path("outputs/mine")])[0], ["mean_square", "elbo"])
Path("table.csv").write_text(to_csv(table))
"""


@pytest.mark.slow
def test_the_guide_leads_from_a_preset_and_an_estimator_to_a_column_of_the_report(
    tmp_path: Path,
) -> None:
    """README's own blocks, put where README says, in a copy of the package."""
    preset, module, lines, test = blocks(section("Your own sweep, your own estimator"))
    package, work = tmp_path / "package", tmp_path / "work"
    environment = built(package)
    work.mkdir()
    (package / "vaeq/configs/experiment/mine.yaml").write_text(preset)
    (package / "vaeq/divergence/mean_square.py").write_text(module)
    (work / "test_mean_square.py").write_text(test)
    imported, name, call = (re.split(r"\s{2,}", line)[0] for line in lines.splitlines())
    measurement = package / "vaeq/measurement.py"
    insert(measurement, "from vaeq.estimate import Estimate\n", imported)
    insert(measurement, '    "decomposition": (\n', f"        {name}")
    insert(measurement, "per_dimension=per_dimension\n    )\n", f"    {call}")
    small = [word for word in TINY if not word.startswith("experiment=")]
    small += ["encoder_depth=1", "decoder_depth=1", "generation.quality=false", "epochs=1"]
    commands = [["sweep", "experiment=mine", "hydra/launcher=ensemble", *small]]
    if SOAK:
        commands.append(["report", "metrics=mean_square,elbo"])
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(commands=commands)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    with (work / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["latent_dim"] for row in rows] == ["2", "8"]
    for row in rows:
        assert float(row["beta"]) == 4
        assert float(row["mean_square_mean"]) > 0
    if SOAK:
        assert (work / "outputs/mine/table.csv").read_text() == (work / "table.csv").read_text()
        page = (work / "outputs/mine/report.html").read_text()
        assert re.search(r"<th[^>]*>\s*(<[^>]*>\s*)*mean_square", page)
