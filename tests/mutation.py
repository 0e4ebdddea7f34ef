"""Files as somebody careless or malicious would write them: valid ones, altered where it counts.

Bytes alone seldom get past a magic number or a JSON parser. These alterations know the structure of
what they alter: a key, a size in a header, the name of an array, a number that no float holds.
"""

from __future__ import annotations

import io
import json
import math
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from random import Random
from typing import Any

import numpy as np

from vaeq.files.checksum import sealed

SCRIPT = "<script>alert(1)</script>"


class Raw(str):
    """JSON text that stands for itself: what no JSON writer writes."""


TEXTS = (
    "", " ", "x" * 10_000, "\0", "\ud800", "\x1b[2J\x1b]0;owned\x07", SCRIPT, "a\nb\r\nc", "=1+1",
    "@SUM(A1)", "$x_2^{", "\U0001f4a9", "\u202egnp.exe", "../../up", "/etc/passwd", "a|b`c`*d*_e_",
    "[x](http://evil.example)", "\\input{/etc/passwd}", "nan", "%s%n",
    "{{7*7}}", "&amp;&#x3c;", "-",
)  # fmt: skip
ODD = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**53 + 1, 2**63, -(2**63), 10**400, -(10**400), 0.0,
    -0.0, 0.5, 1e16, 1e39, 1e99, -1e99, 1e154, 1e308, -1e308, 5e-324, 1e-200, Raw("NaN"),
    Raw("1e999"), Raw("-Infinity"), Raw("9" * 4301), Raw("1" + "0" * 4000),
    Raw("[" * 3000 + "]" * 3000), Raw('{"a":' * 400 + "1" + "}" * 400), [], {}, [None], [[]],
    ["x"], [1], [0.0, 1e308], {"": ""}, {"a": {"b": [1]}}, [True] * 3, list(range(300)),
    [[0.5] * 4] * 3, *TEXTS,
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
SIZES = (-1, 0, 1, 2, 5, 7, 10**6, 2**31, 2**40, 2**60, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)


def altered_bytes(content: bytes, rng: Random) -> bytes:
    """One to four alterations without regard to what the bytes mean."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + rng.randint(1, 16)]
            case 2:
                data[at:at] = rng.randbytes(rng.randint(1, 16))
            case 3:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 4 if len(data):
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 5:
                form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
                number = rng.choice(NUMBERS) & (2 ** (8 * struct.calcsize(form)) - 1)
                data[at : at + struct.calcsize(form)] = struct.pack(form, number)
            case 6:
                start = rng.randrange(len(data) + 1)
                data[at:at] = data[start : start + rng.randint(1, 64)]
    return bytes(data)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index into it."""
    found = []
    stack = [value]
    while stack:
        each = stack.pop()
        inside = each.items() if isinstance(each, dict) else enumerate(each)
        for key, child in inside:
            found.append((each, key))
            if isinstance(child, dict | list):
                stack.append(child)
    return found


def altered_json(value: Any, rng: Random) -> str:
    """JSON text of ``value``, one to three of its entries replaced, removed, renamed or added."""
    value = deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = _places(value)
        if not places:
            break
        # Every part alike: otherwise a list of a thousand numbers takes all the alterations.
        container = rng.choice(list({id(c): c for c, _ in places}.values()))
        key = rng.choice([k for c, k in places if c is container])
        odd = deepcopy(rng.choice(ODD))
        match rng.randrange(7):
            case 0 | 1 | 2:
                container[key] = odd
            case 3:
                del container[key]
            case 4 if isinstance(container, dict):
                container[rng.choice(TEXTS)] = container.pop(key) if rng.random() < 0.5 else odd
            case 5 if isinstance(container[key], dict | list):
                container[key] = type(container[key])()
            case 5 if isinstance(container[key], int | float):
                container[key] = rng.choice((-1, 0, 0.5, 2, 1e-9, 1e9, 1e99)) * container[key]
            case 6 if isinstance(container, list):
                container.extend(deepcopy(container[: rng.randint(1, 4)]) * rng.randint(1, 3))
    return json_text(value)


def json_text(value: Any) -> str:
    """JSON, with the text of every :class:`Raw`, NaN and lone surrogates as they are."""
    raw: list[str] = []

    def marked(each: Any) -> Any:
        if isinstance(each, Raw):
            raw.append(each)
            return f"@RAW{len(raw) - 1}@"
        if isinstance(each, dict):
            return {key: marked(item) for key, item in each.items()}
        if isinstance(each, list):
            return [marked(item) for item in each]
        return each

    text = json.dumps(marked(value))
    for i, each in enumerate(raw):
        text = text.replace(f'"@RAW{i}@"', each)
    return text


def resealed(content: bytes) -> bytes:
    """The content under a checksum of its own: whoever forges a file forges that as well."""
    try:
        return sealed(content)
    except AssertionError:
        return content


DTYPES = ("F32", "F64", "F16", "BF16", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL",
          "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "X1", "", 3)  # fmt: skip


def safetensors_bytes(header: Mapping[str, Any], data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with whatever header."""
    text = json_text(dict(header)).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def altered_safetensors(content: bytes, rng: Random) -> bytes:
    """A header that lies about a dtype, a shape, a place, a name or itself; now and then bytes."""
    if rng.random() < 0.15:
        return altered_bytes(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(header) or ["x"])
        entry = header.get(name)
        match rng.randrange(9):
            case 0 if isinstance(entry, dict) and "dtype" in entry:
                entry["dtype"] = rng.choice(DTYPES)
            case 1 if isinstance(entry, dict) and entry.get("shape"):
                entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(SIZES)
            case 2 if isinstance(entry, dict) and "shape" in entry:
                entry["shape"] = rng.choice(
                    ([], [0], [2**62, 0], [0, 2**63], [1] * 70, [7], [3, 2, 1])
                )
            case 3 if isinstance(entry, dict) and "data_offsets" in entry:
                entry["data_offsets"][rng.randrange(2)] = rng.choice(SIZES)
            case 4:
                header[rng.choice((*header, *TEXTS, "mean", "std", "labels"))] = header.pop(
                    name, None
                )
            case 5:
                header.pop(name, None)
            case 6:
                metadata = header.setdefault("__metadata__", {})
                if isinstance(metadata, dict):
                    odd = rng.choice(ODD)
                    keys = (*metadata, "interpolation_steps", "history", "x")
                    metadata[rng.choice(keys)] = json_text(odd) if rng.random() < 0.7 else odd
            case 7 if isinstance(entry, dict) and "data_offsets" in entry:
                _retyped(entry, rng)
            case 8:
                data = altered_bytes(data, rng) if rng.random() < 0.5 else _odd_floats(data, rng)
    length = rng.choice(SIZES[1:-2]) if rng.random() < 0.03 else None
    return safetensors_bytes(header, data, length)


def _retyped(entry: dict[str, Any], rng: Random) -> None:
    """Another dtype or shape of as many bytes: what a checker of sizes lets pass."""
    start, end = entry["data_offsets"]
    if not isinstance(start, int) or not isinstance(end, int):
        return
    dtype, width = rng.choice((("F64", 8), ("F16", 2), ("BF16", 2), ("I8", 1), ("U16", 2),
                               ("U64", 8), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1),
                               ("F8_E8M0", 1), ("C64", 8), ("F32", 4)))  # fmt: skip
    count = (end - start) // width
    entry["dtype"] = dtype
    parts = rng.choice(((), (1,), (2,), (3,), (5,), (1, 1), (5, 1), (2, 5), (1, 1, 1)))
    shape = [count // max(1, math.prod(parts)), *parts]
    entry["shape"] = rng.sample(shape, len(shape))


def _odd_floats(data: bytes, rng: Random) -> bytes:
    """Some number replaced by one that is legal and not expected."""
    content = bytearray(data)
    odd = rng.choice((0.0, -0.0, 1e-45, 1e9, 3e38, -3e38, float("nan"), float("inf"), 81.0))
    for _ in range(rng.randint(1, 3)):
        if len(content) >= 4:
            at = rng.randrange(len(content) // 4) * 4
            content[at : at + 4] = struct.pack("<f", odd)
    return bytes(content)


DESCRIPTIONS = (
    "'<f4'", "'<f8'", "'<f2'", "'>f8'", "'<f16'", "'<c8'", "'|O'", "'|O8'", "'<U5'",
    "'|S1000000000'",
    "'|V8'", "'<M8[ns]'", "'<i8'", "'|b1'", "'<u8'", "'|S0'", "[('a', '<f4')]", "('<f4', (3,))",
    "('<f4', (2**31,))", "[('a', '|O')]", "None", "3", "''", "'f'", "'<f4,<f4'", "'a5'", "{}",
    "[('a', [('b', '<f4')])]", "'<f99'", "__import__('os')", "[" * 300 + "]" * 300,
    "-" * 2000 + "1",
)  # fmt: skip
SHAPES = (
    "(6, 3)", "(3, 6)", "(18,)", "()", "(0, 3)", "(6, 0)", "(0, 4611686018427387904)", "(-1, 3)",
    "(-1,)", "(-6, -3)", "(True, 3)", "(6, 3, 1)", "(6.0, 3)", "(1099511627776, 1024)",
    "(4294967296, 4294967296)", "(268435456,)", "(18446744073709551616,)", "6", "[6, 3]", "'6'",
    "((6,), 3)", "(2**40,)", "None",
)  # fmt: skip


def npy_bytes(array: np.ndarray, rng: Random | None = None) -> bytes:
    """A .npy file of the array; with an ``rng`` its header may lie."""
    stream = io.BytesIO()
    np.save(stream, array)
    content = stream.getvalue()
    if rng is None:
        return content
    if rng.random() < 0.2:
        return altered_bytes(content, rng)
    size = struct.unpack("<H", content[8:10])[0]
    data = content[10 + size :]
    description, shape, order = repr(array.dtype.str), repr(array.shape), "False"
    for _ in range(rng.randint(1, 2)):
        match rng.randrange(5):
            case 0:
                description = rng.choice(DESCRIPTIONS)
            case 1 | 2:
                shape = rng.choice(SHAPES)
            case 3:
                order = rng.choice(("True", "False", "0", "'x'", "None"))
            case 4:
                data = altered_bytes(data, rng) if rng.random() < 0.5 else _odd_floats(data, rng)
    text = f"{{'descr': {description}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if rng.random() < 0.05:
        text = rng.choice(("", "{}", "{'descr': '<f4'}", "(" * 500, text * 2, text + " " * 20_000))
    version = rng.choice((1, 1, 1, 2, 3, 9))
    encoded = text.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", min(len(encoded), 65535))
    return b"\x93NUMPY" + bytes([version, 0]) + length + encoded + data


def npz_bytes(arrays: Mapping[str, np.ndarray], rng: Random) -> bytes:
    """A .npz file with lying arrays, odd names, doubled entries, or damage to the archive."""
    stream = io.BytesIO()
    victim = rng.choice(list(arrays))
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, array in arrays.items():
            if name == victim and rng.random() < 0.05:
                continue
            content = npy_bytes(array, rng if name == victim and rng.random() < 0.7 else None)
            entry = f"{name}.npy"
            if name == victim and rng.random() < 0.2:
                entry = rng.choice((name, f"../{name}.npy", f"/{name}.npy", "x.npy", "mean.npy",
                                    f"{name}.npy/", "\x1b[2J.npy", "", f"{name}.txt"))  # fmt: skip
            packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
            packing = zipfile.ZIP_BZIP2 if rng.random() < 0.02 else packing
            archive.writestr(zipfile.ZipInfo(entry or "empty"), content, packing)
    content = stream.getvalue()
    return altered_bytes(content, rng) if rng.random() < 0.5 else content


def soup(words: tuple[str, ...], rng: Random, most: int = 12) -> str:
    """Words of a small language in no order, with glue of its own."""
    glue = rng.choice(("", " ", " ", ","))
    return glue.join(rng.choice(words) for _ in range(rng.randint(0, most)))


Alteration = Callable[[Random], bytes]
