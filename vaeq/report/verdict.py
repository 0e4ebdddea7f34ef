"""The two claims in three plain sentences, each written from what the runs say.

Claim 1: more latent dimensions bring the aggregated posterior closer to N(0, I). Claim 2: a deeper
or wider encoder does. Runs are compared in blocks: everything but the factor, the seed included,
held fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vaeq.report.claims import ClaimVerdict, FactorVerdict, answer_claim
from vaeq.report.outcomes import Outcome
from vaeq.report.runs import Run
from vaeq.report.table import setting_text
from vaeq.report.words import number


@dataclass(frozen=True)
class Verdict:
    """Three plain sentences first, fewer where a claim has no answer, then each claim."""

    bottom_line: tuple[str, ...]
    claims: tuple[ClaimVerdict, ...]


def judge(runs: Sequence[Run]) -> Verdict:
    """Answer both claims from complete runs."""
    claims = (
        answer_claim(
            "More latent dimensions bring the codes closer to N(0, I)", ("latent_dim",), runs
        ),
        answer_claim(
            "A deeper or wider encoder brings the codes closer to N(0, I)",
            ("encoder_depth", "encoder_width"),
            runs,
        ),
    )
    return Verdict(_bottom_line(*claims), claims)


def _bottom_line(dimensions: ClaimVerdict, encoder: ClaimVerdict) -> tuple[str, ...]:
    sentences = []
    for verdict in dimensions.factors:
        sentences += [_each_dimension(verdict), _jointly(verdict)]
    if encoder.factors:
        sentences.append("; ".join(_encoder(verdict) for verdict in encoder.factors) + ".")
        sentences[-1] = f"Claim 2, {sentences[-1]}"
    for n, claim in enumerate((dimensions, encoder), start=1):
        if not claim.factors:
            why = claim.unanswered.split(". ")[0]
            sentences.append(f"{why}, so claim {n} has no answer here.")
    return tuple(sentences)


def _word(outcome: Outcome) -> str:
    """What an outcome makes of a claim that something comes closer."""
    if outcome.answer == "not measured":
        return "not measured"
    return {"closer": "confirmed", "further": "refuted", "no clear change": "undecided"}[
        outcome.direction
    ]


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
    if outcome.answer == "not measured":
        return "Whether the single dimensions come closer to N(0, 1) was not measured."
    active = verdict.outcome("dimension_kl_mean_active")
    but = ""
    if active.answer not in ("not measured", outcome.answer):
        but = f"; over the active dimensions alone: {active.answer}, {active.effect_text()}"
    return (
        f"One dimension at a time, claim 1 is {_word(outcome)}{_one_seed(verdict)}: with more "
        f"latent dimensions the mean KL per dimension {_span(outcome, verdict.factor)}{but}."
    )


def _jointly(verdict: FactorVerdict) -> str:
    """The joint answer: the certified one where there is one, else that of marginal_kl."""
    outcome = verdict.outcome("marginal_kl")
    certified = [each.order for each in verdict.orderings if each.order]
    if outcome.answer == "not measured" and not certified:
        return "Whether they come closer jointly was not measured."
    word = _word(outcome)
    if outcome.answer == "saturated":
        word += " for the training images"
    text = f"Jointly claim 1 is {word}: KL(q_N‖p) {_span(outcome, verdict.factor)}"
    if outcome.answer == "saturated":
        text += (
            f", saturated {verdict.saturated} (the mutual information is near its ceiling log N, "
            "so the size is that of kl_per_image − log N)"
        )
    if not verdict.orderings:
        return text + "; no bracket was measured, so nothing is certified for the population."
    pairs = len(verdict.orderings)
    if not certified:
        return text + f"; for the population it is undecided, no pair of {pairs} being certified."
    counts = [
        f"{certified.count(order)} as {order}"
        for order in ("further", "closer")
        if order in certified
    ]
    words = {"further": "refuted", "closer": "confirmed"}
    population = words[certified[0]] if len(set(certified)) == 1 else "undecided"
    return text + (
        f"; for the population it is {population}, {' and '.join(counts)} of {pairs} "
        f"pair{'s' if pairs > 1 else ''} being certified."
    )


def _encoder(verdict: FactorVerdict) -> str:
    low, high = setting_text(verdict.levels[0]), setting_text(verdict.levels[-1])
    word = "deeper" if verdict.factor == "encoder_depth" else "wider"
    parts = []
    for label, metric in (
        ("one dimension at a time", "dimension_kl_mean"),
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
        text = f"{_word(outcome)} {label}"
        if len(where) > 1:
            by = [f"{answer} at {', '.join(dims)}" for answer, dims in where.items()]
            by[0] = by[0].replace(" at ", " at latent_dim ", 1)
            parts.append(f"{text} ({', '.join(by)}; pooled: {pooled})")
        else:
            parts.append(f"{text} ({pooled})")
    return (
        f"a {word} encoder ({verdict.factor} {low} → {high}{_one_seed(verdict, ', one seed')}), "
        f"is {' and '.join(parts)}"
    )


def _one_seed(verdict: FactorVerdict, words: str = " (one seed)") -> str:
    return words if len(verdict.seeds) == 1 else ""
