"""Aggregation over seeds against hand-computed numbers, and how numbers are written."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report_fixtures import estimate, write_json, write_run
from vaeq.errors import one_line
from vaeq.estimate import Estimate
from vaeq.report.markdown import table_markdown
from vaeq.report.runs import read_runs
from vaeq.report.table import Table, aggregate, build_table, to_csv
from vaeq.report.words import measured, number

FINITE = st.floats(-1e6, 1e6)


def table_of(folder: Path) -> Table:
    return build_table(read_runs([folder])[0])


def test_aggregate_by_hand() -> None:
    seeds = [Estimate(1.0, 0.3, "nats"), Estimate(2.0, 0.4, "nats"), Estimate(6.0, 0.0, "nats")]
    result = aggregate(seeds)
    assert result.mean == 3.0
    assert result.sd == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert result.n == 3
    assert result.mc_error == pytest.approx(0.5 / 3)


def test_one_seed_has_no_sd_and_no_seed_has_no_mean() -> None:
    one = aggregate([Estimate(1.5, 0.1, "nats")])
    assert (one.mean, one.sd, one.n, one.mc_error) == (1.5, None, 1, 0.1)
    none = aggregate([Estimate.missing("nats", "why")])
    assert (none.mean, none.sd, none.n, none.mc_error) == (None, None, 0, None)


def test_a_missing_value_is_left_out_not_zero() -> None:
    result = aggregate([Estimate(2.0, 0.1, "1"), Estimate.missing("1", "why")])
    assert (result.mean, result.n) == (2.0, 1)
    assert aggregate([Estimate(2.0, None, "1"), Estimate(1.0, 0.1, "1")]).mc_error is None


@given(st.lists(FINITE, min_size=2, max_size=6), st.permutations(range(6)))
def test_aggregate_knows_no_order(values: list[float], order: list[int]) -> None:
    estimates = [Estimate(value, abs(value), "nats") for value in values]
    shuffled = [estimates[i] for i in order if i < len(estimates)]
    a, b = aggregate(estimates), aggregate(shuffled)
    assert a.mean == pytest.approx(b.mean, rel=1e-12, abs=1e-9)
    assert a.sd == pytest.approx(b.sd, rel=1e-9, abs=1e-9)
    assert a.mc_error == pytest.approx(b.mc_error, rel=1e-12)


@pytest.mark.parametrize(
    ("mean", "sd", "mc_error", "expected"),
    [
        (0.33123, 0.0421, 0.0021, ("0.331", "0.042", "0.002")),
        (0.33123, None, 0.0021, ("0.3312", "—", "0.0021")),
        (0.00412, 0.0003, 0.0, ("0.00412", "0.00030", "")),
        (0.1042, None, 0.0, ("0.1042", "—", "")),
        (8.0, None, 0.0, ("8", "—", "")),
        (8.0, 0.0, 0.0, ("8", "0", "")),
        (-103.24, 1.7, 0.3, ("-103.2", "1.7", "0.3")),
        (5.0, 0.5, 0.0004, ("5.00", "0.50", "0.0004")),
        (5.0, 0.5, None, ("5.00", "0.50", "?")),
        (1234.0, 56.0, 0.0, ("1234", "56", "")),
        (0.0, 0.01, 0.0, ("0.000", "0.010", "")),
        (1e-9, 1e-10, 0.0, ("1.000e-09", "1e-10", "")),
    ],
)
def test_digits_fit_the_error(
    mean: float, sd: float | None, mc_error: float | None, expected: tuple[str, str, str]
) -> None:
    assert measured(mean, sd, mc_error) == expected


@given(FINITE, st.floats(1e-6, 1e3), st.floats(0, 1e3))
def test_written_numbers_are_off_by_less_than_a_tenth_of_the_error(
    mean: float, sd: float, mc_error: float
) -> None:
    text, sd_text, mc_text = measured(mean, sd, mc_error)
    assert abs(float(text) - mean) <= 0.1 * max(sd, mc_error)
    # A positive error is never written as nothing.
    assert float(sd_text) > 0
    assert mc_error == 0 or float(mc_text) > 0


@given(st.floats(-1e12, 1e12))
def test_number_keeps_its_digits(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=0.0051)


def test_text_from_files_cannot_act_on_a_terminal() -> None:
    assert one_line("a\x1b[31m\nb\udcff\u202e") == "a\\x1b[31m b\\udcff\\u202e"
    assert len(one_line("x" * 1000)) == 300


def test_seeds_are_aggregated_into_one_row_a_configuration(tmp_path: Path) -> None:
    kls = {2: [6.5, 6.6, 6.9], 8: [16.0, 16.4]}
    for latent_dim, values in kls.items():
        for seed, kl in enumerate(values):
            write_run(tmp_path, latent_dim, seed, {"kl": kl})
    table = table_of(tmp_path)
    assert table.varying == ("latent_dim",)
    assert table.constant["encoder_depth"] == 2
    assert table.constant["data.name"] == "mnist"
    assert not {"seed", "device", "experiment", "data.root"} & set(table.constant)
    assert [row.settings["latent_dim"] for row in table.rows] == [2, 8]
    for row, values in zip(table.rows, kls.values(), strict=True):
        a = row.metrics["kl_per_image"]
        assert a.mean == pytest.approx(fmean(values))
        assert a.sd == pytest.approx(stdev(values))
        assert a.n == len(values)
        marginal = row.metrics["marginal_kl"]
        assert marginal.mc_error == pytest.approx(0.011 / math.sqrt(len(values)))


def test_csv_has_everything_to_the_last_digit(tmp_path: Path) -> None:
    for seed, kl in enumerate((6.5, 1 / 3)):
        write_run(tmp_path, 2, seed, {"kl": kl})
    write_run(tmp_path, 8)
    table = table_of(tmp_path)
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [row["latent_dim"] for row in rows] == ["2", "8"]
    assert (rows[0]["n"], rows[0]["seeds"], rows[0]["learning_rate"]) == ("2", "0 1", "0.001")
    assert float(rows[0]["kl_per_image_mean [nats]"]) == (6.5 + 1 / 3) / 2
    assert float(rows[0]["kl_per_image_sd [nats]"]) == stdev((6.5, 1 / 3))
    assert float(rows[0]["kl_per_image_mc_error [nats]"]) == 0.0
    assert rows[0]["kl_per_image_n"] == "2"
    assert rows[1]["kl_per_image_sd [nats]"] == ""  # undefined with one seed, not 0
    for metric in table.metrics:
        unit = table.heading(metric)[len(metric) :]
        for part in ("mean", "sd", "mc_error"):
            assert f"{metric}_{part}{unit}" in rows[0]


def test_missing_numbers_are_said_to_be_missing_and_why(tmp_path: Path) -> None:
    write_run(tmp_path, 2, numbers={"active": 0})
    directory = write_run(tmp_path, 8)
    record = json.loads((directory / "record.json").read_text())
    del record["estimates"]["moment_kl"]
    for end in ("lower", "upper"):
        missing = estimate(None, None, "nats", "no held-out codes")
        record["estimates"][f"population_kl_{end}"] = missing
    record["estimates"]["elbo"]["unit"] = "bits"
    write_json(directory / "record.json", record)
    table = table_of(tmp_path)
    assert table.rows[0].metrics["dimension_kl_mean_active"].mean is None
    assert table.cell(table.rows[0], "dimension_kl_mean_active") == "n/a"
    text = "\n".join(table.missing)
    assert "dimension_kl_mean_active: n/a in 1 of 2 runs: no dimension is active" in text
    assert "moment_kl: n/a in 1 of 2 runs: not in the record" in text
    assert "population_kl_lower, population_kl_upper: n/a in 1 of 2 runs: no held-out" in text
    assert "elbo: left out in 1 of 2 runs" in text
    assert all(reason in table_markdown(table, []) for reason in table.missing)


def test_settings_that_differ_make_rows_and_columns(tmp_path: Path) -> None:
    write_run(tmp_path, 8, encoder_depth=3)
    write_run(tmp_path, 8, encoder_depth=1)
    write_run(tmp_path, 8, encoder_depth=1, activation="tanh")
    write_run(tmp_path, 2, kl_warmup_epochs=3)
    table = table_of(tmp_path)
    assert table.varying[:2] == ("latent_dim", "encoder_depth")
    assert set(table.varying[2:]) == {"activation", "kl_warmup_epochs"}
    found = [(row.settings["latent_dim"], row.settings["encoder_depth"]) for row in table.rows]
    assert found == [(2, 2), (8, 1), (8, 1), (8, 3)]


def test_markdown_is_one_row_a_configuration_and_takes_names_literally(tmp_path: Path) -> None:
    write_run(tmp_path, 2, activation="a|b<i>*")
    write_run(tmp_path, 8, activation="[x](y)")
    lines = table_markdown(table_of(tmp_path), []).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 4  # header, rule, two configurations
    assert "marginal_kl [nats]" in rows[0]
    assert "a\\|b\\<i>\\*" in rows[2]
    assert "[x\\](y)" in rows[3]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
