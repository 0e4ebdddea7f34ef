"""A claim about the runs, answered factor by factor: outcomes, certified orders, and confounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vaeq.report.confounds import (
    block_notes,
    collapse_notes,
    projection_notes,
    reference_notes,
    saturated_where,
    saturation_notes,
)
from vaeq.report.orderings import Ordering, ordering_notes, orderings_of
from vaeq.report.outcomes import Outcome, blocks_of, common_levels, outcomes_of
from vaeq.report.runs import Run, Scalar
from vaeq.report.table import sort_key


@dataclass(frozen=True)
class FactorVerdict:
    """What the runs say about one factor, pooled and, for the encoder, by latent_dim."""

    factor: str
    levels: tuple[Scalar, ...]
    n_blocks: int
    seeds: tuple[int, ...]
    outcomes: tuple[Outcome, ...]
    strata: Mapping[Scalar, tuple[Outcome, ...]]
    orderings: tuple[Ordering, ...]
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


def answer_claim(claim: str, factors: Sequence[str], runs: Sequence[Run]) -> ClaimVerdict:
    """The verdict on a claim that names some factors."""
    judged = {factor: _factor(runs, factor) for factor in factors}
    silent = [factor for factor, verdict in judged.items() if verdict is None]
    answered = tuple(verdict for verdict in judged.values() if verdict is not None)
    return ClaimVerdict(claim, answered, _unanswered(runs, silent) if silent else "")


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
                dim: outcomes_of(
                    factor,
                    [b for b in blocks if next(iter(b.values())).settings["latent_dim"] == dim],
                )
                for dim in sorted(dims, key=sort_key)
            }
    outcomes = outcomes_of(factor, blocks)
    joint = next(outcome for outcome in outcomes if outcome.metric == "marginal_kl")
    where = saturated_where(factor, levels, complete)
    somewhere = any(
        outcome.metric == "marginal_kl" and outcome.answer == "closer"
        for stratum in strata.values()
        for outcome in stratum
    )
    seeds = tuple(sorted({run.seed for block in complete for run in block.values()}))
    orderings = orderings_of(levels, blocks)
    notes = (
        *block_notes(factor, levels, blocks, complete, seeds, outcomes),
        *saturation_notes(levels, complete, joint, where, somewhere),
        *collapse_notes(factor, levels, complete, outcomes),
        *projection_notes(factor, levels, complete),
        *ordering_notes(factor, orderings),
        *reference_notes(runs),
    )
    return FactorVerdict(
        factor, levels, len(complete), seeds, outcomes, strata, orderings, where, notes
    )


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
