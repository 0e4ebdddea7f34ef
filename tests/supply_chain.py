"""Which versions of other people's packages vaeq is tested with, and whether they are known bad.

python -m tests.supply_chain lowest    pins of the lowest versions that pyproject.toml admits
python -m tests.supply_chain audit     known vulnerabilities of the versions in .ci/lock.txt
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCK = ROOT / ".ci" / "lock.txt"
# The extras that the tests need; what they hold is tested at its lowest, too.
EXTRAS = ("flow", "dev")
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3


def requirements(project: dict[str, Any], extras: Iterable[str] = EXTRAS) -> list[Requirement]:
    """The direct dependencies of a parsed pyproject.toml, with those of its build, each once."""
    texts = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in extras:
        texts += project["project"]["optional-dependencies"][extra]
    wanted = [Requirement(text) for text in dict.fromkeys(texts)]
    # An extra of other extras names the project itself.
    return [each for each in wanted if each.name != project["project"]["name"]]


def lowest(wanted: Iterable[Requirement]) -> list[str]:
    """``name==version`` of each at the lowest version that it admits.

    Raises:
        ValueError: a requirement has no lower bound, or two.
    """
    pins = []
    for requirement in wanted:
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{requirement} must have one lower bound, >=")
        pins.append(f"{requirement.name}=={bounds[0]}")
    return pins


def locked(text: str) -> dict[str, tuple[Version, int]]:
    """Version and number of hashes of every package in a file of pins."""
    found = {}
    for entry in text.replace("\\\n", " ").splitlines():
        words = entry.split("#", 1)[0].split()
        if words:
            name, _, version = words[0].partition("==")
            hashes = sum(word.startswith("--hash=sha256:") for word in words)
            found[canonicalize_name(name)] = Version(version), hashes
    return found


def judge(audited: dict[str, Any]) -> tuple[int, str]:
    """Exit status and sentence for what pip-audit found, as its JSON says it."""
    packages = audited["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    bad = [
        f"{package['name']} {package['version']}: "
        f"{', '.join(v['id'] for v in package['vulns'])}; fixed in "
        f"{', '.join(dict.fromkeys(f for v in package['vulns'] for f in v['fix_versions'])) or '?'}"
        for package in packages
        if package.get("vulns")
    ]
    if bad:
        return VULNERABLE, "known vulnerabilities:\n" + "\n".join(bad)
    if skipped:
        return UNKNOWN, (
            f"not audited: the vulnerability service knows nothing of {len(skipped)} of "
            f"{len(packages)} packages here, {skipped[0]} first; run this where it can be reached."
        )
    return CLEAN, f"no known vulnerability in {len(packages)} packages"


def audit() -> tuple[int, str]:
    """Ask pip-audit about every locked version."""
    words = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run(
        [sys.executable, *words, "--progress-spinner", "off", "--requirement", str(LOCK)],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    try:
        return judge(json.loads(done.stdout))
    except json.JSONDecodeError:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return UNKNOWN, f"not audited: pip-audit did not get as far as an answer ({reason[:200]})"


def main(command: str) -> int:
    """Print pins or a judgement; the exit status says whether all is well."""
    if command == "lowest":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        sys.stdout.write("\n".join(lowest(requirements(project))) + "\n")
        return CLEAN
    status, sentence = audit()
    sys.stdout.write(sentence + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
