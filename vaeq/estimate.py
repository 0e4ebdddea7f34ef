"""An estimate: a value, its Monte Carlo standard error and its unit, or why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """One measured number.

    ``std_error`` is Monte Carlo error only and is 0.0 for a deterministic quantity. A number that
    cannot be had has ``value=None`` and a ``reason``; it is never replaced by 0 and never clamped.
    """

    value: float | None
    std_error: float | None
    unit: str
    reason: str | None = None

    def __post_init__(self) -> None:
        for field in ("value", "std_error"):
            number = getattr(self, field)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{field} must be finite or None, got {number}")
        if self.std_error is not None and self.std_error < 0:
            raise ValueError(f"std_error must be >= 0, got {self.std_error}")
        if self.value is None and not self.reason:
            raise ValueError("an estimate without a value must say why: reason is empty")

    @classmethod
    def missing(cls, unit: str, reason: str) -> Estimate:
        """A number that could not be had, and why."""
        return cls(None, None, unit, reason)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Estimate:
        """The inverse of :meth:`to_dict`."""
        return cls(entry["value"], entry["std_error"], entry["unit"], entry.get("reason"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``reason`` only where there is one."""
        entry: dict[str, Any] = {
            "value": self.value,
            "std_error": self.std_error,
            "unit": self.unit,
        }
        if self.reason is not None:
            entry["reason"] = self.reason
        return entry

    def __str__(self) -> str:
        if self.value is None:
            return f"not available: {self.reason}"
        if not self.std_error:
            return f"{self.value:.4g} {self.unit}"
        return f"{self.value:.4g} ± {self.std_error:.2g} {self.unit}"
