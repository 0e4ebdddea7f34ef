"""The declared ranges, the lowest versions, the lock and the audit; wheel and sdist."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.supply_chain import (
    CLEAN,
    LOCK,
    ROOT,
    UNKNOWN,
    VULNERABLE,
    judge,
    locked,
    lowest,
    requirements,
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    project: dict[str, Any] = {
        "build-system": {"requires": ["setuptools>=77"]},
        "project": {
            "name": "vaeq",
            "dependencies": ["torch>=2.7,<3", "hydra-core<1.4,>=1.3.8"],
            "optional-dependencies": {
                "dev": ["zuko>=1.3,<2"],
                "flow": ["zuko>=1.3,<2", "vaeq[dev]"],
            },
        },
    }
    pins = lowest(requirements(project))
    assert pins == ["setuptools==77", "torch==2.7", "hydra-core==1.3.8", "zuko==1.3"]
    for text in ("torch<3", "torch==2.7", "torch>=2.7,>=2.8"):
        with pytest.raises(ValueError, match="must have one lower bound"):
            lowest([Requirement(text)])


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = requirements(PROJECT, extras)
    assert len(lowest(wanted)) == len(wanted)
    build = {Requirement(text).name for text in PROJECT["build-system"]["requires"]}
    for requirement in wanted:
        bounded = any(each.operator in ("<", "<=") for each in requirement.specifier)
        assert bounded or requirement.name in build, f"{requirement} has no upper bound"


def test_the_lock_has_a_version_in_range_and_hashes_for_every_package() -> None:
    found = locked(LOCK.read_text(encoding="utf-8"))
    for requirement in requirements(PROJECT):
        name = canonicalize_name(requirement.name)
        assert name in found, f"{requirement} is not in {LOCK.name}: make lock"
        version, _ = found[name]
        assert version in requirement.specifier, f"{requirement}, but locked {version}: make lock"
    assert [name for name, (_, hashes) in found.items() if not hashes] == []
    # Neither an index nor a path of the machine it was made on.
    assert not re.search(r"://|--index|--find|file:|/", LOCK.read_text(encoding="utf-8"))


def test_a_lock_is_read_with_its_markers_and_hashes() -> None:
    text = (
        "a-b==1.2 ; os_name == 'nt' \\\n  --hash=sha256:0 \\\n  --hash=sha256:1\n  # via c\nd==3\n"
    )
    found = {name: (str(version), n) for name, (version, n) in locked(text).items()}
    assert found == {"a-b": ("1.2", 2), "d": ("3", 0)}


def test_what_an_audit_says() -> None:
    sound = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["2.1"]}]}
    unknown = {"name": "c", "skip_reason": "not found"}
    assert judge({"dependencies": [sound]}) == (CLEAN, "no known vulnerability in 1 packages")
    status, words = judge({"dependencies": [sound, bad, unknown]})
    assert status == VULNERABLE
    assert words.splitlines()[1:] == ["b 2: X-1; fixed in 2.1"]
    # Where the service is not reached pip-audit itself says "No known vulnerabilities found".
    status, words = judge({"dependencies": [sound, unknown]})
    assert status == UNKNOWN
    assert words.startswith("not audited: the vulnerability service knows nothing of 1 of 2")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return folder


def sources() -> set[str]:
    """Names in the wheel of all that the packages hold: code, presets, MNIST, the page."""
    kept = {".py", ".c", ".yaml", ".gz", ".j2", ".css", ".js", ".typed"}
    names = {path.relative_to(ROOT) for folder in ("vaeq", "configs") for path in walk(folder)}
    renamed = {
        Path("hydra_plugins/vaeq", *path.parts[2:])
        if path.parts[:2] == ("vaeq", "hydra_plugins")
        else Path("vaeq", path)
        if path.parts[0] == "configs"
        else path
        for path in names
        if path.suffix in kept or path.name == "py.typed"
    }
    return {path.as_posix() for path in renamed}


def walk(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]


@pytest.mark.slow
def test_a_wheel_built_from_the_sdist_holds_everything(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        meta = archive.read(f"{wheel.name.rsplit('-', 3)[0]}.dist-info/METADATA").decode()
    assert names - {"vaeq/mnist/README.md"} == sources()
    assert "vaeq/configs/experiment/finding.yaml" in names
    assert "Requires-Python: <3.14,>=3.11" in meta
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("pyproject.toml", "README.md", "LICENSE", "configs/train.yaml"):
        assert name in inside
