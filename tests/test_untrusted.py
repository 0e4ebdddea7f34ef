"""Files made to harm: code in a pickle, sizes that lie, links out of the folder, names that act.

What each must come to is one clear sentence, or a report in which it is mere text. Bombs and lies
about sizes are read in a process of their own under a limit of its memory, which they would break.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from rich.console import Console
from safetensors.numpy import save_file

import vaeq
from tests.mutation import SCRIPT, Raw, json_text, resealed, safetensors_bytes
from tests.report_fixtures import list_files, write_json, write_run, write_status
from vaeq.cli import main
from vaeq.compose import check_overrides
from vaeq.config import RunConfig, run_config
from vaeq.data.datasets import read_image_set
from vaeq.errors import InputError
from vaeq.experiment import run
from vaeq.files.checksum import BLANK
from vaeq.generation.sample import load_decoder
from vaeq.launch.sweep import require_folders
from vaeq.posterior.codes import read_codes
from vaeq.report import figures, write_report
from vaeq.report.figures import DRAWINGS, FigureError, draw
from vaeq.report.figures.pictures import decoded_plane
from vaeq.report.figures.sources import read_pictures, read_samples
from vaeq.report.runs import read_runs
from vaeq.report.table import build_table
from vaeq.runs.record import CHECKPOINT, PICTURES, SAMPLES, lock, require_inside, run_directory

PACKAGE = Path(vaeq.__file__).parent
# What loads code with data, or runs text. Each by the name it is imported or called by.
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal",
           "jsonpickle", "pandas.io.pickle", "h5py", "xmlrpc"}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load",
         "yaml.unsafe_load", "yaml.full_load", "torch.load", "torch.jit.load", "torch.hub.load",
         "torch.package.PackageImporter", "np.load", "numpy.load", "np.fromregex", "pd.read_pickle",
         "pandas.read_pickle", "safetensors.torch.load_model", "runpy.run_path"}  # fmt: skip
ANYWHERE = {"allow_pickle", "read_pickle", "unsafe_load", "weights_only"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def what_runs_code(source: str) -> list[str]:
    """Every import, call or option of a module that could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if {a.name, a.name.split(".")[0]} & MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {module, module.split(".")[0], *(f"{module}.{a.name}" for a in node.names)}
            found += sorted(names & (MODULES | CALLS))
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            found += [name] * (name in CALLS)
            found += [str(k.arg) for k in node.keywords if k.arg in ANYWHERE]
            found += ["shell=True"] * any(k.arg == "shell" for k in node.keywords)
        elif isinstance(node, ast.Attribute) and node.attr in ANYWHERE:
            found.append(node.attr)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import pickle as p",
        "from joblib import load",
        "torch.load(f)", "np.load(f)", "np.load(f, allow_pickle=False)", "from torch import load",
        "from numpy import load", "yaml.load(s)", "eval(text)", "exec(text)", "import torch.package"
        "\ntorch.package.PackageImporter(f)", "import shelve", "import marshal",
        "f(allow_pickle=1)",
        "subprocess.run(s, shell=True)", "pandas.read_pickle(f)", "x.read_pickle(f)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert what_runs_code(source)


def test_nothing_in_vaeq_loads_a_pickle_or_runs_a_text() -> None:
    files = sorted(PACKAGE.glob("**/*.py"))
    assert len(files) > 60
    for file in files:
        assert what_runs_code(file.read_text()) == [], file


class Armed:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_no_reader_runs_the_code_in_a_pickle(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    armed = np.empty((6, 3), dtype=object)
    armed[:] = [[Armed(proof)] * 3] * 6
    good = np.zeros((6, 3), np.float32)
    torch.save({"mean": Armed(proof)}, tmp_path / "codes.pt")
    for name in ("codes.npz", "codes.safetensors", "mean.npy"):
        (tmp_path / name).write_bytes((tmp_path / "codes.pt").read_bytes())
    np.savez(tmp_path / "objects.npz", mean=armed, logvar=good)
    np.savez(tmp_path / "images.npz", train_images=armed, test_images=armed)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "mean.npy", armed)
    np.save(tmp_path / "folder" / "logvar.npy", good)
    # The file can do what it is for: it is not harmless by mistake.
    np.load(tmp_path / "folder" / "mean.npy", allow_pickle=True)
    assert proof.exists()
    proof.unlink()
    for name in ("codes.pt", "codes.npz", "codes.safetensors", "mean.npy", "objects.npz", "folder"):
        with pytest.raises(InputError):
            read_codes(tmp_path / name)
    with pytest.raises(InputError, match="holds Python objects"):
        read_image_set("npz", path=str(tmp_path / "images.npz"))
    directory = write_run(tmp_path / "runs", 2)
    for name in (CHECKPOINT, SAMPLES, PICTURES, "status.json", "config.yaml", "history.csv"):
        (directory / name).write_bytes((tmp_path / "codes.pt").read_bytes())
    (found,) = read_runs([tmp_path / "runs"])[0]
    for read in (read_samples, read_pictures):
        with pytest.raises((FigureError, InputError)):
            read(found)
    with pytest.raises(InputError):
        load_decoder(directory)
    assert not proof.exists()


LIMITED = """
import json, resource, sys
import numpy, torch, safetensors, zipfile, gzip  # what it takes to read anything
from pathlib import Path
from vaeq.posterior import codes
from vaeq.data import datasets
from vaeq.files import idx
from vaeq.runs import record
from vaeq.errors import InputError
from vaeq.report.runs import read_runs
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
said = {}
for name, call in json.load(sys.stdin).items():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        said[name] = ["read", str(eval(call))]
    except InputError as error:
        said[name] = ["refused", str(error)]
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
    said[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - before)
print(json.dumps(said))
"""


def in_little_memory(calls: dict[str, str], most: int = 128 * 2**20) -> dict[str, Any]:
    """How each reader ends, in a process that may take so many bytes more than it begins with."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(most)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        input=json.dumps(calls), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def npy(shape: tuple[int, ...], data: bytes = b"", kind: str = "<f4") -> bytes:
    stream = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    """Files that would fill the memory: the call that reads each, and what it must say."""
    folder = tmp_path_factory.mktemp("bombs")
    zeros = bytes(2**20)
    good = npy((6, 3), bytes(72))
    size = 2**28
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("mean.npy", "w", force_zip64=True) as stream:
            stream.write(npy((2**16, 1024)))
            for _ in range(size // len(zeros)):
                stream.write(zeros)
        archive.writestr("logvar.npy", good)
    for name, entry, content in (
        ("lie.npz", "mean.npy", npy((2**40, 2**10), zeros)),
        ("raw.npz", "mean", zeros),  # no .npy: NumPy would hand its bytes out
    ):
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(entry, content)
            archive.writestr("logvar.npy", good)
    (folder / "lie").mkdir()
    (folder / "lie" / "mean.npy").write_bytes(npy((2**33, 1), bytes(100)))
    (folder / "lie" / "logvar.npy").write_bytes(good)
    (folder / "holes").mkdir()
    (folder / "holes" / "mean.npy").write_bytes(npy((2**35, 1)))
    os.truncate(folder / "holes" / "mean.npy", len(npy((2**35, 1))) + 2**37)
    (folder / "holes" / "logvar.npy").write_bytes(good)
    entry = {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 2**52]}
    (folder / "lie.safetensors").write_bytes(safetensors_bytes({"mean": entry}, bytes(100)))
    (folder / "long.safetensors").write_bytes(safetensors_bytes({}, bytes(100), 2**62))
    wrapped = {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}
    (folder / "wrapped.safetensors").write_bytes(safetensors_bytes({"mean": wrapped}, b""))
    images = b"\0\0\x08\x03" + struct.pack(">3I", 2**30, 2**15, 2**15)
    (folder / "images").write_bytes(images + bytes(1000))
    (folder / "images.gz").write_bytes(
        gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", size)) + gzip.compress(zeros) * 256
    )
    runs = {}
    for name, text in {
        "lists": "[" + "[]," * (8 * 2**20) + "[]]",
        "deep": "[" * 10**6,
        "texts": '["a"' + ',"bc"' * (12 * 2**20) + "]",
        "large": " " * (65 * 2**20),
    }.items():
        runs[name] = folder / name
        runs[name].mkdir()
        (runs[name] / "record.json").write_text(text)
    (folder / "status").mkdir()
    (folder / "status" / "status.json").write_text("[" + "[]," * (8 * 2**20) + "[]]")
    codes = {name: f"codes.read_codes({str(folder / name)!r})"
             for name in ("bomb.npz", "lie.npz", "raw.npz", "lie", "holes", "lie.safetensors",
                          "long.safetensors", "wrapped.safetensors")}  # fmt: skip
    return folder, {
        "bomb.npz": (codes["bomb.npz"], "times what it holds"),
        "lie.npz": (codes["lie.npz"], "cannot be read: it is truncated"),
        "raw.npz": (codes["raw.npz"], "cannot be read"),
        "lie": (codes["lie"], "cannot be read: it is truncated"),
        "holes": (codes["holes"], "more than the 17179869184 that are read"),
        "lie.safetensors": (codes["lie.safetensors"], "cannot be read"),
        "long.safetensors": (codes["long.safetensors"], "cannot be read"),
        "wrapped.safetensors": (codes["wrapped.safetensors"], "cannot be read"),
        "images": (f"idx.read_idx({str(folder / 'images')!r})", "promises 1073741824 x 32768"),
        "images.gz": (f"idx.read_idx({str(folder / 'images.gz')!r})", "100 times its"),
        "npz images": (
            f"datasets.read_image_set('npz', path={str(folder / 'bomb.npz')!r})",
            "must hold train_images",
        ),
        **{
            name: (f"record.read_record(Path({str(run / 'record.json')!r}))", sentence)
            for (name, run), sentence in zip(
                runs.items(),
                (
                    "more parts than any",
                    "more parts than any",
                    "more parts than any",
                    "larger than",
                ),
                strict=True,
            )
        },
        "status": (f"read_runs([Path({str(folder / 'status')!r})])[1][0].reason", "larger than"),
    }


def test_a_bomb_is_refused_in_little_memory(
    bombs: tuple[Path, dict[str, tuple[str, str]]],
) -> None:
    said = in_little_memory({name: call for name, (call, _) in bombs[1].items()})
    for name, (_, sentence) in bombs[1].items():
        how, words, seconds = said[name]
        assert how == ("read" if name == "status" else "refused"), (name, words[:300])
        assert sentence in words, (name, words[:300])
        assert seconds < 5


def test_the_limit_of_memory_is_one(bombs: tuple[Path, dict[str, tuple[str, str]]]) -> None:
    """Read whole, as their libraries read them, they break the limit they are refused under."""
    folder, _ = bombs
    said = in_little_memory(
        {
            "npz": f"numpy.load({str(folder / 'bomb.npz')!r})['mean'].sum()",
            "gzip": f"len(gzip.open({str(folder / 'images.gz')!r}).read())",
            "json": f"len(json.loads(Path({str(folder / 'lists' / 'record.json')!r}).read_text()))",
        }
    )
    for name, (how, _, _) in said.items():
        assert how in ("MemoryError", "_ArrayMemoryError"), (name, said[name])


def test_a_pipe_or_a_device_keeps_nobody_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for i, target in enumerate((pipe, Path("/dev/zero"), Path("/dev/stdin"))):
        for suffix in ("npz", "safetensors"):
            link = tmp_path / f"{i}.{suffix}"
            link.symlink_to(target)
            with pytest.raises(InputError, match="it is no regular file"):
                read_codes(link)
        folder = tmp_path / f"folder{i}"
        folder.mkdir()
        (folder / "mean.npy").symlink_to(target)
        np.save(folder / "logvar.npy", np.zeros((2, 2)))
        with pytest.raises(InputError, match="it is no regular file"):
            read_codes(folder)
        there = tmp_path / f"runs{i}" / "run"
        there.mkdir(parents=True)
        for name in ("record.json", "status.json"):
            (there / name).symlink_to(target)
        _, (excluded,) = read_runs([there.parent])
        assert "no regular file" in excluded.reason
        sound = write_run(tmp_path / f"sound{i}", 2)
        for name in (SAMPLES, PICTURES):
            (sound / name).symlink_to(target)
        (found,) = read_runs([sound.parent])[0]
        for read in (read_samples, read_pictures):
            with pytest.raises(FigureError, match="it is no regular file"):
                read(found)


# Names that act somewhere: in HTML, Markdown, TeX, a spreadsheet, a terminal, matplotlib, a path.
EVIL = (
    SCRIPT, "<img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "\x1b]0;owned\x07\x1b[2J",
    "=cmd|' /C calc'!A0", "@SUM(1+1)*cmd", "+1+cmd", "-1+cmd", "[x](javascript:alert(1))",
    "![x](http://evil.example/x.png)", "**bold** _em_ `code` ~~s~~", "a|b|c",
    "\\input{/etc/passwd}",
    "$\\write18{id}$", "%\\end{tabular}", "$x_2^{", "\u202egnp.exe", "a\nb\r\n# Verdict", "\ud800",
    "\0", "../../../tmp/evil", "{{7*7}}{% for %}", "</script><script>alert(1)</script>",
    "# heading",
    "&lt;b&gt;", "www.evil.example", "https://evil.example", "1. x",
)  # fmt: skip


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of runs whose every text is made to act, and its terminal's output."""
    folder = tmp_path_factory.mktemp("evil")
    runs = folder / "runs"
    for i, text in enumerate(EVIL):
        directory = write_run(runs / str(i), 2 if i % 2 else 8, seed=i, samples=20 * (i < 2))
        record = json.loads((directory / "record.json").read_text())
        record["config"] |= {"activation": text, "experiment": text, "data": {"name": text}}
        record["estimates"]["moment_kl"] |= {"value": None, "std_error": None, "reason": text}
        record["estimates"]["elbo"] |= {"unit": text}
        record["provenance"] |= {"torch": text, "device": text}
        write_json(directory / "record.json", record)
        failed = runs / f"failed{i}"
        write_status(failed, "failed", 1, failure={"type": text, "message": text})
        if "/" not in text and "\0" not in text and "\ud800" not in text:
            write_status(runs / text, "running", 1)
    (runs / os.fsdecode(b"not\xffutf8")).mkdir()
    write_status(runs / os.fsdecode(b"not\xffutf8"), "running", 1)
    stream = io.StringIO()
    console = Console(file=stream, width=140, force_terminal=True, color_system="standard")
    # Of the figures two, which write names: all of them take minutes.
    few = {name: DRAWINGS[name] for name in ("divergence_by_latent_dim", "latent_plane")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DRAWINGS", few)
        write_report([runs], folder / "out", console, baseline="0/latent_dim=8")
    (folder / "terminal").write_text(stream.getvalue())
    return folder


class Tags(HTMLParser):
    """Tags, attributes and comments of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.comments = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.comments += 1


def test_the_page_takes_every_name_for_text(evil: Path) -> None:
    text = (evil / "out" / "report.html").read_text()
    page = Tags(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert not {"iframe", "object", "embed", "form", "base", "b"} & set(tags)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "src", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:", "table.")) or value.endswith((".png", ".pdf"))
    assert "alert(1)" in text  # as text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
    assert "\u202e" not in text


def test_markdown_takes_every_name_for_text(evil: Path) -> None:
    parser = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    calm = {"text", "softbreak", "text_special"}
    for name in ("table.md", "verdict.md", "differences.md"):
        for token in parser.parse((evil / "out" / name).read_text()):
            assert token.type not in ("html_block", "fence", "code_block"), (name, token)
            if token.type == "heading_open":
                assert token.map is not None
            for child in token.children or ():
                ours = child.type == "code_inline" and child.content.startswith("vaeq sweep ")
                assert child.type in calm or ours, (name, child.type, token.content[:200])
    text = (evil / "out" / "table.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        "# Aggregated posterior against N(0, I)"
    ]
    # What is shown is the name itself.
    shown = " ".join(
        child.content
        for token in parser.parse(text)
        for child in token.children or ()
    )  # fmt: skip
    for name in ("**bold** _em_ `code` ~~s~~", SCRIPT, "[x](javascript:alert(1))", "&lt;b&gt;"):
        assert name in shown
    assert "https://evil" not in text
    assert " www.evil" not in text


def test_tex_finds_nothing_to_act_on(evil: Path) -> None:
    lines = (evil / "out" / "table.tex").read_text().splitlines()
    assert lines[1].startswith("\\begin{tabular}")
    assert lines[-2] == "\\end{tabular}"
    known = {"textbackslash", "pm", "times", "geq", "leq", "sigma", "textasciitilde", "toprule",
             "textasciicircum", "textless", "textgreater", "midrule", "bottomrule", "begin", "end",
             "usepackage"}  # fmt: skip
    for line in lines[2:-2]:
        words = line.replace("\\\\", "").split("\\")[1:]
        for word in words:
            name = "".join(c for c in word[:20] if c.isalpha()) if word[0].isalpha() else word[0]
            assert any(name.startswith(each) for each in known) or name in "&%$#_{}|", line
        assert line.isascii()
        if line.endswith("\\\\"):
            # TeX takes these at the beginning of the next row for arguments of the last one.
            assert line.lstrip()[0] not in "[*"
    rows = [line for line in lines if line.endswith("\\\\")]
    assert len({line.replace("\\&", "").count("&") for line in rows}) == 1


def test_a_spreadsheet_computes_nothing(evil: Path) -> None:
    rows = list(csv.reader((evil / "out" / "table.csv").read_text().splitlines()))
    assert len(rows) == 1 + len(EVIL)
    assert len({len(row) for row in rows}) == 1
    for cell in (cell for row in rows for cell in row):
        if cell[:1] in tuple("=+-@\t\r"):
            float(cell)
    assert any(cell.startswith("'=cmd") for row in rows for cell in row)


def test_a_terminal_is_told_nothing_but_colours(evil: Path) -> None:
    text = (evil / "terminal").read_text()
    left = text
    for code in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[1;2m"):
        left = left.replace(code, "")
    for colour in range(30, 38):
        left = left.replace(f"\x1b[{colour}m", "").replace(f"\x1b[1;{colour}m", "")
    assert not [c for c in left if not c.isprintable() and c != "\n"]
    assert "\\x1b]0;owned" in left
    assert "not\\udcffutf8" in left


def test_an_error_says_a_name_from_a_file_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "codes.npz", **{"\x1b[2Jmean\n": np.zeros(3), "logvar": np.zeros(3)})
    monkeypatch.setattr(sys, "argv", ["vaeq", "measure", f"codes={tmp_path / 'codes.npz'}"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\n") == 1
    assert "\\x1b[2Jmean" in said


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("config.latent_dim", 10**99, "another number for config.latent_dim, where an integer"),
        ("config.latent_dim", 0, "where an integer between 1 and 4096 is expected"),
        ("config.seed", -1, "another number for config.seed"),
        ("config.encoder_depth", 10**400, "no finite number for config.encoder_depth"),
        ("config.beta", Raw("1e999"), "no finite number for config.beta"),
        ("config.data.n_train", Raw("1" + "0" * 4000), "no finite number for config.data.n_train"),
        ("config.data.x", {"a": 1}, "an object for config.data.x"),
        ("config.<b>", 1, "'<b>' in config, which is no name"),
        ("config.many", dict.fromkeys((f"a{i}" for i in range(1001)), 0), "more settings than any"),
        ("estimates.elbo.value", 1e155, "no finite number or null for estimates.elbo.value"),
        ("estimates.=1+1", {}, "'=1+1' in estimates, which is no name"),
        ("estimates", {f"a{i}": {} for i in range(1001)}, "has 1001 estimates"),
        ("config_hash", SCRIPT, "a config_hash that is no SHA-256"),
        ("curves.deep", Raw("[" * 5000 + "]" * 5000), "nested too deeply"),
        ("curves.deep", Raw('{"a":' * 19 + "{}" + "}" * 19), "nested too deeply"),
        ("history.epoch", Raw("[1" + "0" * 5000 + "]"), "not valid JSON"),
    ],
)
def test_a_record_with_huge_or_odd_values_is_left_out(
    tmp_path: Path, part: str, value: Any, reason: str
) -> None:
    write_run(tmp_path, 8)
    directory = write_run(tmp_path, 2)
    record = json.loads((directory / "record.json").read_text())
    *path, last = part.split(".")
    place = record
    for name in path:
        place = place[name]
    place[last] = value
    text = json_text({**record, "seal": BLANK})
    (directory / "record.json").write_bytes(resealed(text.encode()))
    runs, (excluded,) = read_runs([tmp_path])
    assert len(runs) == 1
    assert reason in excluded.reason
    assert len(excluded.reason) < 300


def test_huge_numbers_in_a_curve_cost_the_figure_alone(tmp_path: Path) -> None:
    for latent_dim in (2, 8):
        directory = write_run(tmp_path, latent_dim, full=True)
        record = json.loads((directory / "record.json").read_text())
        record["curves"]["n_curve"]["n"][0] = 0
        record["curves"]["pit"]["mass"][0][0] = 10**400
        record["curves"]["by_class"]["marginal_kl"][0] = 1e200
        record["history"]["test_elbo"][0] = "x"
        record["per_dimension"]["kl"][0] = [1]
        write_json(directory / "record.json", record)
    _, left_out = draw(build_table(read_runs([tmp_path])[0]))
    assert {"n_curve", "uniform", "quilt", "training", "dimensions"} <= left_out.keys()


def test_pictures_that_do_not_fit_cost_the_figure_alone(tmp_path: Path) -> None:
    directory = write_run(tmp_path, 2)
    small, large = np.zeros((16, 14, 14), np.uint8), np.zeros((16, 28, 28), np.uint8)
    many = np.zeros((5000, 1, 1), np.uint8)
    for arrays, steps, reason in (
        ({"originals": large, "reconstructions": small}, "10", "pictures of several sizes"),
        ({"prior": many}, "10", "more than 4096 pictures"),
        ({"../../evil": large}, "10", "holds no pictures"),
    ):
        save_file(arrays, directory / PICTURES, {"interpolation_steps": steps})
        list_files(directory)
        table = build_table(read_runs([tmp_path])[0])
        with pytest.raises(FigureError, match=reason):
            decoded_plane(table)
    for steps in ("9" * 5000, "\u0663", "0", "-1", "x"):
        save_file({"interpolations": large}, directory / PICTURES, {"interpolation_steps": steps})
        list_files(directory)
        table = build_table(read_runs([tmp_path])[0])
        assert decoded_plane(table).rows[0][0].picture is not None


def test_samples_of_ten_thousand_classes_are_not_drawn(tmp_path: Path) -> None:
    directory = write_run(tmp_path, 2)
    z = np.random.default_rng(0).normal(size=(10_000, 2)).astype(np.float32)
    save_file({"z": z, "label": np.arange(10_000)}, directory / SAMPLES)
    list_files(directory)
    with pytest.raises(FigureError, match="more than 100 classes"):
        read_samples(read_runs([tmp_path])[0][0])


def test_a_link_leads_no_run_out_of_outputs(tiny: RunConfig, tmp_path: Path) -> None:
    outside, work = tmp_path / "outside", Path(tiny.outputs)
    outside.mkdir()
    work.mkdir()
    (work / tiny.experiment).symlink_to(outside)
    with pytest.raises(InputError, match="is a link out of outputs="):
        run(tiny, lambda event: None, 1)
    with pytest.raises(InputError, match="is a link out of outputs="):
        require_folders([tiny])
    inside = replace(tiny, experiment="inside")
    run_directory(inside).parent.mkdir()
    run_directory(inside).symlink_to(outside)
    with pytest.raises(InputError, match="is a link out of outputs="):
        run(inside, lambda event: None, 1)
    assert list(outside.iterdir()) == []
    # A link that was asked for is followed.
    require_inside(work / tiny.experiment / "x", work / tiny.experiment)
    (tmp_path / "elsewhere").symlink_to(work)
    require_inside(tmp_path / "elsewhere" / "run", tmp_path / "elsewhere")
    for folder in (work / tiny.experiment, work / ".." / "outside", outside):
        with pytest.raises(InputError, match="is a link out of outputs="):
            require_inside(folder, work)


def test_a_lock_that_is_a_link_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="is a link, which no lock is; delete it"):
        lock(tmp_path / ".lock")
    assert (tmp_path / "precious").read_text() == "content"


@pytest.mark.parametrize(
    "argument",
    ["experiment=../x", "experiment=../train", "experiment=/etc/passwd", "data=../train"],
)
def test_a_preset_is_a_name_and_no_path(argument: str) -> None:
    with pytest.raises(InputError, match="must be the name of a preset"):
        check_overrides("train", [argument])


def test_a_record_cannot_name_the_place_of_anything(tmp_path: Path) -> None:
    for name in ("../x", "/etc", "..", ".cache", "a/b", "a\nb"):
        values = {**run_config_values(), "experiment": name}
        with pytest.raises(InputError, match="experiment must be a plain folder name"):
            run_config(values)
    config = RunConfig(outputs=str(tmp_path))
    assert run_directory(config).resolve().is_relative_to(tmp_path)


def run_config_values() -> dict[str, Any]:
    return asdict(RunConfig())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latent_dim": "2"}, "latent_dim must be an integer between 1 and 4096, got 2"),
        ({"latent_dim": 2.0}, "latent_dim must be an integer"),
        ({"latent_dim": True}, "latent_dim must be an integer"),
        ({"epochs": 10**400}, "epochs must be an integer"),
        ({"beta": None}, "beta must be a number"),
        ({"activation": ["relu"]}, "activation must be one of"),
        ({"outputs": 3}, "outputs must be text"),
        ({"data": {"name": "mnist", "download": "yes"}}, "data.download must be true or false"),
        ({"data": []}, "those of another version"),
        ({"measure": None}, "those of another version"),
    ],
)
def test_settings_of_a_record_have_the_types_of_their_fields(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        run_config({**run_config_values(), **changes})
    assert len(str(error.value)) < 400


def test_sampling_from_anybodys_run_neither_fetches_nor_builds_what_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    def fetched(*arguments: Any, download: bool = False, **others: Any) -> None:
        assert not download, "a record made this machine fetch files"
        raise RuntimeError("not there")

    monkeypatch.setattr(datasets, "KMNIST", fetched)
    directory = write_run(tmp_path, 2)
    record = json.loads((directory / "record.json").read_text())
    values = run_config_values()
    values["data"] |= {"name": "kmnist", "download": True, "root": str(tmp_path / "evil")}
    write_json(directory / "record.json", {**record, "config": values})
    with pytest.raises(InputError):
        load_decoder(directory)
    assert not (tmp_path / "evil").exists()

    # 64 layers of 65536 by 65536: a tebibyte of weights.
    values = run_config_values() | {"encoder_depth": 64, "encoder_width": 65536}
    values["data"] |= {"n_train": 100, "n_test": 100}
    record["provenance"]["data"]["md5"] = mnist_md5()
    write_json(directory / "record.json", {**record, "config": values})
    save_file({"x": np.zeros(10, np.float32)}, directory / CHECKPOINT)
    with pytest.raises(InputError, match=r"too few for the 2706|needs about .* GiB of memory"):
        load_decoder(directory)
    del record["provenance"]["data"]
    values |= {"encoder_depth": 1, "encoder_width": 8}
    write_json(directory / "record.json", {**record, "config": values})
    with pytest.raises(InputError, match=r"is not what .* was trained on"):
        load_decoder(directory)


def mnist_md5() -> str:
    from vaeq.data.images import load_images

    return load_images(n_train=1, n_test=1).md5
