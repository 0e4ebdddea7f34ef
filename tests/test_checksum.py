"""Sealed files: no byte of them changes unnoticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from vaeq.files.checksum import (
    BLANK,
    DamagedFile,
    check_seal,
    digest,
    file_digest,
    is_sealed,
    sealed,
)

OWNER = "c0ffee" * 10 + "0123"
FORMATS = {
    "json": json.dumps({"seal": BLANK, "owner": OWNER, "value": 1.25}, indent=1).encode(),
    "yaml": f"# seal: {BLANK}\n# owner: {OWNER}\nlatent_dim: 2\n".encode(),
    "safetensors": save({}, {"value": "1.25", "owner": OWNER, "seal": BLANK}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_bit_is_covered_in_every_format(kind: str) -> None:
    whole = sealed(FORMATS[kind])
    assert len(whole) == len(FORMATS[kind])
    check_seal(whole, OWNER)
    for i in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[i] ^= 1 << bit
            with pytest.raises(DamagedFile, match="is damaged"):
                check_seal(bytes(changed))
        with pytest.raises(DamagedFile, match=r"is damaged|is empty"):
            check_seal(whole[:i])
        with pytest.raises(DamagedFile, match="is damaged"):
            check_seal(whole + whole[: i + 1])


def test_the_checksum_is_what_the_docstring_says() -> None:
    content = FORMATS["json"]
    assert json.loads(sealed(content))["seal"] == hashlib.sha256(content).hexdigest()


def test_a_sound_file_of_somebody_else_is_refused() -> None:
    with pytest.raises(DamagedFile, match="belongs to another run"):
        check_seal(sealed(FORMATS["yaml"]), "d" * 64)


@given(st.text() | st.just(f'"seal": "{BLANK}"') | st.just('\\"seal": "' + "1" * 64))
@settings(deadline=None)
def test_a_text_inside_a_file_does_not_pass_for_its_checksum(text: str) -> None:
    # In a file of ours the seal stands first; here the text does, to be worse.
    whole = sealed(json.dumps({"text": text, "seal": BLANK}).encode())
    found = json.loads(whole)
    assert found["text"] == text
    assert found["seal"] != BLANK
    check_seal(whole)


def test_a_file_without_a_checksum_is_no_sealed_one() -> None:
    for content in (b"", b"{}", b'{"seal": null}', b'{"seal": "' + b"F" * 64 + b'"}'):
        assert not is_sealed(content)
        with pytest.raises(DamagedFile):
            check_seal(content)


def test_digests_of_texts_bytes_and_files_are_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("né" * 100_000)
    assert file_digest(tmp_path / "f") == digest("né" * 100_000)
    assert digest("né") == digest("né".encode()) == hashlib.sha256("né".encode()).hexdigest()
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "g")
