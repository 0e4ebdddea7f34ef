"""IDX files: the values of good ones, one sentence for others, memory for what is there alone."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vaeq
from tests.soak import times
from vaeq.data.mnist import MNIST_FILES
from vaeq.errors import InputError
from vaeq.files.idx import read_idx

MNIST = Path(vaeq.__file__).parent / "mnist"


def idx_bytes(shape: tuple[int, ...], values: bytes, kind: int = 8) -> bytes:
    """An IDX file that says ``shape``, whatever it holds."""
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values


VALUES = bytes(range(2 * 3 * 4))
GOOD = idx_bytes((2, 3, 4), VALUES)


@pytest.mark.parametrize("name", MNIST_FILES)
def test_mnist_is_read(name: str) -> None:
    found = read_idx(MNIST / f"{name}.gz")
    shape = MNIST_FILES[name][1]
    assert found.shape == shape
    assert found.dtype == np.uint8
    unpacked = gzip.decompress((MNIST / f"{name}.gz").read_bytes())
    assert found.tobytes() == unpacked[4 + 4 * len(shape) :]


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4), (2, 3, 2, 2)])
def test_plain_and_gzip_are_told_apart_by_their_bytes(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    content = idx_bytes(shape, VALUES)
    for name, stored in (("plain.gz", content), ("packed", gzip.compress(content))):
        (tmp_path / name).write_bytes(stored)
        found = read_idx(str(tmp_path / name))
        assert np.array_equal(found, np.arange(24, dtype=np.uint8).reshape(shape))
        found[0] = 0  # it is the caller's own


def test_a_gzip_file_of_several_members_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(gzip.compress(GOOD[:9]) + gzip.compress(GOOD[9:]))
    assert read_idx(tmp_path / "file").tobytes() == VALUES


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no IDX file: .* got an empty file"),
        (b"\0\0\x08", "is no IDX file: it must begin with 00 00 08 .* got 00 00 08"),
        (b"PK\x03\x04" + bytes(100), "is no IDX file: .* got 50 4b 03 04"),
        (b"\0\0\x07\x01" + bytes(8), "is no IDX file"),
        (idx_bytes((2,), bytes(8), kind=0x0C), "must hold unsigned bytes, 0 to 255, got int32"),
        (idx_bytes((2,), bytes(16), kind=0x0E), "must hold unsigned bytes, 0 to 255, got float64"),
        (idx_bytes((), b"\1"), "must have 1 to 4 dimensions .* got 0"),
        (idx_bytes((1,) * 5, b"\1"), "must have 1 to 4 dimensions .* got 5"),
        (idx_bytes((1,) * 255, b"\1"), "must have 1 to 4 dimensions .* got 255"),
        (GOOD[:10], "ends within its header"),
        (GOOD[:-1], "promises 2 x 3 x 4 values in its header and holds 23; restore"),
        (GOOD[:16], "promises 2 x 3 x 4 values in its header and holds 0; restore"),
        (GOOD + b"\0", "promises 2 x 3 x 4 values in its header and holds (25|more); restore"),
        (idx_bytes((0, 28, 28), b""), "promises 0 x 28 x 28 values in its header, which are none"),
        (idx_bytes((2**30, 2**30), b"\1"), "promises 1073741824 x 1073741824 .* that are read"),
        (idx_bytes((2**32 - 1,) * 4, b"\1"), "promises 4294967295 x .* that are read"),
        (idx_bytes((2**27,), b"\1"), "promises 134217728 values .*(holds 1;|100 times its)"),
    ],
)
def test_what_is_wrong_is_said_plain_and_packed(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    for stored in (content, gzip.compress(content)):
        (tmp_path / "images").write_bytes(stored)
        with pytest.raises(InputError, match=rf"^\S*/images {sentence}") as error:
            read_idx(tmp_path / "images")
        assert "\n" not in str(error.value)


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(GOOD))
    cut = bytes(whole[:-9])
    altered = bytes(whole[:-8]) + bytes([whole[-8] ^ 1]) + bytes(whole[-7:])  # the checksum
    for broken in (whole[:2], whole[:12], cut, altered, bytes(whole) + b"more"):
        (tmp_path / "images").write_bytes(broken)
        with pytest.raises(InputError, match=r"images is a damaged gzip file \(.*\); restore it"):
            read_idx(tmp_path / "images")


def test_what_is_no_file_is_said_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody will ever write into it
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, sentence in (
        ("none", "none does not exist"),
        ("", "is no regular file"),
        ("pipe", "pipe is no regular file"),
        ("loop", "loop does not exist"),
        ("x" * 5000, "cannot be read: File name too long"),
        ("a\nb\x1b[2Jc", r"a b\\x1b\[2Jc does not exist"),
        ("nul\0", r"nul\\x00 does not exist"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_idx(tmp_path / name)
    with pytest.raises(InputError, match="/dev/zero is no regular file"):
        read_idx("/dev/zero")


def peak_of(path: Path) -> int:
    """The most bytes of memory that refusing a file takes."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            read_idx(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_that_lies_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "images"
    for shape in ((2**30, 2**30), (2**32 - 1,) * 4, (2**31,), (10**6, 28, 28)):
        for content in (idx_bytes(shape, bytes(1000)), gzip.compress(idx_bytes(shape, b"\1" * 99))):
            path.write_bytes(content)
            assert peak_of(path) < 2**20
    # A file of holes, as large as it promises: 8 GiB that take no room on the disk.
    path.write_bytes(idx_bytes((2**23, 1024), b""))
    os.truncate(path, 12 + 2**33)
    assert peak_of(path) < 2**20


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "images"
    size = 256 * 2**20
    zeros = gzip.compress(bytes(2**20)) * 256
    for promised in (1000, size):  # more than it says, and as much as it says
        path.write_bytes(gzip.compress(idx_bytes((promised,), b"")) + zeros)
        assert path.stat().st_size < size // 100
        assert peak_of(path) < 4 * 2**20


def test_sorted_labels_may_shrink_to_a_thousandth(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(10, dtype=np.uint8), 100_000)
    (tmp_path / "labels").write_bytes(gzip.compress(idx_bytes((1_000_000,), labels.tobytes())))
    assert (tmp_path / "labels").stat().st_size < 10_000
    assert np.array_equal(read_idx(tmp_path / "labels"), labels)


KINDS = st.sampled_from(["set", "cut", "add", "header"])
EDITS = st.lists(
    st.tuples(KINDS, st.integers(0, 2**32), st.binary(max_size=8)), min_size=1, max_size=4
)


def edited(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """A file after bytes of it were overwritten, cut off, inserted, or a size in it replaced."""
    for kind, number, piece in edits:
        at = number % (len(content) + 1)
        if kind == "set":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "add":
            content = content[:at] + piece + content[at:]
        else:
            at = 4 + 4 * (number % 3)
            content = content[:at] + struct.pack(">I", number % 2**32) + content[at + 4 :]
    return content


@pytest.mark.soak
@settings(
    max_examples=times(200, 20_000),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(before=EDITS, after=EDITS, packed=st.booleans(), twice=st.booleans())
def test_an_altered_file_is_read_as_it_is_or_refused(
    tmp_path: Path,
    before: list[tuple[str, int, bytes]],
    after: list[tuple[str, int, bytes]],
    packed: bool,
    twice: bool,
) -> None:
    content = edited(GOOD, before)
    if packed:
        content = gzip.compress(content)
        content = edited(content, after) if twice else content
    path = tmp_path / "images"
    path.write_bytes(content)
    found, refusal = None, ""
    tracemalloc.start()
    try:
        found = read_idx(path)
    except InputError as error:
        refusal = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 65 * 2**20
    if found is None:
        assert refusal.startswith(str(path))
        return
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    assert found.shape == struct.unpack_from(f">{plain[3]}I", plain, 4)
    assert found.tobytes() == plain[4 + 4 * plain[3] :]
