"""The answers to one task, scored: advantages, records and a step's scalars."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

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


class Tally(NamedTuple):
    """A sum and of how many."""

    total: float
    number: int


class Drawn(NamedTuple):
    """What is trained on of an answer: its tokens, their log-probabilities as the trainer is to
    meet them, and, where they are replayed, where its tokens were sent and what could be drawn.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    experts: records.Ints | None = None
    kept: tuple[tuple[int, ...] | None, ...] | None = None

    @classmethod
    def of(cls, response: records.Response) -> "Drawn":
        """That of a response; without what was kept of a token, the policy's own counts for it."""
        logprobs, kept = response.logprobs, response.kept
        if kept is not None:
            both = zip(logprobs, response.policy_logprobs, kept, strict=True)
            logprobs = tuple(policy if ids is None else own for own, policy, ids in both)
        return cls(response.token_ids, logprobs, response.experts, kept)

    @property
    def routing_NLA(self) -> np.ndarray | None:
        """The experts of its own tokens, -1 for the last, which was never fed."""
        if self.experts is None:
            return None
        sent_NLA = self.experts.array()
        return np.concatenate([sent_NLA[1:], np.full_like(sent_NLA[:1], -1)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What every process needs of a group, whichever answered it: what is trained on, and figures.

    `answers` are those kept, aligned with `advantages`.
    """

    prompt: tuple[int, ...]
    auto: bool
    has_signal: bool
    head_label: float | None
    advantages: tuple[float, ...]
    answers: tuple["Drawn", ...]
    tallies: Mapping[str, Tally]
    prompt_experts: records.Ints | None = None


def unscored(prompt: tuple[int, ...], responses: Sequence[records.Response]) -> Summary:
    """Answers that have no reward: for what is measured of their tokens alone."""
    return Summary(
        prompt=prompt,
        auto=False,
        has_signal=True,
        head_label=None,
        advantages=(0.0,) * len(responses),
        answers=tuple(map(Drawn.of, responses)),
        tallies={},
        prompt_experts=next((r.prompt_experts for r in responses if r.prompt_experts), None),
    )


def summarise(group: Group) -> Summary:
    """The group's part in its step."""
    responses = [group.answered[i].opinion.response for i in group.kept]
    return Summary(
        prompt=group.task.prompt,
        auto=group.task.auto,
        has_signal=group.has_signal,
        head_label=group.head_label,
        advantages=tuple(float(a) for a in group.advantages),
        answers=tuple(Drawn.of(r) for r in responses),
        tallies=_tallies(group),
        prompt_experts=next((r.prompt_experts for r in responses if r.prompt_experts), None),
    )


def make_group(
    answered: Sequence[scoring.Answered], scored: Sequence[scoring.Scored], kind: str
) -> Group:
    """Advantages (of a `kind` of grpo.ADVANTAGES) over the answers that have a reward."""
    kept = tuple(i for i, s in enumerate(scored) if s.components is not None)
    totals = [s.components["total"] for s in scored if s.components is not None]
    return Group(tuple(answered), tuple(scored), kept, grpo.advantages(totals, kind))


def to_samples(stage: str, step: int, groups: Mapping[int, Group]) -> list[records.Sample]:
    """Every answer of these groups of a step, each followed by the judge's opinions on it.

    `groups` is by the group's place in the step, which is part of a sample's id.
    """
    found = []
    for place, group in sorted(groups.items()):
        advantages = dict(zip(group.kept, group.advantages, strict=True))
        for index, (answered, scored) in enumerate(zip(group.answered, group.scored, strict=True)):
            task, name = answered.task, f"{stage}/{step}/{place}/{index}"
            sample = roles.make_sample(
                answered.opinion,
                id=name,
                role=roles.known_as(task.role.name),
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
                parents=task.parents,
            )
            found += [sample, *_judgements(sample, answered, scored)]
    return found


def in_order(samples: Iterable[records.Sample]) -> list[records.Sample]:
    """What the processes of a run wrote of a stage, in the order in which one would have."""

    def place(sample: records.Sample) -> tuple[int, int]:
        return sample.step, int(sample.id.removeprefix(f"{sample.stage}/").split("/")[1])

    return sorted(samples, key=place)


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


def measure(summaries: Sequence[Summary]) -> dict[str, float]:
    """The step's scalars: reward components, outcomes, lengths, signal.

    A mean of nothing is left out: the reward where every answer left its group, `score` where none
    was parsed, `lost_votes` where no vote was asked.
    """
    names = sorted({name for s in summaries for name in s.tallies})
    means = {}
    for name in names:
        tallies = [s.tallies[name] for s in summaries if name in s.tallies]
        means[name] = math.fsum(t.total for t in tallies) / sum(t.number for t in tallies)
    return means


def _tallies(group: Group) -> dict[str, Tally]:
    """Sums over a group's answers, without those of nothing."""
    values: dict[str, list[float]] = {}
    for scored in group.scored:
        for name, value in (scored.components or {}).items():
            values.setdefault("reward" if name == "total" else f"reward/{name}", []).append(value)
    opinions = [a.opinion for a in group.answered]
    judged = [o for s in group.scored for o in (*s.verifier, *s.meta)]
    values |= {
        "length": [float(len(o.response.token_ids)) for o in opinions],
        "score": [o.score for o in opinions if o.score is not None],
        "zero_signal": [float(not group.has_signal)],
        "lost_votes": [float(o.outcome is not records.Outcome.PARSED) for o in judged],
        "left_group": [float(s.components is None) for s in group.scored],
        "kept_unknown": [float(ids is None) for o in opinions for ids in o.response.kept or ()],
    }
    for kind in records.Outcome:
        values[f"outcome/{kind.value}"] = [float(o.outcome is kind) for o in opinions]
    return {name: Tally(math.fsum(found), len(found)) for name, found in values.items() if found}
