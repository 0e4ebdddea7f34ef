"""Every command in locales without UTF-8, odd time zones, and folders of odd names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.conftest import TINY
from tests.soak import times
from vaeq import cli, compose
from vaeq.errors import InputError

# What has a meaning to a shell, to Hydra's grammar, to YAML, to a glob, or no place in ASCII.
NAMES = [
    'it\'s "a" b,c=d (x) [y] {z} #ü日🦆 \\ $w %s *?; é: -',
    "two words",
    " spaces around ",
    "it's",
    "'quoted",
    '"quoted',
    "a,b",
    "latent_dim=2,seed=0",
    "1e3",
    "007",
    "true",
    "(x",
    "[x]",
    "[x",
    "{x: y}",
    "# comment",
    "a: b",
    "back\\slash\\",
    "$x ${",
    "%(x)s",
    "*?",
    "~nobody here",
    "!x @y &z",
    "-x --y",
    "Übung",
    "日本語",
    "🦆",
    "e\u0301",
    "\x1b[31mred",
]
# Python would go over to UTF-8 by itself in the first two.
PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LOCALES = {
    "C": {"LC_ALL": "C", **PLAIN},
    "POSIX": {"LC_ALL": "", "LC_CTYPE": "", "LANG": "POSIX", **PLAIN},
    "latin-1": {"LC_ALL": "en_US.ISO-8859-1", **PLAIN},
    "UTF-8": {"LC_ALL": "C.UTF-8"},
}
ZONES = ["XYZ-13:59:59", "Pacific/Chatham", "no such zone", ""]
CASES = [("C", NAMES[0], ZONES[0]), ("POSIX", NAMES[0], ZONES[1]), ("latin-1", NAMES[0], ZONES[2])]
CASES += [("UTF-8", name, ZONES[-1]) for name in NAMES]


@pytest.fixture(scope="session")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a locale that no machine has installed any more."""
    folder = tmp_path_factory.mktemp("locales")
    target = str(folder / "en_US.ISO-8859-1")
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not here")
    words = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", target]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("the sources of locales are not here")
    return folder


@pytest.mark.soak
@pytest.mark.parametrize(("locale", "name", "zone"), CASES[: times(1, len(CASES))])
def test_every_command_works_in_any_locale_folder_and_zone(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    locale: str,
    name: str,
    zone: str,
) -> None:
    env = {**LOCALES[locale], "TZ": zone}
    if locale == "latin-1":
        env["LOCPATH"] = str(request.getfixturevalue("latin_1"))

    def bare(*words: str) -> str:
        # Bytes: what the program says is in the locale's encoding, not in ours.
        done = subprocess.run(
            [sys.executable, "-m", "vaeq", *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
        return os.fsdecode(done.stdout)

    written = name.replace("${", "\\${")
    words = ("sweep", *TINY, "latent_dim=2", "generation.quality=false", f"outputs={written}")
    bare(*words)
    assert os.listdir(tmp_path) == [name]
    (directory,) = (tmp_path / name / "smoke").iterdir()
    inside = f"{written}/smoke/{directory.name}"
    bare("report", f"runs={written}/smoke", f"output={written}/page")
    bare("sample", f"run={inside}", "n=4")
    codes = np.random.default_rng(0).normal(size=(2, 300, 2))
    np.savez(tmp_path / name / "codes.npz", mean=codes[0], logvar=codes[1] - 4)
    said = bare(
        "measure",
        "panel=decomposition",
        f"codes={written}/codes.npz",
        f"output={written}/found.json",
    )
    assert ("± s.e." if locale == "UTF-8" else "s.e.") in said
    if locale in ("C", "POSIX"):
        assert "+/- s.e." in said
    for command in ("--help", "train --help", "sweep --help", "sample --help"):
        if times(0, 1):
            bare(*command.split())
    # Whatever the locale, files are UTF-8, and times are UTC.
    texts = [f for f in (tmp_path / name).rglob("*") if f.suffix in (".json", ".html", ".csv")]
    texts += [f for f in (tmp_path / name).rglob("*") if f.suffix in (".md", ".tex", ".yaml")]
    assert len(texts) >= 9
    for file in texts:
        file.read_text(encoding="utf-8")
    assert "±" in (tmp_path / name / "page" / "report.html").read_text(encoding="utf-8")
    status = json.loads((directory / "status.json").read_bytes())
    assert status["updated_at"].endswith("+00:00")


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_it_is_written(name: str) -> None:
    assert understood("train", "outputs", name.replace("${", "\\${")) == name


@given(st.text(st.characters(exclude_characters="\0\n\r"), min_size=1))
def test_any_text_without_quotes_round_it_is_taken_as_it_is_written(name: str) -> None:
    assume(name[0] not in "'\"~" and "${" not in name and name != "null")
    assert understood("sweep", "data.root", name) == name
    assert understood("report", "where", name) == name
    assert understood("measure", "codes", name) == name


def understood(command: str, key: str, value: str) -> str:
    """What Hydra and OmegaConf make of a value on the command line."""
    argument = compose.literal(command, f"{key}={value}")
    override = OverridesParser.create().parse_override(argument)
    assert not override.is_sweep_override()
    return str(OmegaConf.create({"x": override.value()})["x"])


def test_quotes_of_hydra_and_home_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/o'neil x")
    assert understood("train", "outputs", "'a b'") == "a b"
    assert understood("train", "outputs", '"a=b"') == "a=b"
    assert understood("train", "outputs", "~/runs") == "/home/o'neil x/runs"
    assert understood("train", "outputs", "./~") == "./~"
    for argument in ("latent_dim=2,8", "experiment=finding", "runs=[a,b]", "runs=", "output=null"):
        command = "report" if argument.startswith(("runs", "output")) else "sweep"
        assert compose.literal(command, argument) == argument
    assert compose.literal("report", "metrics=elbo,fid_prior") == "metrics=[elbo,fid_prior]"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["outputs="], "outputs must be text, got ''."),
        (["outputs=${nope}"], r"outputs: Interpolation key 'nope' not found; \$\{name\} stands"),
        (["outputs=${nope"], r'Error merging override outputs="\$\{nope": \$\{name\} stands for'),
        (["outputs=caf\udce9"], "outputs=caf\udce9/default is no UTF-8 text; choose another place"),
        (["outputs=" + "x" * 300], r"outputs=x+/default cannot be written \(File name too long"),
    ],
)
def test_a_path_that_cannot_be_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vaeq"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InputError) as refused:
        cli._run_hydra("train", words)
    assert re.search(sentence, str(refused.value))
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == []


def test_a_list_that_hydra_cannot_read_says_how_to_write_it() -> None:
    with pytest.raises(InputError, match=r"""a list of names as '\["a=1,b=2","c"\]'\.$"""):
        compose.check_overrides("report", ["runs=[a=b,c d]"])
