"""The verdict on synthetic sweeps whose answer is known, in every category."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.report_fixtures import LOG_N, default_sweep, estimate, write_json, write_run
from vaeq.report.claims import FactorVerdict
from vaeq.report.markdown import verdict_markdown
from vaeq.report.outcomes import common_levels
from vaeq.report.runs import read_runs
from vaeq.report.trend import PAGE, PAIRED_T, SIGNS, STEPS, smallest_rank_p
from vaeq.report.verdict import Verdict, judge


def verdict_of(folder: Path) -> Verdict:
    return judge(read_runs([folder])[0])


def dimensions_of(folder: Path) -> FactorVerdict:
    return verdict_of(folder).claims[0].factors[0]


def notes_of(verdict: FactorVerdict) -> str:
    return "\n".join(verdict.notes)


# Unsaturated numbers by latent_dim: (dimension_kl_mean, kl_per_image, mutual_information).
RISING = {2: (0.1, 6.0, 5.7), 3: (0.05, 7.0, 6.0), 4: (0.02, 8.5, 6.2)}
FALLING = {2: (0.02, 8.5, 6.2), 3: (0.05, 7.0, 6.0), 4: (0.1, 6.0, 5.7)}


def sweep(
    folder: Path,
    levels: Mapping[int, tuple[float, float, float]],
    seeds: Sequence[int] = (0,),
    noise: float = 0.0,
    **settings: Any,
) -> None:
    rng = random.Random(str((sorted(levels), settings)))
    for seed in seeds:
        for latent_dim, (dim, kl, mi) in levels.items():
            factor = 1 + noise * rng.uniform(-1, 1)
            numbers = {"dim": dim * factor, "kl": kl, "mi": kl - (kl - mi) * factor}
            write_run(folder, latent_dim, seed, numbers | {"active": latent_dim}, **settings)


def test_default_sweep_closer_by_dimension_not_jointly(tmp_path: Path) -> None:
    verdict = verdict_of(default_sweep(tmp_path))
    factor = verdict.claims[0].factors[0]
    assert factor.levels == (2, 8, 32)
    answers = {outcome.metric: outcome.answer for outcome in factor.outcomes}
    assert answers == {
        "dimension_kl_mean": "closer",
        "dimension_kl_mean_active": "closer",
        "dimension_kl_max": "closer",
        "dimension_kl_sum": "no clear change",
        "total_correlation": "saturated",
        "moment_kl": "further",
        "marginal_kl": "saturated",
        "kl_per_image": "further",
    }
    joint = factor.outcome("marginal_kl")
    assert joint.answer_text() == "saturated, further"
    assert joint.first == pytest.approx(0.331, abs=1e-3)
    assert joint.last == pytest.approx(8.05, abs=1e-2)
    assert factor.outcome("dimension_kl_mean").effect_text() == "0.104 → 0.00412"
    notes = notes_of(factor)
    assert "Saturated from latent_dim=8 on" in notes
    assert "kl_per_image − log N" in notes
    assert "60,000" in notes
    assert "KL(q_N‖p) itself is not closer" in notes
    assert "One seed: the error is Monte Carlo only; seed-to-seed spread is not in it." in notes
    assert "21 of 32 active at latent_dim=32" in notes
    assert "smallest attainable two-sided p-value is 0.33" in notes


def test_default_sweep_bottom_line(tmp_path: Path) -> None:
    verdict = verdict_of(default_sweep(tmp_path))
    dimension, joint, encoder = verdict.bottom_line
    assert dimension.startswith("One dimension at a time, claim 1 is confirmed (one seed)")
    assert "0.104 nats at latent_dim=2 to 0.00412 at latent_dim=32" in dimension
    assert joint.startswith("Jointly claim 1 is refuted for the training images")
    assert "for the population it is refuted, 2 as further of 3 pairs being certified" in joint
    assert "0.331 nats at latent_dim=2 to 8.05 at latent_dim=32" in joint
    assert "saturated from latent_dim=8 on" in joint
    assert "did not vary in these runs" in encoder
    assert verdict.claims[1].factors == ()
    assert "vaeq sweep experiment=finding" in verdict.claims[1].unanswered
    assert "vaeq sweep experiment=width" in verdict.claims[1].unanswered
    for sentence in verdict.bottom_line:
        assert sentence.replace("\n", " ") in verdict_markdown(verdict)


def test_brackets_order_what_they_separate(tmp_path: Path) -> None:
    notes = notes_of(dimensions_of(default_sweep(tmp_path)))
    assert "certified in 2 of 3 pairs" in notes
    assert "8 is further than 2 ([1.60, 6.60] against [0.330, 0.470] nats)" in notes
    assert "32 is further than 8" not in notes


def test_brackets_that_touch_within_errors_or_lack_an_end_order_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, 2, numbers={"bracket": (0.3, 1.5)})
    directory = write_run(tmp_path, 8)  # lower end 1.6 ± 0.01 against 1.5 ± 0.05
    assert "no two levels of latent_dim are ordered" in notes_of(dimensions_of(tmp_path))
    record = json.loads((directory / "record.json").read_text())
    missing = estimate(None, None, "nats", "no held-out codes")
    record["estimates"]["population_kl_lower"] = missing
    write_json(directory / "record.json", record)
    assert "no two levels of latent_dim are ordered" in notes_of(dimensions_of(tmp_path))


@pytest.mark.parametrize(
    ("levels", "by_dimension", "jointly"),
    [(RISING, "closer", "further"), (FALLING, "further", "closer")],
)
@pytest.mark.parametrize(("seeds", "test"), [((0,), STEPS), ((0, 1, 2), PAGE)])
def test_both_directions_with_one_seed_and_with_three(
    tmp_path: Path,
    levels: Mapping[int, tuple[float, float, float]],
    by_dimension: str,
    jointly: str,
    seeds: Sequence[int],
    test: str,
) -> None:
    sweep(tmp_path, levels, seeds, noise=0.05)
    factor = dimensions_of(tmp_path)
    assert factor.outcome("dimension_kl_mean").answer == by_dimension
    joint = factor.outcome("marginal_kl")
    assert joint.answer == jointly
    assert joint.trend is not None
    assert joint.trend.test == test
    assert joint.trend.n_blocks == len(seeds)
    if len(seeds) == 3:
        assert joint.trend.p_value == pytest.approx(smallest_rank_p(3, 3))
        assert "One seed" not in notes_of(factor)
    else:
        assert factor.outcome("dimension_kl_mean").trend.test == SIGNS
    assert factor.saturated == ""


def test_seeds_that_contradict_one_another_show_no_clear_change(tmp_path: Path) -> None:
    for seed, levels in enumerate((RISING, FALLING, RISING)):
        sweep(tmp_path, levels, (seed,))
    factor = dimensions_of(tmp_path)
    assert factor.outcome("dimension_kl_mean").answer == "no clear change"
    assert factor.outcome("marginal_kl").answer == "no clear change"
    bottom = verdict_of(tmp_path).bottom_line
    assert "One dimension at a time, claim 1 is undecided" in bottom[0]
    assert "Jointly claim 1 is undecided" in bottom[1]


def test_two_levels_take_a_paired_test(tmp_path: Path) -> None:
    sweep(tmp_path, {2: RISING[2], 4: RISING[4]}, (0, 1, 2), noise=0.05)
    trend = dimensions_of(tmp_path).outcome("marginal_kl").trend
    assert trend is not None
    assert (trend.test, trend.n_levels, trend.n_blocks) == (PAIRED_T, 2, 3)
    assert "smallest attainable two-sided p-value is 0.25" in notes_of(dimensions_of(tmp_path))


def test_two_seeds_must_agree_where_ranks_cannot_decide(tmp_path: Path) -> None:
    sweep(tmp_path, RISING, (0, 1))
    factor = dimensions_of(tmp_path)
    assert factor.outcome("marginal_kl").trend.test == STEPS
    assert "smallest attainable two-sided p-value is 0.056" in notes_of(factor)
    assert "all blocks must agree" in notes_of(factor)


def test_two_levels_and_one_seed_fall_back_on_monte_carlo_error(tmp_path: Path) -> None:
    # marginal_kl moves by 0.02, with a standard error of 0.011·sqrt(2) = 0.016.
    sweep(tmp_path, {2: (0.1, 6.0, 5.7), 4: (0.1, 6.0, 5.68)})
    factor = dimensions_of(tmp_path)
    assert factor.outcome("marginal_kl").answer == "no clear change"
    assert factor.outcome("marginal_kl").trend.test == STEPS
    assert factor.outcome("kl_per_image").answer == "no clear change"


def test_a_saturated_fall_is_no_approach(tmp_path: Path) -> None:
    ceiling = 0.99 * LOG_N
    sweep(tmp_path, {4: (0.02, 17.0, ceiling), 8: (0.01, 16.0, ceiling)})
    factor = dimensions_of(tmp_path)
    assert factor.outcome("marginal_kl").answer_text() == "saturated, closer"
    assert factor.saturated == "at every level (2 of 2 runs)"
    assert "statement about kl_per_image alone" in notes_of(factor)


def test_unknown_saturation_is_said(tmp_path: Path) -> None:
    for latent_dim in (2, 8):
        directory = write_run(tmp_path, latent_dim)
        record = json.loads((directory / "record.json").read_text())
        del record["estimates"]["mutual_information_fraction"]
        write_json(directory / "record.json", record)
    assert "saturation is not known" in notes_of(dimensions_of(tmp_path))


def test_incomplete_blocks_are_left_out_and_named(tmp_path: Path) -> None:
    sweep(tmp_path, RISING, (0, 1, 2, 3), noise=0.05)
    (gone,) = tmp_path.glob("latent_dim=4,,seed=3-*")
    (gone / "record.json").unlink()
    factor = dimensions_of(tmp_path)
    assert factor.levels == (2, 3, 4)
    assert factor.n_blocks == 3
    assert factor.seeds == (0, 1, 2)
    expected = "1 of 4 blocks lack a level and are left out (seed 3 has no latent_dim=4)."
    assert expected in factor.notes


def test_a_metric_missing_in_one_run_costs_its_block_for_that_metric_alone(
    tmp_path: Path,
) -> None:
    sweep(tmp_path, RISING, (0, 1, 2, 3), noise=0.05)
    (directory,) = tmp_path.glob("latent_dim=4,,seed=3-*")
    record = json.loads((directory / "record.json").read_text())
    record["estimates"]["moment_kl"] = estimate(None, None, "nats", "why")
    write_json(directory / "record.json", record)
    factor = dimensions_of(tmp_path)
    assert factor.outcome("moment_kl").trend.n_blocks == 3
    assert factor.outcome("marginal_kl").trend.n_blocks == 4


def test_a_metric_no_run_has_is_not_measured(tmp_path: Path) -> None:
    sweep(tmp_path, RISING)
    for path in tmp_path.glob("*/record.json"):
        record = json.loads(path.read_text())
        del record["estimates"]["marginal_kl"]
        write_json(path, record)
    verdict = verdict_of(tmp_path)
    outcome = verdict.claims[0].factors[0].outcome("marginal_kl")
    assert (outcome.answer, outcome.effect_text()) == ("not measured", "n/a")
    assert "not measured" in verdict.bottom_line[1]


def test_depth_is_judged_pooled_and_by_latent_dim(tmp_path: Path) -> None:
    # Depth helps at 2 dimensions and does nothing at 8, where three seeds order it differently.
    shuffled = ((0.012, 0.011, 0.013), (0.011, 0.013, 0.012), (0.013, 0.012, 0.011))
    for seed in range(3):
        for i, depth in enumerate((1, 2, 3)):
            numbers = {"dim": 0.12 - 0.03 * i + 0.001 * seed}
            write_run(tmp_path, 2, seed, numbers, encoder_depth=depth)
            write_run(tmp_path, 8, seed, {"dim": shuffled[seed][i]}, encoder_depth=depth)
    verdict = verdict_of(tmp_path)
    (depth_verdict,) = verdict.claims[1].factors
    assert depth_verdict.levels == (1, 2, 3)
    assert depth_verdict.n_blocks == 6
    by_dim = {
        dim: next(o.answer for o in outcomes if o.metric == "dimension_kl_mean")
        for dim, outcomes in depth_verdict.strata.items()
    }
    assert by_dim == {2: "closer", 8: "no clear change"}
    encoder = verdict.bottom_line[-1]
    assert encoder.startswith("Claim 2, a deeper encoder (encoder_depth 1 → 3), is undecided one")
    assert "closer at latent_dim 2, no clear change at 8" in encoder
    assert "vaeq sweep experiment=width" in verdict.claims[1].unanswered
    assert "encoder_depth" not in verdict.claims[1].unanswered
    assert len(verdict.bottom_line) <= 3


def test_width_alone_answers_the_second_claim_only(tmp_path: Path) -> None:
    for i, width in enumerate((64, 256, 1024)):
        write_run(tmp_path, 2, numbers={"dim": 0.12 - 0.03 * i}, encoder_width=width)
    verdict = verdict_of(tmp_path)
    assert verdict.claims[0].factors == ()
    assert "vaeq sweep latent_dim=2,8,32" in verdict.claims[0].unanswered
    (width_verdict,) = verdict.claims[1].factors
    assert width_verdict.factor == "encoder_width"
    assert width_verdict.outcome("dimension_kl_mean").answer == "closer"
    assert any(
        "wider encoder (encoder_width 64 → 1024, one seed)" in s for s in verdict.bottom_line
    )


def test_a_factor_that_never_varies_alone_is_confounded(tmp_path: Path) -> None:
    write_run(tmp_path, 2, encoder_depth=1)
    write_run(tmp_path, 8, encoder_depth=3)
    verdict = verdict_of(tmp_path)
    assert verdict.claims[0].factors == verdict.claims[1].factors == ()
    assert "no two runs differ in it alone" in verdict.claims[0].unanswered


def test_blocks_of_one_seed_say_so_even_where_ranks_decide(tmp_path: Path) -> None:
    for depth in (1, 2, 3):
        sweep(tmp_path, RISING, noise=0.05, encoder_depth=depth)
    factor = dimensions_of(tmp_path)
    assert factor.outcome("marginal_kl").trend.test == PAGE
    assert "blocks differ in other settings, not in the seed" in notes_of(factor)


def test_active_dimensions_that_say_otherwise_are_in_the_bottom_line(tmp_path: Path) -> None:
    for latent_dim, active in ((2, 0.1), (8, 0.2)):
        directory = write_run(tmp_path, latent_dim, numbers={"active": min(latent_dim, 4)})
        record = json.loads((directory / "record.json").read_text())
        record["estimates"]["dimension_kl_mean_active"]["value"] = active
        write_json(directory / "record.json", record)
    verdict = verdict_of(tmp_path)
    assert "over the active dimensions alone: further, 0.100 → 0.200" in verdict.bottom_line[0]
    assert "4 of 8 active at latent_dim=8" in notes_of(verdict.claims[0].factors[0])
    assert "says otherwise: further" in notes_of(verdict.claims[0].factors[0])


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([(2, 8, 32)] * 2 + [(2, 8)], (2, 8, 32)),
        ([(2, 8)] * 5 + [(2, 8, 32)], (2, 8)),
        ([(2,), (8,)], ()),
        ([(32, 2)], (2, 32)),
        ([(2, 8), (2, 32)], (2, 8)),
    ],
)
def test_common_levels(levels: list[tuple[int, ...]], expected: tuple[int, ...]) -> None:
    assert common_levels(levels) == expected


def test_a_single_small_p_value_among_many_metrics_is_taken_back(tmp_path: Path) -> None:
    """Three falling seeds: p = 2/6³ = 0.0093; with seven metrics that do not move, q = 0.074."""
    balanced = ((1, 2, 3), (3, 1, 2), (2, 3, 1))
    for seed, order in enumerate(balanced):
        for value, latent_dim in zip(order, (2, 3, 4), strict=True):
            directory = write_run(tmp_path, latent_dim, seed)
            record = json.loads((directory / "record.json").read_text())
            for name, entry in record["estimates"].items():
                if name != "mutual_information_fraction":
                    entry["value"] = 1 / latent_dim if name == "moment_kl" else value
            write_json(directory / "record.json", record)
    factor = dimensions_of(tmp_path)
    outcome = factor.outcome("moment_kl")
    assert outcome.trend is not None
    assert outcome.trend.direction == "closer"
    assert outcome.trend.p_value == pytest.approx(2 / 6**3)
    assert outcome.q_value == pytest.approx(8 * 2 / 6**3)
    assert outcome.answer == "no clear change"
    assert "moment_kl: p <= 0.05 but q > 0.05" in notes_of(factor)


def test_projections_are_named_as_a_confound_with_their_null(tmp_path: Path) -> None:
    for latent_dim in (2, 32):
        write_run(tmp_path, latent_dim, full=True)
    notes = notes_of(dimensions_of(tmp_path))
    assert "sliced_w2 goes from 0.320 at latent_dim=2 to 0.133 at 32" in notes
    assert "from 0.100 to 0.0531" in notes


def test_probabilistic_pca_is_in_the_tables_and_in_no_comparison(tmp_path: Path) -> None:
    sweep(tmp_path / "vae", RISING, seeds=(0, 1, 2), model="mlp")
    alone = dimensions_of(tmp_path)
    sweep(tmp_path / "ppca", FALLING, seeds=(0, 1, 2), model="ppca")
    both = dimensions_of(tmp_path)
    assert both.outcomes == alone.outcomes
    assert "9 runs of model=ppca: in the tables for reference" in notes_of(both)
    assert "ppca" not in notes_of(alone)
    assert {run.settings["model"] for run in read_runs([tmp_path])[0]} == {"mlp", "ppca"}
