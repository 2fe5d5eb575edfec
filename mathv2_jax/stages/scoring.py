"""From a policy's opinions to rewards: the three reward schemes as functions passed to one loop.

The judge's failures are lost votes: they leave the means, and a sample with fewer than
`min_votes` leaves its group.
"""

import dataclasses
from collections.abc import Callable, Sequence

from mathv2_jax import records, reward, roles
from mathv2_jax.stages import tasks as tasks_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Votes asked per proof and per analysis, and how many must be parsed for a reward."""

    verifier_votes: int = 1
    meta_votes: int = 1
    min_votes: int = 1

    def __post_init__(self):
        for name in ("verifier_votes", "meta_votes", "min_votes"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge.{name} = {getattr(self, name)}: must be at least 1")
        if self.min_votes > min(self.verifier_votes, self.meta_votes):
            raise ValueError(f"judge.min_votes = {self.min_votes}: more than the votes asked")


@dataclasses.dataclass(frozen=True)
class Scored:
    """A sample's reward components (None: it leaves its group) and the judge's opinions of it."""

    components: reward.Components | None
    verifier: tuple[roles.Opinion, ...] = ()
    meta: tuple[roles.Opinion, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answered:
    """One sample with the task that it answers."""

    task: tasks_lib.Task
    opinion: roles.Opinion


# (answers, what the judge's seeds are made of, the place of the first answer among the step's)
Score = Callable[[Sequence[Answered], Sequence[object], int], list[Scored]]


def failed(opinion: roles.Opinion, *, mask_length: bool) -> Scored:
    """A policy's own failure earns 0; none where the engine lost it or length is masked."""
    masked = opinion.outcome is records.Outcome.LENGTH and mask_length
    if opinion.outcome is records.Outcome.LOST or masked:
        return Scored(None)
    return Scored(reward.malformed())


def by_label(answered: Answered) -> Scored:
    """First pass of the verifier, and the meta-verifier: the label decides."""
    task, written = answered.task, answered.opinion.written
    assert written is not None and task.label is not None
    if task.role.name == roles.META_VERIFIER:
        return Scored(reward.meta_verifier(written.score, task.label))
    return Scored(reward.verifier(written.score, task.label))


def label_scorer(*, mask_length: bool) -> Score:
    """Rewards from labels alone."""

    def score(answered: Sequence[Answered], seed: Sequence[object], start: int = 0) -> list[Scored]:
        return [
            failed(a.opinion, mask_length=mask_length) if a.opinion.written is None else by_label(a)
            for a in answered
        ]

    return score


def meta_scorer(
    judge: roles.Respondent, names: roles.Roles, config: JudgeConfig, *, mask_length: bool
) -> Score:
    """Second pass: a verifier's reward is multiplied by R_meta; meta-verifier items as before."""

    def score(answered: Sequence[Answered], seed: Sequence[object], start: int = 0) -> list[Scored]:
        asked = [
            place
            for place, a in enumerate(answered)
            if a.opinion.written is not None and a.task.role.name == roles.VERIFIER
        ]
        fields = [
            {"statement": a.task.statement, "proof": a.task.proof, "analysis": a.opinion.text}
            for a in (answered[place] for place in asked)
        ]
        keys = [start + place for place in asked]
        opinions = roles.ask(judge, names.meta_verifier, fields, config.meta_votes, seed, keys)
        found = dict(zip(asked, opinions, strict=True))
        scored = []
        for place, a in enumerate(answered):
            written = a.opinion.written
            if written is None:
                scored.append(failed(a.opinion, mask_length=mask_length))
            elif place not in found:
                scored.append(by_label(a))
            else:
                meta = found[place]
                votes = roles.votes(meta)
                components = None
                if len(votes) >= config.min_votes and a.task.label is not None:
                    components = reward.verifier_with_meta(written.score, a.task.label, votes)
                scored.append(Scored(components, meta=tuple(meta)))
        return scored

    return score


def generator_scorer(
    judge: roles.Respondent,
    names: roles.Roles,
    config: JudgeConfig,
    weights: reward.GeneratorWeights,
    *,
    mask_length: bool,
) -> Score:
    """R_format (alpha R_Y + beta R_Z), from the frozen verifier's sampled analyses."""

    def score(answered: Sequence[Answered], seed: Sequence[object], start: int = 0) -> list[Scored]:
        asked = [
            (place, a.task, a.opinion.written)
            for place, a in enumerate(answered)
            if a.opinion.written is not None
        ]
        proofs = [{"statement": task.statement, "proof": w.body} for _, task, w in asked]
        analyses = [
            {**fields, "analysis": w.self_analysis}
            for fields, (_, _, w) in zip(proofs, asked, strict=True)
        ]
        keys = [start + place for place, _, _ in asked]
        verified = roles.ask(judge, names.verifier, proofs, config.verifier_votes, seed, keys)
        checked = roles.ask(judge, names.meta_verifier, analyses, config.meta_votes, seed, keys)
        found = {
            place: (w, v, m) for (place, _, w), v, m in zip(asked, verified, checked, strict=True)
        }
        scored = []
        for place, a in enumerate(answered):
            if place not in found:
                scored.append(failed(a.opinion, mask_length=mask_length))
                continue
            w, verdicts, metas = found[place]
            votes, meta_votes = roles.votes(verdicts), roles.votes(metas)
            components = None
            if min(len(votes), len(meta_votes)) >= config.min_votes:
                components = reward.generator(w.score, votes, meta_votes, weights)
            scored.append(Scored(components, tuple(verdicts), tuple(metas)))
        return scored

    return score
