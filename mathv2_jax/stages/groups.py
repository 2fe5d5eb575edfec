"""The answers to one task, scored: advantages, records and a step's scalars."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from mathv2_jax import records, roles
from mathv2_jax.rl import grpo
from mathv2_jax.stages import scoring
from mathv2_jax.stages import tasks as tasks_lib


@dataclasses.dataclass(frozen=True)
class Group:
    """The answers to one task, scored. `advantages` is aligned with `kept`, the answers' places."""

    answered: tuple[scoring.Answered, ...]
    scored: tuple[scoring.Scored, ...]
    kept: tuple[int, ...]
    advantages: np.ndarray

    @property
    def task(self) -> tasks_lib.Task:
        """What was asked."""
        return self.answered[0].task

    @property
    def has_signal(self) -> bool:
        """Whether any answer was better than another."""
        return bool(np.any(self.advantages != 0.0))

    @property
    def head_label(self) -> float | None:
        """The verifier head's target at the end of the prompt; a verifier's task only."""
        return self.task.label if self.task.role.name == roles.VERIFIER else None


def make_group(
    answered: Sequence[scoring.Answered], scored: Sequence[scoring.Scored], kind: str
) -> Group:
    """Advantages (of a `kind` of grpo.ADVANTAGES) over the answers that have a reward."""
    kept = tuple(i for i, s in enumerate(scored) if s.components is not None)
    totals = [s.components["total"] for s in scored if s.components is not None]
    return Group(tuple(answered), tuple(scored), kept, grpo.advantages(totals, kind))


def to_samples(stage: str, step: int, groups: Sequence[Group]) -> list[records.Sample]:
    """Every answer of the step, each followed by the opinions that the judge gave on it."""
    found = []
    for place, group in enumerate(groups):
        advantages = dict(zip(group.kept, group.advantages, strict=True))
        for index, (answered, scored) in enumerate(zip(group.answered, group.scored, strict=True)):
            task, name = answered.task, f"{stage}/{step}/{place}/{index}"
            sample = roles.make_sample(
                answered.opinion,
                id=name,
                role=task.role.name,
                stage=stage,
                step=step,
                problem_id=task.problem_id,
                target=task.target,
                index=index,
                statement=task.statement,
                proof=task.proof,
                analysis=task.analysis,
                label=task.label,
                advantage=float(advantages[index]) if index in advantages else None,
                rewards=dict(scored.components or {}),
                votes=tuple(roles.votes(scored.verifier)),
                meta_votes=tuple(roles.votes(scored.meta)),
            )
            found += [sample, *_judgements(sample, answered, scored)]
    return found


def _judgements(
    sample: records.Sample, answered: scoring.Answered, scored: scoring.Scored
) -> Iterator[records.Sample]:
    """The judge's opinions of one answer: of its proof and of its analysis."""
    written = answered.opinion.written
    if written is None:
        return
    proof, analysis = sample.proof, answered.opinion.text
    if sample.role == roles.GENERATOR:
        proof, analysis = written.body, written.self_analysis
    for role, seen, opinions in (
        (roles.VERIFIER, "", scored.verifier),
        (roles.META_VERIFIER, analysis, scored.meta),
    ):
        for number, opinion in enumerate(opinions):
            yield roles.make_sample(
                opinion,
                id=f"{sample.id}/{role}/{number}",
                role=role,
                stage=sample.stage,
                step=sample.step,
                problem_id=sample.problem_id,
                target=sample.id,
                index=number,
                statement=sample.statement,
                proof=proof,
                analysis=seen,
            )


class Alarms:
    """Warns, once a stage and kind, where votes are lost or a policy's answers fail too often.

    `lost` limits the share of lost answers and of the judge's lost votes, `failed` that of a
    policy's answers that are unparseable, and that of those cut.
    """

    def __init__(self, stage: str, lost: float, failed: float):
        self._stage = stage
        self._waiting = {
            "lost_votes": (lost, "of the judge's votes are lost"),
            f"outcome/{records.Outcome.LOST}": (lost, "of the policy's answers are lost"),
            f"outcome/{records.Outcome.UNPARSEABLE}": (
                failed,
                "of the policy's answers are unparseable",
            ),
            f"outcome/{records.Outcome.LENGTH}": (
                failed,
                "of the policy's answers are cut at their limit",
            ),
        }

    def check(self, step: int, scalars: Mapping[str, float]) -> None:
        """Look at what `measure` gave for a step."""
        for name, (limit, what) in list(self._waiting.items()):
            share = scalars.get(name, 0.0)
            if share > limit:
                del self._waiting[name]
                logging.warning(
                    "%s, step %d: %.0f %% %s, the limit is %.0f %%; said once a stage",
                    self._stage,
                    step,
                    100 * share,
                    what,
                    100 * limit,
                )


def measure(groups: Sequence[Group]) -> dict[str, float]:
    """The step's scalars: reward components, outcomes, lengths, signal.

    A mean of nothing is left out: the reward where every answer left its group, `score` where none
    was parsed, `lost_votes` where no vote was asked.
    """
    answered = [a for g in groups for a in g.answered]
    scored = [s for g in groups for s in g.scored]
    parts: dict[str, list[float]] = {}
    for s in scored:
        for name, value in (s.components or {}).items():
            parts.setdefault(name, []).append(value)
    total = len(answered)
    scores = [a.opinion.score for a in answered if a.opinion.score is not None]
    judged = [o for s in scored for o in (*s.verifier, *s.meta)]
    outcomes = {
        f"outcome/{kind.value}": sum(a.opinion.outcome is kind for a in answered) / total
        for kind in records.Outcome
    }
    means: dict[str, Sequence[float | int]] = {
        "reward": parts.pop("total", []),
        **{f"reward/{name}": values for name, values in sorted(parts.items())},
        "length": [len(a.opinion.response.token_ids) for a in answered],
        "score": scores,
        "zero_signal": [not g.has_signal for g in groups],
        "lost_votes": [o.outcome is not records.Outcome.PARSED for o in judged],
    }
    return {
        **{name: float(np.mean(values)) for name, values in means.items() if values},
        **outcomes,
        "left_group": sum(s.components is None for s in scored) / total,
    }
