"""C that is compiled on the spot: kept, checked, and done without where there is no compiler."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from vaeq.training import compiler

SOURCE = "#include <stdint.h>\nint64_t twice(int64_t n) { return 2 * n; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C file, in an empty home."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "double.c"
    file.write_text(SOURCE)
    return file


def load(source: Path) -> ctypes.CDLL | None:
    """As another process would."""
    compiler.compiled.cache_clear()
    return compiler.compiled(source)


def works(functions: ctypes.CDLL | None) -> bool:
    return functions is not None and functions.twice(21) == 42


def kept(home: Path) -> list[Path]:
    return sorted((home / ".cache/vaeq/compiled").iterdir())


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


@pytest.fixture(autouse=True)
def _forgotten() -> object:
    """What these tests compile is not what the next ones use."""
    yield
    compiler.compiled.cache_clear()


def test_it_is_compiled_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tmp_path / "count"
    counting = script(tmp_path / "mycc", f'echo >> "{count}"; exec cc "$@"')
    monkeypatch.setenv("CC", counting)
    assert works(load(source))
    assert works(load(source))
    assert len(count.read_text().splitlines()) == 1
    (file,) = kept(tmp_path / "home")
    assert file.suffix == ".so"
    assert file.parent.stat().st_mode & 0o077 == 0
    # Another text, another processor, another compiler: another file.
    source.write_text(SOURCE.replace("2 * n", "n + n"))
    assert works(load(source))
    monkeypatch.setattr(compiler, "cpu_flags", lambda: {"another"})
    assert works(load(source))
    monkeypatch.delenv("CC")
    assert works(load(source))
    assert len(kept(tmp_path / "home")) == 4


def test_a_damaged_file_is_not_loaded(source: Path, tmp_path: Path) -> None:
    assert works(load(source))
    (file,) = kept(tmp_path / "home")
    whole = file.read_bytes()
    for damaged in (b"", whole[:2000], whole[:-1], whole[:4000] + b"\0" * 99 + whole[4099:]):
        # Not in place: the file is mapped into this very process.
        file.unlink()
        file.write_bytes(damaged)
        assert works(load(source))
        assert kept(tmp_path / "home") == [file]
        assert file.read_bytes() == whole


@pytest.mark.parametrize("text", ["exit 1", "exit 0", "kill -9 $$", "echo no; exit 4"])
def test_a_compiler_that_fails_is_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "bad", text))
    assert load(source) is None
    assert kept(tmp_path / "home") == []
    monkeypatch.setenv("CC", "a-compiler-that-is-not-there")
    assert load(source) is None


def test_a_compiler_that_takes_too_long_is_none(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "slow", "exec sleep 30"))
    monkeypatch.setattr(compiler, "_LONGEST", 0.1)
    assert load(source) is None


def test_without_openmp_one_thread_does_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = 'for word; do [ "$word" = -fopenmp ] && exit 1; done; exec cc "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "plain", refusing))
    assert works(load(source))


def test_a_function_of_openmp_that_the_process_lacks_is_done_without(source: Path) -> None:
    source.write_text(
        "#ifdef _OPENMP\nint nobody_has_this(void);\n#else\n"
        "static int nobody_has_this(void) { return 0; }\n#endif\n"
        f"int use(void) {{ return nobody_has_this(); }}\n{SOURCE}"
    )
    assert works(load(source))


def test_a_compiler_may_have_options(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("#include <stdint.h>\nint64_t twice(int64_t n) { return FACTOR * n; }\n")
    assert load(source) is None
    monkeypatch.setenv("CC", "cc -DFACTOR=2")
    assert works(load(source))
    monkeypatch.setenv("CC", "cc -DFACTOR=3")
    functions = load(source)
    assert functions is not None
    assert functions.twice(2) == 6


def test_a_home_that_cannot_be_written_is_done_without(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    assert works(load(source))
    assert (tmp_path / "home").read_text() == "a file"


def test_nobody_needs_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert works(load(source))
