"""A judge is asked about graded proofs or analyses, as they are and under attack.

Its votes are records.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mathv2_jax import records, reward, roles, storage
from mathv2_jax.evaluation import agreement, benchmarks, injection, intervals
from mathv2_jax.rollout import durable

STAGE = "evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Who is asked, in which role, `name`, and for how many `votes` on a text."""

    name: str
    role: roles.Role
    respondent: roles.Respondent
    votes: int
    seed: int = 0


def ask(
    judge: Judge,
    items: Sequence[injection.Injected],
    folder: epath.Path,
    responses: durable.Responses,
    together: int,
) -> list[records.Sample]:
    """The votes on every item, in order: a part in `folder` for each `together` items.

    What a part holds is not asked again, nor what `responses` holds of the one that is not whole.
    ValueError where the parts hold other items.
    """
    parts = storage.Parts(folder)
    for step, at in enumerate(range(0, len(items), together), start=1):
        if storage.part_name(step) in parts.names():
            continue
        responses.begin(step)
        parts.write_part(
            storage.part_name(step), records.to_lines(_votes(judge, items[at : at + together]))
        )
        parts.commit(step)
        responses.drop_before(step + 1)
    found = [records.from_json(records.Sample, line) for line in parts.read()]
    there = {sample.id for sample in found}
    wanted = [name_of(item, index) for item in items for index in range(judge.votes)]
    if missing := [name for name in wanted if name not in there]:
        raise ValueError(
            f"{folder} lacks {len(missing)} votes, {missing[0]} among them: its files are of other "
            "items, or some are gone; take another folder"
        )
    return found


def _votes(judge: Judge, items: Sequence[injection.Injected]) -> list[records.Sample]:
    fields = [item.fields for item in items]
    # An attack is asked with the noise of the text as it is.
    keys = [item.record.id for item in items]
    seed = (judge.seed, STAGE)
    found = roles.ask(judge.respondent, judge.role, fields, judge.votes, seed, keys)
    return [
        roles.make_sample(
            opinion,
            id=name_of(item, index),
            role=judge.name,
            stage=STAGE,
            step=0,
            problem_id=item.record.problem_id,
            target=item.record.id,
            index=index,
            **{"analysis": "", **asked},
        )
        for item, asked, opinions in zip(items, fields, found, strict=True)
        for index, opinion in enumerate(opinions)
    ]


def name_of(item: injection.Injected, index: int) -> str:
    """The id of a vote."""
    return f"{STAGE}/{item.attack}/{item.record.id}/{index}"


def votes_by_item(
    items: Sequence[injection.Injected], samples: Sequence[records.Sample], votes: int
) -> list[list[float]]:
    """The parsed votes on each item; lost ones are left out."""
    scores = {s.id: s.score for s in samples}
    named = [[scores.get(name_of(item, n)) for n in range(votes)] for item in items]
    return [[score for score in own if score is not None] for own in named]


def rated(
    graded: Sequence[benchmarks.Graded], votes: Sequence[Sequence[float]]
) -> list[agreement.Rated]:
    """Graded texts under their mean vote and the majority's verdict."""
    return [
        benchmarks.as_rated(
            item,
            reward.mean(own) if own else None,
            reward.majority(own) if own else None,
        )
        for item, own in zip(graded, votes, strict=True)
    ]


def of_attacks(
    items: Sequence[injection.Injected], votes: Sequence[Sequence[float]], **draws: int
) -> dict[str, dict[str, Any]]:
    """JSON-able, for each attack, over the texts that have votes with and without it: the mean
    shift of the rating, and the shares whose verdict changes, and rises to 1."""
    plain = {
        item.record.id: own
        for item, own in zip(items, votes, strict=True)
        if item.attack == injection.NONE and own
    }
    found = {}
    for attack in injection.ATTACKS:
        pairs = [
            (item.record.problem_id, plain[item.record.id], own)
            for item, own in zip(items, votes, strict=True)
            if item.attack == attack and own and item.record.id in plain
        ]
        problems = [problem for problem, _, _ in pairs]
        verdicts = [(reward.majority(was), reward.majority(now)) for _, was, now in pairs]
        figures = {
            "shift": [reward.mean(now) - reward.mean(was) for _, was, now in pairs],
            "changed": [float(was != now) for was, now in verdicts],
            "raised_to_1": [float(was < 1.0 == now) for was, now in verdicts],
        }
        found[attack] = {
            name: dataclasses.asdict(intervals.mean(problems, values, **draws))
            for name, values in figures.items()
        }
    return found


def table(attacks: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| put after the text | n | rating shifts by | verdict changes | rises to 1 |",
        "|---|--:|---|---|---|",
    ]
    for attack, body in attacks.items():
        cells = [str(intervals.Figure(**body[n])) for n in ("shift", "changed", "raised_to_1")]
        lines.append(f"| {attack} | {body['shift']['items']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
