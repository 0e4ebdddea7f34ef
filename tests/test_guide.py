"""The README's examples for a VAE of one's own: the very text of programs that run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "tests" / "guide"
# What each needs beside vaeq.
NEEDS = {"plain_pytorch": "torch", "pythae_vae": "pythae", "lightning_vae": "lightning"}


def quoted(name: str) -> str:
    """The block that follows the link to a program in the README."""
    text = (ROOT / "README.md").read_text()
    link = text.index(f"(tests/guide/{name}.py):\n")
    lines = []
    for line in text[link:].splitlines()[2:]:
        if line and not line.startswith("    "):
            break
        lines.append(line.removeprefix("    "))
    return "\n".join(lines).strip("\n") + "\n"


def test_every_program_is_in_the_readme() -> None:
    assert {path.stem for path in GUIDE.glob("*.py")} == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_the_readme_quotes_the_end_of_the_program(name: str) -> None:
    block = quoted(name)
    assert "vaeq.measure(" in block
    assert (GUIDE / f"{name}.py").read_text().endswith("\n" + block)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_the_program_measures_the_vae_it_trains(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}: pip install 'vaeq[guide]'")
    done = subprocess.run(
        [sys.executable, GUIDE / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2000 images, 2 dimensions, 500 held out" in done.stdout
    # A log variance taken for something else would be suspected aloud.
    assert "CodesWarning" not in done.stderr
    value = {
        line.split()[0]: float(line.split()[1])
        for line in done.stdout.splitlines()
        if re.match(r"[a-z_]+ +-?\d", line)
    }
    assert value["marginal_kl"] + value["mutual_information"] == pytest.approx(
        value["kl_per_image"], abs=0.01
    )
    assert 0 < value["marginal_kl"] < value["kl_per_image"] < 15
    assert value["active_units"] >= 1
    assert os.listdir(tmp_path) == []
