"""Every reader of a file or a text from outside, fed with thousands of altered ones.

Whatever they hold: the reader's one clear error or a sound result, in bounded time and memory. The
short form runs with the other tests; the long one, in ``make soak``, takes 100,000 inputs and more.
The same number of an input is always the same input.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import resource
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import save as save_arrays

from tests.mutation import (
    TEXTS,
    altered_bytes,
    altered_json,
    altered_safetensors,
    npy_bytes,
    npz_bytes,
    resealed,
    soup,
)
from tests.report_fixtures import curves_of, full_panel, full_sweep, history_of, write_run
from tests.soak import times
from vaeq.errors import InputError
from vaeq.files.checksum import BLANK, digest
from vaeq.models.mlp import VAE
from vaeq.training.loop import State

START = int(os.environ.get("VAEQ_FUZZ_START", "0"))
MOST_SECONDS = 2.0
MOST_MEMORY = 400 * 2**20


@dataclass(frozen=True)
class Reader:
    """How a file is altered and read; ``prepare`` makes what is needed once, in a folder."""

    name: str
    prepare: Callable[[Path], Callable[[Random], object]]
    short: int
    long: int
    most_seconds: float = MOST_SECONDS


READERS: list[Reader] = []


def reader(short: int, long: int, most_seconds: float = MOST_SECONDS) -> Callable[[Any], Any]:
    def register(prepare: Callable[[Path], Callable[[Random], object]]) -> Any:
        READERS.append(Reader(prepare.__name__, prepare, short, long, most_seconds))
        return prepare

    return register


RNG = np.random.default_rng(0)
CODES = {
    "mean": RNG.normal(size=(6, 3)).astype(np.float32),
    "logvar": -RNG.uniform(0.5, 3, size=(6, 3)).astype(np.float32),
    "test_mean": RNG.normal(size=(2, 3)).astype(np.float32),
    "test_logvar": -RNG.uniform(0.5, 3, size=(2, 3)).astype(np.float32),
    "labels": np.array([0, 1, 2, 0, 1, 2]),
}


def sound_codes(source: Path) -> None:
    from vaeq.posterior.codes import read_codes

    codes = read_codes(source)
    assert torch.isfinite(codes.mean).all()
    assert codes.mean.shape == codes.logvar.shape
    assert codes.labels is None or codes.labels.dtype == torch.int64


@reader(100, 15_000)
def codes_npz(folder: Path) -> Callable[[Random], object]:
    def read(rng: Random) -> None:
        (folder / "codes.npz").write_bytes(npz_bytes(CODES, rng))
        sound_codes(folder / "codes.npz")

    return read


@reader(100, 12_000)
def codes_npy(folder: Path) -> Callable[[Random], object]:
    def read(rng: Random) -> None:
        victim = rng.choice(list(CODES))
        for name, array in CODES.items():
            (folder / f"{name}.npy").write_bytes(npy_bytes(array, rng if name == victim else None))
        sound_codes(folder)

    return read


@reader(100, 15_000)
def codes_safetensors(folder: Path) -> Callable[[Random], object]:
    whole = save_arrays(CODES)

    def read(rng: Random) -> None:
        (folder / "codes.safetensors").write_bytes(altered_safetensors(whole, rng))
        sound_codes(folder / "codes.safetensors")

    return read


@reader(50, 5_000)
def codes_named(folder: Path) -> Callable[[Random], object]:
    from vaeq.posterior.codes import read_codes

    for name, array in CODES.items():
        np.save(folder / f"{name}.npy", array)
    words = (str(folder), "/", "mean.npy", "logvar.npy", ",", "*", "..", "\0", "x" * 300, " ",
             ".npz", ".safetensors", "\udcff", "~", "//", "/dev/null", "test_",
             "labels.npy")  # fmt: skip

    return lambda rng: read_codes(soup(words, rng, 6))


def whole_record(latent_dim: int = 2) -> dict[str, Any]:
    from tests.report_fixtures import DEFAULT_RUNS, config_of, estimates_of, record_of

    numbers = DEFAULT_RUNS[latent_dim]
    record = record_of(config_of(latent_dim, 0), estimates_of(latent_dim, numbers))
    record["estimates"] |= full_panel(latent_dim, numbers)
    record["curves"] = curves_of(latent_dim, numbers)
    record["history"] = history_of(numbers)
    return record


def altered_record(rng: Random, record: dict[str, Any]) -> bytes:
    if rng.random() < 0.15:
        return altered_bytes(json.dumps(record).encode(), rng)
    part = rng.choice(list(record)) if rng.random() < 0.7 else None
    if part is not None and isinstance(record[part], dict):
        # Deep parts would otherwise take most alterations, and the few settings none.
        text = altered_json(record[part], rng)
        rest = json.dumps({name: value for name, value in record.items() if name != part})
        return f'{rest[:-1]}, "{part}": {text}}}'.encode()
    return altered_json(record, rng).encode()


@reader(150, 20_000)
def record(folder: Path) -> Callable[[Random], object]:
    from vaeq.config import RunConfig
    from vaeq.runs.record import complete_record, read_record

    whole = {"seal": BLANK, **whole_record()}

    def read(rng: Random) -> None:
        (folder / "record.json").write_bytes(resealed(altered_record(rng, whole)))
        complete_record(folder, RunConfig())
        read_record(folder / "record.json")

    return read


@reader(60, 6_000)
def status(folder: Path) -> Callable[[Random], object]:
    from vaeq.report.runs import read_runs

    content = {"seal": BLANK, "state": "running", "epoch": 3, "epochs": 10,
               "updated_at": "2025-01-01T00:00:00",
               "failure": {"type": "OSError", "message": "disk full"}}  # fmt: skip
    (folder / "run").mkdir()

    def read(rng: Random) -> None:
        content["state"] = rng.choice(("running", "failed", "complete"))
        text = altered_json(content, rng).encode()
        text = altered_bytes(text, rng) if rng.random() < 0.3 else text
        (folder / "run" / "status.json").write_bytes(resealed(text))
        runs, excluded = read_runs([folder])
        assert not runs
        assert len(excluded) == 1
        assert excluded[0].reason.isprintable()
        assert len(excluded[0].reason) < 1000

    return read


def told(table: Any, excluded: Any, console: Console) -> list[str]:
    """Every text of a report but for its figures."""
    from vaeq.report.baseline import compare
    from vaeq.report.html import page
    from vaeq.report.latex import table_latex
    from vaeq.report.markdown import differences_markdown, table_markdown, verdict_markdown
    from vaeq.report.table import to_csv
    from vaeq.report.terminal import print_report
    from vaeq.report.verdict import judge

    verdict = judge([run for row in table.rows for run in row.runs])
    comparison = compare(table, table.rows[0].runs[0].name)
    print_report(console, table, verdict, excluded, comparison, "")
    return [
        page(table, verdict, excluded, [], {}, comparison, ""),
        table_markdown(table, excluded),
        differences_markdown(table, comparison),
        verdict_markdown(verdict),
        table_latex(table),
        to_csv(table),
    ]


@reader(25, 4_000)
def report_text(folder: Path) -> Callable[[Random], object]:
    from vaeq.report.runs import read_runs
    from vaeq.report.table import build_table

    full_sweep(folder, (2, 8), (1,), (0, 1), samples=0)
    victim = sorted(folder.iterdir())[0] / "record.json"
    whole = json.loads(victim.read_text()) | {"seal": BLANK}

    def read(rng: Random) -> None:
        victim.write_bytes(resealed(altered_record(rng, whole)))
        runs, excluded = read_runs([folder])
        assert len(runs) + len(excluded) == 4
        stream = io.StringIO()
        texts = told(build_table(runs), excluded, Console(file=stream, width=100))
        for text in (*texts, stream.getvalue()):
            text.encode()
            assert "\x1b" not in text
            assert "\0" not in text
        assert texts[0].count("<script") == 1

    return read


@reader(2, 400, most_seconds=30)
def report_figures(folder: Path) -> Callable[[Random], object]:
    from vaeq.report.figures import draw
    from vaeq.report.figures.drawing import files, svg
    from vaeq.report.runs import read_runs
    from vaeq.report.table import build_table

    for latent_dim in (2, 8):
        write_run(folder, latent_dim, full=True)
    victim = next(folder.glob("latent_dim=2*")) / "record.json"
    whole = json.loads(victim.read_text()) | {"seal": BLANK}

    def read(rng: Random) -> None:
        small = {name: whole[name] for name in ("per_dimension", "curves", "history", "estimates")}
        part = rng.choice(list(small))
        text = altered_json(small[part], rng)
        rest = json.dumps({name: value for name, value in whole.items() if name != part})
        victim.write_bytes(resealed(f'{rest[:-1]}, "{part}": {text}}}'.encode()))
        drawings, _ = draw(build_table(read_runs([folder])[0]))
        for drawing in drawings:
            for i, row in enumerate(drawing.rows):
                for j, panel in enumerate(row):
                    assert "<script" not in svg(panel, f"{i}-{j}")
        if drawings and rng.random() < 0.2:
            files(rng.choice(drawings))

    return read


@reader(60, 6_000)
def samples(folder: Path) -> Callable[[Random], object]:
    from vaeq.report.figures import FigureError
    from vaeq.report.figures.sources import read_samples
    from vaeq.report.runs import read_runs
    from vaeq.runs.record import SAMPLES

    directory = write_run(folder, 2, samples=40)
    whole = (directory / SAMPLES).read_bytes()
    (run,) = read_runs([folder])[0]

    def read(rng: Random) -> None:
        content = altered_safetensors(whole, rng)
        (directory / SAMPLES).write_bytes(content)
        try:
            found = read_samples(replace(run, files={SAMPLES: digest(content)}))
        except FigureError:
            return
        assert np.isfinite(found.z).all()
        assert found.z.shape[1] == 2

    return read


@reader(60, 6_000)
def pictures(folder: Path) -> Callable[[Random], object]:
    from vaeq.report.figures import FigureError
    from vaeq.report.figures.pictures import decoded_plane
    from vaeq.report.figures.pictures import samples as sheets
    from vaeq.report.runs import read_runs
    from vaeq.report.table import build_table
    from vaeq.runs.record import PICTURES

    directory = write_run(folder, 2)
    levels = np.arange(4 * 5 * 5, dtype=np.uint8).reshape(4, 5, 5)
    names = ("prior", "gmm", "plane", "originals", "reconstructions", "interpolations")
    whole = save_arrays(dict.fromkeys(names, levels), {"interpolation_steps": "2"})
    (run,) = read_runs([folder])[0]

    def read(rng: Random) -> None:
        content = altered_safetensors(whole, rng)
        (directory / PICTURES).write_bytes(content)
        table = build_table([replace(run, files={PICTURES: digest(content)})])
        for draw in (sheets, decoded_plane):
            try:
                drawing = draw(table)
            except FigureError:
                continue
            for row in drawing.rows:
                for panel in row:
                    assert panel.picture is not None
                    assert panel.picture.dtype == np.uint8

    return read


@reader(40, 6_000)
def checkpoint(folder: Path) -> Callable[[Random], object]:
    from vaeq.runs.record import CHECKPOINT
    from vaeq.training.checkpoint import load_checkpoint, save_checkpoint
    from vaeq.training.ensemble import Moments
    from vaeq.training.loop import HISTORY_COLUMNS

    state = fresh()
    weights = {name: torch.full_like(p, 0.5) for name, p in state.vae.named_parameters()}
    state.moments = Moments(7, weights, {name: p.clone() for name, p in weights.items()})
    state.best = {name: p.clone() for name, p in weights.items()}
    state.history = [dict.fromkeys(HISTORY_COLUMNS, 1.5), dict.fromkeys(HISTORY_COLUMNS, 2)]
    save_checkpoint(folder, state, "hash", final=False)
    whole = (folder / CHECKPOINT).read_bytes()
    (seal,) = re.findall(rb'"seal": ?"([0-9a-f]{64})"', whole)
    whole = whole.replace(seal, BLANK.encode())

    def read(rng: Random) -> None:
        (folder / CHECKPOINT).write_bytes(resealed(altered_safetensors(whole, rng)))
        found = fresh()
        load_checkpoint(folder, found, "hash")
        assert all(tuple(row) == HISTORY_COLUMNS for row in found.history)
        assert found.moments.step >= 0
        assert found.best is None or found.best.keys() == weights.keys()
        for part in (found.best or weights, found.moments.exp_avg or weights):
            assert all(part[name].shape == value.shape for name, value in weights.items())

    return read


def fresh() -> State:
    """A network so small that its file is mostly header."""
    depths = {"encoder_depth": 1, "decoder_depth": 1, "encoder_width": 3, "decoder_width": 3}
    generator = torch.Generator().manual_seed(0)
    return State(VAE(4, 2, **depths, activation="relu", generator=generator))


@reader(5, 1_000)
def classifier(folder: Path) -> Callable[[Random], object]:
    from safetensors.torch import save

    from vaeq.generation.classifier import _checksum, _Network, _read, _weights

    tensors = _weights(_Network())
    metadata = {"identity": "me", "accuracy": "0.9", "checksum": _checksum(tensors, 0.9)}
    whole = save(tensors, metadata)
    path = folder / "classifier.safetensors"

    def read(rng: Random) -> None:
        path.write_bytes(altered_safetensors(whole, rng))
        found = _read(path, "me", torch.device("cpu"))
        assert found is None or found.accuracy == 0.9

    return read


@reader(100, 12_000)
def mnist_gzip(folder: Path) -> Callable[[Random], object]:
    from vaeq.files.idx import read_idx

    values = bytes(range(24))
    good = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4) + values

    def read(rng: Random) -> None:
        content = altered_bytes(good, rng)
        if rng.random() < 0.5:
            content = gzip.compress(content)
            content = altered_bytes(content, rng) if rng.random() < 0.5 else content
        (folder / "images").write_bytes(content)
        found = read_idx(folder / "images")
        assert found.dtype == np.uint8

    return read


WORDS = (
    "latent_dim", "seed", "activation", "data", ".", "name", "marginal_kl", "==", "!=", "<", "<=",
    "in", "not", "and", "or", "(", ")", "[", "]", ",", "2", "8", "-", "'relu'", "1e999", "9" * 500,
    "null", "true", "None", "lambda:", "f'{seed}'", "__import__('os')", "**", "~", "if", "else",
    "=", "'\\ud800'", "\0", "\x1b[2J", "1j", "...", ":=", "await", "yield", "*", "{", "}", "'",
    "not " * 240, "-" * 900, "(" * 150, "a." * 400, "x" * 400, "\U0001f4a9", "0x", "1_0", "b'x'",
)  # fmt: skip


@reader(150, 15_000)
def where(folder: Path) -> Callable[[Random], object]:
    from vaeq.report.runs import read_runs
    from vaeq.report.where import filter_runs

    full_sweep(folder, (2, 8), (1,), (0, 1), samples=0)
    runs = read_runs([folder])[0]

    return lambda rng: filter_runs(runs, soup(WORDS, rng))


@reader(60, 6_000)
def baseline(folder: Path) -> Callable[[Random], object]:
    from vaeq.report.baseline import compare
    from vaeq.report.runs import read_runs
    from vaeq.report.table import build_table

    full_sweep(folder, (2, 8), (1,), (0, 1), samples=0)
    table = build_table(read_runs([folder])[0])
    words = (
        "latent_dim",
        "=",
        "2",
        "8",
        ",",
        "encoder_depth",
        "1",
        "seed",
        "-",
        "x" * 3000,
        *TEXTS,
    )

    def read(rng: Random) -> None:
        compare(table, soup(words, rng, 8))

    return read


@reader(40, 5_000)
def overrides(folder: Path) -> Callable[[Random], object]:
    from vaeq.compose import SCHEMAS, check_overrides
    from vaeq.config import keys_of

    keys = tuple(keys_of(SCHEMAS["sweep"]))
    words = (*keys, "=", "=", "=", ",", "+", "++", "~", "[", "]", "{", "}", ":", "'", '"', "\\",
             "${", "oc.env:HOME", "}", "(", ")", "range", "interval", "glob", "choice", "1", "-1",
             "1e9", "null", "nan", "inf", "../x", "@", "hydra", ".", "/", "[" * 300, "x" * 2000,
             *TEXTS)  # fmt: skip

    def read(rng: Random) -> None:
        argument = rng.choice(keys) + "=" if rng.random() < 0.6 else ""
        check_overrides(rng.choice(("train", "sweep", "report")), [argument + soup(words, rng, 6)])

    return read


def feed(reader: Reader, folder: Path, count: int) -> dict[str, float]:
    """Give a reader ``count`` altered inputs; what they took."""
    read = reader.prepare(folder)
    slowest = 0.0
    refused = 0
    began = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(START, START + count):
        start = time.perf_counter()
        try:
            read(Random(f"{reader.name} {number}"))
        except InputError as error:
            refused += 1
            said = str(error)
            assert said, f"input {number}: an error without a word"
            assert "\n" not in said, f"input {number}: {said!r}"
            assert len(said) < 3000, f"input {number}: {len(said)} characters"
        except BaseException as error:
            error.add_note(f"reader {reader.name}, input {number}")
            raise
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        assert seconds < reader.most_seconds, f"input {number}: {seconds:.1f} s"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < MOST_MEMORY, f"{grown / 2**20:.0f} MB more"
    return {
        "inputs": count,
        "refused": refused,
        "seconds": time.perf_counter() - began,
        "slowest": slowest,
        "megabytes": grown / 2**20,
    }


@pytest.mark.soak
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_reader_gives_a_result_or_its_clear_error(reader: Reader, tmp_path: Path) -> None:
    feed(reader, tmp_path, times(reader.short, reader.long))
