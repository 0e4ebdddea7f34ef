"""Independent seeds for the many purposes of one run."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """An independent 63-bit seed for each purpose of a run, from SHA-256.

    Consecutive seeds and epochs must not give related streams, as seed + epoch would.
    """
    text = ":".join(str(word) for word in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
