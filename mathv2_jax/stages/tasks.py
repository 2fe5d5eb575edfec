"""What a policy is asked in reinforcement learning: prompts of its roles with their labels."""

import dataclasses
from typing import Any

from mathv2_jax import records, roles
from mathv2_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt. `target` is the id of what is judged, the problem's for a generator.

    `label` is s or ms; a generator has none. `auto` tells machine labels from human ones. A
    generator that is shown an earlier attempt, a refiner, has that in `proof` and `analysis`, and
    its samples in `parents`.
    """

    role: roles.Role
    problem_id: str
    target: str
    statement: str
    proof: str = ""
    analysis: str = ""
    label: float | None = None
    auto: bool = False
    parents: tuple[str, ...] | None = None
    prompt: tuple[int, ...]


def make_task(
    role: roles.Role,
    tokenizer: tokenizer_lib.Tokenizer,
    record: records.Problem | records.Proof | records.Analysis,
) -> Task:
    """What a role is asked about a record of D_p, D_v or D_mv, or, a refiner, of `attempts`.

    ValueError names a proof or an analysis without a label.
    """
    fields: dict[str, Any] = dict(statement=record.statement)
    label, problem_id, target, parents = None, record.id, record.id, None
    if isinstance(record, records.Problem):
        pass
    elif isinstance(record, records.Proof):
        fields |= dict(proof=record.text)
        label, problem_id = _label_of(record, "proof"), record.problem_id
    elif role.name == roles.REFINER:
        fields |= dict(proof=record.proof, analysis=record.text)
        problem_id, target, parents = record.problem_id, record.problem_id, record.parents
    else:
        fields |= dict(proof=record.proof, analysis=record.text)
        label, problem_id = _label_of(record, "analysis"), record.problem_id
    return Task(
        role=role,
        problem_id=problem_id,
        target=target,
        label=None if label is None else label.score,
        auto=label is not None and label.source == "auto",
        parents=parents,
        prompt=role.prompt(tokenizer, **fields),
        **fields,
    )


def _label_of(record: records.Proof | records.Analysis, kind: str) -> records.Label:
    if record.label is None:
        raise ValueError(f"{kind} {record.id} of {record.source!r} has no label to learn from")
    return record.label
