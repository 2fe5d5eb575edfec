"""Every reward of the recipe on one page (arXiv 2511.22570, sections 2.1 to 2.3). No JAX.

Scores are 0, 0.5 or 1. A policy's own failure (unparseable, cut) earns 0; a judge's failure is a
lost vote and never enters a mean. Each function gives its components apart, `total` among them.
"""

import dataclasses
from collections.abc import Sequence

Components = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorWeights:
    """R = R_format (alpha R_Y + beta R_Z)."""

    alpha: float = 0.76
    beta: float = 0.24

    def __post_init__(self):
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha + self.beta - 1.0) > 1e-9:
            raise ValueError(
                f"reward.alpha = {self.alpha}, reward.beta = {self.beta}: neither is negative and "
                "their sum is 1"
            )


def agreement(predicted: float, label: float) -> float:
    """R_score(s', s) = 1 - |s' - s|."""
    return 1.0 - abs(predicted - label)


def malformed() -> Components:
    """What a policy's response earns without a final response in its format."""
    return {"format": 0.0, "total": 0.0}


def verifier(score: float, label: float) -> Components:
    """First pass: R_format R_score(s', s)."""
    fit = agreement(score, label)
    return {"format": 1.0, "score": fit, "total": fit}


def verifier_with_meta(score: float, label: float, meta_votes: Sequence[float]) -> Components:
    """Second pass: R_format R_score R_meta, R_meta the mean of the meta-verifier's votes.

    ValueError without a vote: such a sample leaves its group.
    """
    fit, meta = agreement(score, label), mean(meta_votes)
    return {"format": 1.0, "score": fit, "meta": meta, "total": fit * meta}


def meta_verifier(quality: float, label: float) -> Components:
    """R_format (1 - |ms' - ms|)."""
    fit = agreement(quality, label)
    return {"format": 1.0, "score": fit, "total": fit}


def generator(
    self_score: float,
    verifier_votes: Sequence[float],
    meta_votes: Sequence[float],
    weights: GeneratorWeights,
) -> Components:
    """R_format (alpha R_Y + beta R_Z), R_Z = R_score(s', R_Y) R_meta(Z).

    R_Y is the mean of the verifier's parsed votes on the proof, R_meta(Z) that of the
    meta-verifier's on the self-analysis. ValueError without votes.
    """
    proof, meta = mean(verifier_votes), mean(meta_votes)
    honesty = agreement(self_score, proof) * meta
    return {
        "format": 1.0,
        "proof": proof,
        "self": agreement(self_score, proof),
        "meta": meta,
        "honesty": honesty,
        "total": weights.alpha * proof + weights.beta * honesty,
    }


def mean(votes: Sequence[float]) -> float:
    """The mean of parsed votes; ValueError where all were lost."""
    if not votes:
        raise ValueError("no vote is left: a sample without votes leaves its group")
    return sum(votes) / len(votes)


def majority(votes: Sequence[float]) -> float:
    """The score with most votes, ties to the lower (ours); ValueError without votes."""
    if not votes:
        raise ValueError("no vote is left to take a majority of")
    return min(set(votes), key=lambda score: (-votes.count(score), score))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoLabelRule:
    """n analyses a proof; m meta-analyses for each that reports issues; at least k valid ones.

    An analysis is valid where a strict majority of its parsed meta-votes reach `confirm_at`.
    """

    num_analyses: int = 8
    num_meta: int = 3
    num_valid: int = 2
    confirm_at: float = 1.0

    def __post_init__(self):
        for name in ("num_analyses", "num_meta", "num_valid"):
            if getattr(self, name) < 1:
                raise ValueError(f"autolabel.{name} = {getattr(self, name)}: must be at least 1")
        if self.num_valid > self.num_analyses:
            raise ValueError(
                f"autolabel.num_valid = {self.num_valid}: cannot exceed num_analyses = "
                f"{self.num_analyses}"
            )
        if not 0.0 < self.confirm_at <= 1.0:
            raise ValueError(f"autolabel.confirm_at = {self.confirm_at}: must lie in (0, 1]")


def is_valid(meta_votes: Sequence[float], rule: AutoLabelRule) -> bool:
    """Whether a strict majority of the parsed meta-votes confirms the analysis."""
    confirmed = sum(vote >= rule.confirm_at for vote in meta_votes)
    return 2 * confirmed > len(meta_votes)


def auto_label(scores: Sequence[float], valid: Sequence[bool], rule: AutoLabelRule) -> float | None:
    """The label of a proof from its parsed analyses, or None where it stays undecided.

    `valid[i]` says whether analysis i, if it reports issues (score below 1), was confirmed. The
    lowest score wins if at least k of the analyses that gave it are valid; 1 where no valid issue
    stands anywhere; else undecided. So are proofs with fewer than k parsed analyses.
    """
    if len(scores) < rule.num_valid:
        return None
    confirmed = [v and s < 1.0 for s, v in zip(scores, valid, strict=True)]
    if not any(confirmed):
        return 1.0
    lowest = min(scores)
    at_lowest = sum(c for s, c in zip(scores, confirmed, strict=True) if s == lowest)
    return lowest if at_lowest >= rule.num_valid else None
