"""Estimate: what it accepts, how it is written, and that it survives JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaeq.estimate import Estimate

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(value=NUMBERS, std_error=st.none() | NUMBERS.map(abs), unit=st.text())
def test_survives_json(value: float, std_error: float | None, unit: str) -> None:
    estimate = Estimate(value, std_error, unit)
    assert Estimate.from_dict(json.loads(json.dumps(estimate.to_dict()))) == estimate


def test_missing_keeps_its_reason_and_has_no_number() -> None:
    estimate = Estimate.missing("nats", "no held-out codes")
    entry = {"value": None, "std_error": None, "unit": "nats", "reason": "no held-out codes"}
    assert estimate.to_dict() == entry
    assert Estimate.from_dict(entry) == estimate
    assert str(estimate) == "not available: no held-out codes"


def test_reason_is_left_out_where_there_is_none() -> None:
    assert Estimate(1.0, 0.0, "nats").to_dict() == {"value": 1.0, "std_error": 0.0, "unit": "nats"}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="value must be finite"):
        Estimate(number, 0.0, "nats")
    with pytest.raises(ValueError, match="std_error must be finite"):
        Estimate(0.0, number, "nats")


def test_a_negative_error_and_a_silent_gap_are_refused() -> None:
    with pytest.raises(ValueError, match="std_error must be >= 0"):
        Estimate(0.0, -1.0, "nats")
    with pytest.raises(ValueError, match="must say why"):
        Estimate(None, None, "nats")


def test_negative_estimates_are_kept() -> None:
    assert Estimate(-0.001, 0.002, "nats").value == -0.001


def test_prints_value_error_and_unit() -> None:
    assert str(Estimate(5.4987, 0.0123, "nats")) == "5.499 ± 0.012 nats"
    assert str(Estimate(8.0, 0.0, "dimensions")) == "8 dimensions"
