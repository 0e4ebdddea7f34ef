"""The dependency rule: mathematics knows no plumbing, and the report knows no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vaeq

PACKAGE = Path(vaeq.__file__).parent
MATHS = [
    "divergence",
    "estimate",
    "generation/likelihood",
    "generation/quality",
    "generation/samplers",
    "models",
    "posterior/aggregated",
    "posterior/log_density",
]
PLUMBING = {"cli", "compose", "config", "experiment", "launch", "report", "runs"}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def files(name: str) -> list[Path]:
    module = PACKAGE / f"{name}.py"
    return [module] if module.exists() else sorted((PACKAGE / name).glob("**/*.py"))


def uses(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


@pytest.mark.parametrize("name", MATHS)
def test_mathematics_imports_no_plumbing(name: str) -> None:
    assert files(name)
    for file in files(name):
        found = imports(file)
        forbidden = [f"vaeq.{p}" for p in PLUMBING] + ["hydra", "omegaconf", "rich", "pandas"]
        assert not [m for m in forbidden if uses(found, m)], file


def test_hydra_is_known_to_the_command_line_alone() -> None:
    for file in PACKAGE.glob("**/*.py"):
        name = file.relative_to(PACKAGE).parts[0]
        if name not in ("cli.py", "compose.py", "hydra_plugins"):
            assert not uses(imports(file), "hydra"), file


def test_the_report_starts_without_torch() -> None:
    code = "import sys, vaeq.report, vaeq.launch.pool; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_codes_that_are_not_there_are_missed_without_torch(tmp_path: Path) -> None:
    code = """
import sys
from vaeq.cli import main
sys.argv = ["vaeq", "measure", "codes=none.npz"]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "codes=none.npz does not exist" in done.stderr
    assert done.stdout == "False\n"


def test_no_pickle_is_loaded_anywhere() -> None:
    for file in PACKAGE.glob("**/*.py"):
        assert not uses(imports(file), "pickle"), file
        text = file.read_text()
        assert "torch.load(" not in text, file
        assert "allow_pickle=True" not in text, file


def test_no_text_is_read_or_written_in_the_encoding_of_the_locale() -> None:
    before = {"read_text": 0, "write_text": 1}  # arguments that come before the encoding
    for file in PACKAGE.glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(
                node.func, ast.Attribute | ast.Name
            ):
                continue
            call = ast.unparse(node.func)
            name = call.rpartition(".")[2]
            if name in before:
                named = any(word.arg == "encoding" for word in node.keywords)
                assert named or len(node.args) > before[name], (file, node.lineno)
            elif name == "open" and call not in (
                "os.open",
                "gzip.open",
                "archive.open",
                "Image.open",
            ):
                assert "b'" in ast.unparse(node), (file, node.lineno)
