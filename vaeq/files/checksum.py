"""SHA-256 of files: of those that a record lists, and of those that carry their own.

A sealed file holds, in a field named ``seal``, the SHA-256 of all its bytes with 64 zeros in that
field's place: none of them can change unnoticed, whatever the format. The field is a key of a JSON
object, an entry of a safetensors header, or a comment in YAML. It guards against bad disks, broken
copies and mix-ups, not against somebody who means to forge a result.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from vaeq.errors import InputError

# The value of the field before the file is sealed.
BLANK = "0" * 64
# The first match counts. Inside a JSON string the quotes would be escaped, and not match.
_FIELD = re.compile(rb'(?:"seal": ?"|# seal: )([0-9a-f]{64})')


class DamagedFile(InputError):
    """The bytes of a file are not those that were written, or are another run's."""


class UnreadableFile(InputError):
    """The system does not hand a file out, whatever is in it."""


def digest(content: bytes | str) -> str:
    """SHA-256 (hex) of the content of a file."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file of any size.

    Raises:
        OSError: it does not exist or cannot be read.
    """
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed(content: bytes) -> bytes:
    """The content of a file with its checksum in the place of BLANK."""
    field = _FIELD.search(content)
    assert field is not None
    assert field[1] == BLANK.encode()
    return content[: field.start(1)] + digest(content).encode() + content[field.end(1) :]


def is_sealed(content: bytes) -> bool:
    """Does the file carry a checksum, right or wrong?"""
    return _FIELD.search(content) is not None


def check_seal(content: bytes, owner: str = "") -> None:
    """Raise DamagedFile if a file is not what was sealed; the text leaves its name to the caller.

    Args:
        owner: a text that it must hold, the hash of the configuration it is of.
    """
    if not content:
        raise DamagedFile("is empty: truncated or overwritten")
    field = _FIELD.search(content)
    if field is None:
        raise DamagedFile("is damaged: it has no checksum of its own")
    view = memoryview(content)
    found = hashlib.sha256(view[: field.start(1)])
    found.update(BLANK.encode())
    found.update(view[field.end(1) :])
    if found.hexdigest() != field[1].decode():
        raise DamagedFile("is damaged: it does not match its own checksum")
    if owner.encode() not in content:
        raise DamagedFile("belongs to another run")
