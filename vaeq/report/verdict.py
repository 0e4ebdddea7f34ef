"""The two claims, answered separately and metric by metric, with the test that was used.

Claim 1: more latent dimensions bring the aggregated posterior closer to N(0, I). Claim 2: a deeper
or wider encoder does. Runs are compared in blocks: everything but the factor, the seed included,
held fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from vaeq.report.runs import Run, Scalar
from vaeq.report.table import setting_text, sort_key
from vaeq.report.trend import PAIRED_T, SIGNS, STEPS, Direction, Trend, smallest_rank_p, trend
from vaeq.report.words import number

SATURATED_ABOVE = 0.95
# An end of a bracket is widened by so many standard errors before two brackets are compared.
BRACKET_ERRORS = 2.0
MOST_ORDERINGS = 4
MOST_COLLAPSED = 6

VIEWS = {
    "per dimension": ("dimension_kl_mean", "dimension_kl_mean_active", "dimension_kl_max"),
    "joint": ("dimension_kl_sum", "total_correlation", "moment_kl", "marginal_kl"),
    "each image": ("kl_per_image",),
}
# Bounded by log N through the mutual information, so they saturate with it.
SATURATING = ("marginal_kl", "total_correlation")

# Where a column is narrow.
SHORT = {"no clear change": "unclear", "not measured": "n/a"} | {
    word: word for word in ("closer", "further", "saturated")
}

Answer = Literal["closer", "further", "no clear change", "saturated", "not measured"]
Block = Mapping[Scalar, Run]


@dataclass(frozen=True)
class Outcome:
    """What one metric says about one factor.

    ``direction`` is that of the trend; ``answer`` is it too unless the metric is saturated at some
    level or could not be compared. ``first`` and ``last`` are means over the blocks at the lowest
    and the highest level.
    """

    metric: str
    view: str
    unit: str
    answer: Answer
    direction: Direction
    trend: Trend | None
    levels: tuple[Scalar, ...] = ()
    first: float | None = None
    last: float | None = None

    def answer_text(self) -> str:
        """``closer``, or ``saturated, further``."""
        return f"saturated, {SHORT[self.direction]}" if self.answer == "saturated" else self.answer

    def effect_text(self) -> str:
        """``0.104 → 0.00412``: the mean at the first and at the last level."""
        if self.first is None or self.last is None:
            return "n/a"
        return f"{number(self.first)} → {number(self.last)}"

    def test_text(self) -> str:
        """``Page p=0.0093``; no p-value where the test has none."""
        if self.trend is None:
            return "none"
        p = self.trend.p_value
        if p is None:
            return self.trend.test
        return f"{self.trend.test} p" + ("<0.001" if p < 1e-3 else f"={p:.2g}")


@dataclass(frozen=True)
class FactorVerdict:
    """What the runs say about one factor, pooled and, for the encoder, by latent_dim."""

    factor: str
    levels: tuple[Scalar, ...]
    n_blocks: int
    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    strata: Mapping[Scalar, tuple[Outcome, ...]]
    saturated: str
    notes: tuple[str, ...]

    def outcome(self, metric: str) -> Outcome:
        """The pooled outcome of a metric."""
        return next(outcome for outcome in self.outcomes if outcome.metric == metric)


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim, with a verdict for each of its factors that varied; else why there is none."""

    claim: str
    factors: tuple[FactorVerdict, ...]
    unanswered: str = ""


@dataclass(frozen=True)
class Verdict:
    """Two or three plain sentences first, then each claim."""

    bottom_line: tuple[str, ...]
    claims: tuple[ClaimVerdict, ...]


def judge(runs: Sequence[Run]) -> Verdict:
    """Answer both claims from complete runs."""
    claims = (
        _claim("More latent dimensions bring the codes closer to N(0, I)", ("latent_dim",), runs),
        _claim(
            "A deeper or wider encoder brings the codes closer to N(0, I)",
            ("encoder_depth", "encoder_width"),
            runs,
        ),
    )
    return Verdict(_bottom_line(*claims), claims)


def _claim(claim: str, factors: Sequence[str], runs: Sequence[Run]) -> ClaimVerdict:
    judged = {factor: _factor(runs, factor) for factor in factors}
    silent = [factor for factor, verdict in judged.items() if verdict is None]
    answered = tuple(verdict for verdict in judged.values() if verdict is not None)
    return ClaimVerdict(claim, answered, _unanswered(runs, silent) if silent else "")


def blocks_of(runs: Sequence[Run], factor: str) -> list[Block]:
    """Runs that differ in the factor alone, as one mapping level → run for each block."""
    blocks: dict[tuple[object, ...], dict[Scalar, Run]] = {}
    for run in runs:
        if factor in run.settings:
            rest = sorted((k, v) for k, v in run.settings.items() if k != factor)
            blocks.setdefault((*rest, run.seed), {})[run.settings[factor]] = run
    return [block for block in blocks.values() if len(block) > 1]


def common_levels(levels: Sequence[Sequence[Scalar]]) -> tuple[Scalar, ...]:
    """The set of levels to compare, of those that occur as the levels of a block.

    It is the one with the most steps in all: (levels - 1) × blocks that have them all. A block that
    lost a level to a failed run then costs that block, not the level.
    """
    sets: list[frozenset[Scalar]] = [frozenset(each) for each in levels if len(each) > 1]
    if not sets:
        return ()
    steps = {each: (len(each) - 1) * sum(each <= other for other in sets) for each in sets}
    most = max(steps, key=lambda each: (steps[each], len(each)))
    return tuple(sorted(most, key=sort_key))


def _factor(runs: Sequence[Run], factor: str) -> FactorVerdict | None:
    """The verdict on a factor, or None if no two runs differ in it alone."""
    blocks = blocks_of(runs, factor)
    levels = common_levels([tuple(block) for block in blocks])
    if not levels:
        return None
    complete = [block for block in blocks if set(levels) <= set(block)]
    strata = {}
    if factor != "latent_dim":
        dims = {run.settings["latent_dim"] for block in blocks for run in block.values()}
        if len(dims) > 1:
            strata = {
                dim: _outcomes(
                    [b for b in blocks if next(iter(b.values())).settings["latent_dim"] == dim]
                )
                for dim in sorted(dims, key=sort_key)
            }
    outcomes = _outcomes(blocks)
    joint = next(outcome for outcome in outcomes if outcome.metric == "marginal_kl")
    where = _saturated_where(factor, levels, complete)
    somewhere = any(
        outcome.metric == "marginal_kl" and outcome.answer == "closer"
        for stratum in strata.values()
        for outcome in stratum
    )
    seeds = tuple(sorted({run.seed for block in complete for run in block.values()}))
    notes = (
        *_block_notes(factor, levels, blocks, complete, seeds, outcomes),
        *_saturation_notes(levels, complete, joint, where, somewhere),
        *_collapse_notes(factor, levels, complete, outcomes),
        *_bracket_notes(factor, levels, blocks),
    )
    return FactorVerdict(factor, levels, len(complete), seeds, outcomes, strata, where, notes)


def _outcomes(blocks: Sequence[Block]) -> tuple[Outcome, ...]:
    return tuple(
        _outcome(metric, view, blocks) for view, metrics in VIEWS.items() for metric in metrics
    )


def _outcome(metric: str, view: str, blocks: Sequence[Block]) -> Outcome:
    """Compare a metric over the blocks that have a number for it at every level."""
    units = [
        run.estimates[metric].unit
        for block in blocks
        for run in block.values()
        if run.value(metric) is not None
    ]
    unit = units[0] if units else ""
    usable: list[Block] = [
        {
            level: run
            for level, run in block.items()
            if run.value(metric) is not None and run.estimates[metric].unit == unit
        }
        for block in blocks
    ]
    levels = common_levels([tuple(block) for block in usable])
    if not levels:
        return Outcome(metric, view, unit, "not measured", "no clear change", None)
    complete = [block for block in usable if set(levels) <= set(block)]
    table = [[v for level in levels if (v := b[level].value(metric)) is not None] for b in complete]
    errors = [[b[level].estimates[metric].std_error for level in levels] for b in complete]
    result = trend(table, errors)
    answer: Answer = result.direction
    if metric in SATURATING and any(_saturated(b[level]) for b in complete for level in levels):
        answer = "saturated"
    first, last = fmean(row[0] for row in table), fmean(row[-1] for row in table)
    return Outcome(metric, view, unit, answer, result.direction, result, levels, first, last)


def _saturated(run: Run) -> bool:
    fraction = run.value("mutual_information_fraction")
    return fraction is not None and fraction > SATURATED_ABOVE


def _block_notes(
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


def _saturated_where(factor: str, levels: Sequence[Scalar], blocks: Sequence[Block]) -> str:
    """``from latent_dim=8 on``: at which levels a run is saturated; empty if at none."""
    flagged = [level for level in levels if any(_saturated(block[level]) for block in blocks)]
    if not flagged:
        return ""
    if flagged == list(levels):
        compared = [block[level] for block in blocks for level in levels]
        return f"at every level ({sum(map(_saturated, compared))} of {len(compared)} runs)"
    if flagged == list(levels[-len(flagged) :]):
        return f"from {factor}={setting_text(flagged[0])} on"
    return "at " + ", ".join(f"{factor}={setting_text(level)}" for level in flagged)


def _saturation_notes(
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
    saturated = [run for run in compared if _saturated(run)]
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


def _collapse_notes(
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


def _bracket_notes(factor: str, levels: Sequence[Scalar], blocks: Sequence[Block]) -> list[str]:
    """Which levels the population brackets order: widened by 2 s.e. they do not overlap."""
    if not any(
        _bound(run, "population_kl_lower") is not None for b in blocks for run in b.values()
    ):
        return []
    certified, n_pairs = [], 0
    for i, low in enumerate(levels):
        for high in levels[i + 1 :]:
            pairs = [(block[low], block[high]) for block in blocks if {low, high} <= set(block)]
            orders = {_bracket_order(a, b) for a, b in pairs}
            n_pairs += 1
            if len(orders) == 1 and (order := orders.pop()):
                certified.append(
                    f"{setting_text(high)} is {order} than {setting_text(low)} "
                    f"({_bracket_span([b for _, b in pairs])} against "
                    f"{_bracket_span([a for a, _ in pairs])} nats{_blocks_words(len(pairs))})"
                )
    head = "Population KL(q‖p), where brackets widened by 2 s.e. stay apart"
    if not certified:
        return [f"{head}: no two levels of {factor} are ordered."]
    more = len(certified) - MOST_ORDERINGS
    tail = f"; and {more} pairs more" if more > 0 else ""
    return [
        f"{head}, certified in {len(certified)} of {n_pairs} pairs of {factor}: "
        f"{'; '.join(certified[:MOST_ORDERINGS])}{tail}."
    ]


def _blocks_words(n: int) -> str:
    return f", in all {n} blocks" if n > 1 else ""


def _bound(run: Run, name: str) -> tuple[float, float] | None:
    """An end of the bracket with its error; None where either is missing."""
    estimate = run.estimates.get(name)
    if estimate is None or estimate.value is None or estimate.std_error is None:
        return None
    return estimate.value, estimate.std_error


def _bracket_order(a: Run, b: Run) -> str:
    """Whether b is certified ``further`` or ``closer`` than a, else nothing."""
    for near, far, word in ((a, b, "further"), (b, a, "closer")):
        upper, lower = _bound(near, "population_kl_upper"), _bound(far, "population_kl_lower")
        if (
            upper is not None
            and lower is not None
            and lower[0] - BRACKET_ERRORS * lower[1] > upper[0] + BRACKET_ERRORS * upper[1]
        ):
            return word
    return ""


def _bracket_span(runs: Sequence[Run]) -> str:
    """The widest bracket over some runs: ``[1.60, 6.60]``."""
    lowers = [run.value("population_kl_lower") for run in runs]
    uppers = [run.value("population_kl_upper") for run in runs]
    low = min((x for x in lowers if x is not None), default=None)
    high = max((x for x in uppers if x is not None), default=None)
    return "[" + ", ".join("n/a" if x is None else number(x) for x in (low, high)) + "]"


_REMEDY = {
    "latent_dim": "vaeq sweep latent_dim=2,8,32",
    "encoder_depth": "vaeq sweep experiment=finding",
    "encoder_width": "vaeq sweep experiment=width",
}
_WORDS = {
    "latent_dim": "The latent dimension",
    "encoder_depth": "Encoder depth",
    "encoder_width": "encoder width",
}


def _unanswered(runs: Sequence[Run], factors: Sequence[str]) -> str:
    """Why a claim, or the half of it that concerns these factors, has no answer, and the remedy."""
    varied = [
        name
        for name in factors
        if len({run.settings.get(name) for run in runs if name in run.settings}) > 1
    ]
    words = " and ".join(_WORDS[name] for name in factors)
    words = words[0].upper() + words[1:]
    commands = " or ".join(f"`{_REMEDY[name]}`" for name in factors)
    if varied:
        reason = "varied only together with other settings: no two runs differ in it alone"
    else:
        reason = "did not vary in these runs"
    return f"{words} {reason}. To answer: {commands}."


def _bottom_line(dimensions: ClaimVerdict, encoder: ClaimVerdict) -> tuple[str, ...]:
    """The verdict in two or three sentences."""
    sentences = []
    for verdict in dimensions.factors:
        sentences += [_each_dimension(verdict), _jointly(verdict)]
    if encoder.factors:
        text = "; ".join(_encoder(verdict) for verdict in encoder.factors)
        sentences.append(text[0].upper() + text[1:] + ".")
    for n, claim in enumerate((dimensions, encoder), start=1):
        if not claim.factors:
            why = claim.unanswered.split(". ")[0]
            sentences.append(f"{why}, so claim {n} has no answer here.")
    return tuple(sentences)


def _span(outcome: Outcome, factor: str) -> str:
    """``goes from 0.104 nats at latent_dim=2 to 0.0041 at latent_dim=32``."""
    if outcome.first is None or outcome.last is None:
        return "was not measured"
    low, high = (setting_text(level) for level in (outcome.levels[0], outcome.levels[-1]))
    return (
        f"goes from {number(outcome.first)} nats at {factor}={low} "
        f"to {number(outcome.last)} at {factor}={high}"
    )


def _each_dimension(verdict: FactorVerdict) -> str:
    outcome = verdict.outcome("dimension_kl_mean")
    head = f"With more latent dimensions{_seed_words(verdict, ' (one seed)')} "
    head += {
        "closer": "each single dimension comes closer to N(0, 1)",
        "further": "each single dimension moves further from N(0, 1)",
        "no clear change": "the single dimensions show no clear change",
    }[outcome.direction]
    if outcome.answer == "not measured":
        return "Whether the single dimensions come closer to N(0, 1) was not measured."
    active = verdict.outcome("dimension_kl_mean_active")
    but = ""
    if active.answer not in ("not measured", outcome.answer):
        but = f"; over the active dimensions alone: {active.answer}, {active.effect_text()}"
    return f"{head}: the mean KL per dimension {_span(outcome, verdict.factor)}{but}."


def _jointly(verdict: FactorVerdict) -> str:
    outcome = verdict.outcome("marginal_kl")
    if outcome.answer == "not measured":
        return "Whether they come closer jointly was not measured."
    head = {
        "closer": "Jointly they come closer too"
        if verdict.outcome("dimension_kl_mean").direction == "closer"
        else "Jointly they come closer",
        "further": "Jointly they do not come closer but move away",
        "no clear change": "Jointly they do not come clearly closer",
    }[outcome.direction]
    text = f"{head}: KL(q_N‖p) {_span(outcome, verdict.factor)}"
    if outcome.answer == "saturated":
        text += (
            f", saturated {verdict.saturated} (the mutual information is near its ceiling log N, "
            "so the size is that of kl_per_image − log N)"
        )
    return text + "."


def _encoder(verdict: FactorVerdict) -> str:
    low, high = setting_text(verdict.levels[0]), setting_text(verdict.levels[-1])
    word = "deeper" if verdict.factor == "encoder_depth" else "wider"
    parts = []
    for label, metric in (
        ("each single dimension", "dimension_kl_mean"),
        ("jointly", "marginal_kl"),
    ):
        outcome = verdict.outcome(metric)
        where: dict[str, list[str]] = {}
        for dim, stratum in verdict.strata.items():
            answer = next(each.answer for each in stratum if each.metric == metric)
            where.setdefault(answer, []).append(setting_text(dim))
        pooled = outcome.answer_text()
        if outcome.first is not None:
            pooled += f", {outcome.effect_text()} nats"
        if len(where) > 1:
            by = [f"{answer} at {', '.join(dims)}" for answer, dims in where.items()]
            by[0] = by[0].replace(" at ", " at latent_dim ", 1)
            parts.append(f"{label} {', '.join(by)} (pooled: {pooled})")
        else:
            parts.append(f"{label} {pooled}")
    one_seed = _seed_words(verdict, ", one seed")
    return f"a {word} encoder ({verdict.factor} {low} → {high}{one_seed}): {'; '.join(parts)}"


def _seed_words(verdict: FactorVerdict, words: str) -> str:
    return words if len(verdict.seeds) == 1 else ""
