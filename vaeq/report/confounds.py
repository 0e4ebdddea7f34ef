"""What weakens a comparison: few blocks, saturation, collapsed dimensions, random projections."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from vaeq.report.outcomes import SATURATED_ABOVE, Block, Outcome, is_reference, is_saturated
from vaeq.report.runs import Run, Scalar
from vaeq.report.table import setting_text
from vaeq.report.trend import ALPHA, PAIRED_T, SIGNS, STEPS, smallest_rank_p
from vaeq.report.words import number

MOST_COLLAPSED = 6


def block_notes(
    factor: str,
    levels: Sequence[Scalar],
    blocks: Sequence[Block],
    complete: Sequence[Block],
    seeds: Sequence[int],
    outcomes: Sequence[Outcome],
) -> list[str]:
    """How much the comparison can bear: blocks, seeds, and what a rank test could reach."""
    notes = []
    lost = [block for block in blocks if not set(levels) <= set(block)]
    if lost:
        first = lost[0]
        seed = next(iter(first.values())).seed
        lacking = ", ".join(setting_text(level) for level in levels if level not in first)
        notes.append(
            f"{len(lost)} of {len(blocks)} blocks lack a level and are left out "
            f"(seed {seed} has no {factor}={lacking}{', ...' if len(lost) > 1 else ''})."
        )
    trends = [outcome.trend for outcome in outcomes if outcome.trend is not None]
    stepwise = any(each.test in (STEPS, SIGNS) for each in trends)
    if stepwise or any(each.test == PAIRED_T for each in trends):
        m, k = len(complete), len(levels)
        notes.append(
            f"{m} block{'s' if m > 1 else ''} of {k} levels: too few for a rank test, whose "
            f"smallest attainable two-sided p-value is {smallest_rank_p(m, k):.2g}."
        )
    uneven: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.trend is not None and outcome.trend.note:
            uneven.setdefault(outcome.trend.note, []).append(outcome.metric)
    notes += [f"{', '.join(metrics)}: {note}." for note, metrics in uneven.items()]
    taken_back = [
        outcome.metric
        for outcome in outcomes
        if outcome.q_value is not None
        and outcome.q_value > ALPHA
        and outcome.trend is not None
        and outcome.trend.direction != "no clear change"
    ]
    if taken_back:
        notes.append(
            f"{', '.join(taken_back)}: p <= {ALPHA} but q > {ALPHA}: with so many metrics tested, "
            "one such p-value is expected by chance; counted as no clear change."
        )
    if len(seeds) == 1 and stepwise:
        notes.append("One seed: the error is Monte Carlo only; seed-to-seed spread is not in it.")
    elif len(seeds) == 1:
        notes.append(
            "One seed: blocks differ in other settings, not in the seed; what a second seed would "
            "change is not known."
        )
    elif stepwise:
        notes.append("The error of a step is Monte Carlo only; all blocks must agree on its sign.")
    return notes


def reference_notes(runs: Sequence[Run]) -> list[str]:
    """What runs of another kind of model do in the tables."""
    count = sum(is_reference(run) for run in runs)
    if not count:
        return []
    return [
        f"{count} run{'s' if count > 1 else ''} of model=ppca: in the tables for reference, in no "
        "comparison. Its elbo and log_likelihood are densities of grey levels, not to be compared "
        "with a VAE's."
    ]


def saturated_where(factor: str, levels: Sequence[Scalar], blocks: Sequence[Block]) -> str:
    """``from latent_dim=8 on``: at which levels a run is saturated; empty if at none."""
    flagged = [level for level in levels if any(is_saturated(block[level]) for block in blocks)]
    if not flagged:
        return ""
    if flagged == list(levels):
        compared = [block[level] for block in blocks for level in levels]
        return f"at every level ({sum(map(is_saturated, compared))} of {len(compared)} runs)"
    if flagged == list(levels[-len(flagged) :]):
        return f"from {factor}={setting_text(flagged[0])} on"
    return "at " + ", ".join(f"{factor}={setting_text(level)}" for level in flagged)


def saturation_notes(
    levels: Sequence[Scalar],
    blocks: Sequence[Block],
    joint: Outcome,
    where: str,
    closer_somewhere: bool,
) -> list[str]:
    """Where the mutual information is at its ceiling, and what marginal_kl then is.

    ``closer_somewhere``: an unsaturated latent_dim has a verdict of its own, and it is ``closer``.
    """
    compared = [block[level] for block in blocks for level in levels]
    if not where:
        if all(run.value("mutual_information_fraction") is None for run in compared):
            return ["No mutual_information_fraction in the records: saturation is not known."]
        return []
    saturated = [run for run in compared if is_saturated(run)]
    sizes = {run.n_images for run in saturated} - {None}
    images = f"the {sizes.pop():,} training" if len(sizes) == 1 else "the N training"
    # log N − MI, which is what marginal_kl exceeds its floor by.
    rest = [
        information / fraction - information
        for run in saturated
        if (information := run.value("mutual_information")) is not None
        and (fraction := run.value("mutual_information_fraction"))
    ]
    within = f" to within {number(max(map(abs, rest)), 2)} nats" if rest else ""
    note = (
        f"Saturated {where}: mutual information above {SATURATED_ABOVE:.0%} of log N. There "
        f"marginal_kl is kl_per_image − log N{within}: it is about the empirical mixture of "
        f"{images} images, and total_correlation = marginal_kl − dimension_kl_sum with it."
    )
    if joint.answer == "saturated":
        if joint.direction != "closer" and not closer_somewhere:
            note += " Yet KL(q_N‖p) itself is not closer."
        elif joint.direction == "closer" and len(saturated) == len(compared):
            note += " That it falls is a statement about kl_per_image alone."
        else:
            note += " The pooled marginal_kl mixes saturated and other runs."
    return [note]


def collapse_notes(
    factor: str, levels: Sequence[Scalar], blocks: Sequence[Block], outcomes: Sequence[Outcome]
) -> list[str]:
    """Collapsed dimensions match N(0, 1) by themselves and flatter a mean over all dimensions."""
    shares = []
    for level in levels:
        counts: dict[int, list[float]] = {}
        for block in blocks:
            active = block[level].value("active_units")
            latent_dim = block[level].settings["latent_dim"]
            if active is not None and isinstance(latent_dim, int) and active < latent_dim:
                counts.setdefault(latent_dim, []).append(active)
        for latent_dim, few in sorted(counts.items()):
            low, high = _count_text(min(few)), _count_text(max(few))
            span = low if low == high else f"{low} to {high}"
            at = f"{factor}={setting_text(level)}"
            at += "" if factor == "latent_dim" else f", latent_dim={latent_dim}"
            shares.append(f"{span} of {latent_dim} active at {at}")
    if not shares:
        return []
    shown = "; ".join(shares[:MOST_COLLAPSED])
    if (more := len(shares) - MOST_COLLAPSED) > 0:
        shown += f"; and {more} more"
    note = (
        f"Collapsed dimensions: {shown}. A collapsed dimension matches N(0, 1) by itself and "
        "flatters dimension_kl_mean; dimension_kl_mean_active leaves it out"
    )
    by_name = {outcome.metric: outcome for outcome in outcomes}
    active_only = by_name["dimension_kl_mean_active"]
    if active_only.answer == "not measured":
        return [f"{note}, but was not measured."]
    if active_only.direction != by_name["dimension_kl_mean"].direction:
        return [f"{note} and says otherwise: {active_only.direction}."]
    return [f"{note} and says the same."]


def _count_text(count: float) -> str:
    """A count, without decimals where it is whole."""
    return f"{count:.0f}" if count == int(count) else f"{count:.1f}"


def projection_notes(factor: str, levels: Sequence[Scalar], blocks: Sequence[Block]) -> list[str]:
    """Projections of high-dimensional codes look Gaussian whatever the codes: read the null too."""
    ends = []
    for level in (levels[0], levels[-1]):
        found = [
            tuple(block[level].value(f"sliced_w2{suffix}") for suffix in ("", "_null", "_z"))
            for block in blocks
        ]
        known = [[x for x in values if x is not None] for values in found]
        known = [values for values in known if len(values) == 3]
        if not known:
            return []
        ends.append([fmean(column) for column in zip(*known, strict=True)])
    (first, null_first, z_first), (last, null_last, z_last) = ends
    low, high = setting_text(levels[0]), setting_text(levels[-1])
    return [
        f"Random projections: sliced_w2 goes from {number(first)} at {factor}={low} to "
        f"{number(last)} at {high}, and the value of N(0, I) against itself from "
        f"{number(null_first)} to {number(null_last)}; beyond that null it is "
        f"{number(z_first, 2)} and {number(z_last, 2)} of its standard deviations. A projection "
        "of many dimensions looks Gaussian by itself, so only the distance from the null counts."
    ]
