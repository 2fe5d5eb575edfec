"""What a policy is asked in reinforcement learning: prompts of three roles with their labels."""

import dataclasses
from collections.abc import Sequence

from mathv2_jax import records, roles
from mathv2_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt. `target` is the id of what is judged, the problem's for a generator.

    `label` is s or ms; a generator has none. `auto` tells machine labels from human ones.
    """

    role: roles.Role
    problem_id: str
    target: str
    statement: str
    proof: str = ""
    analysis: str = ""
    label: float | None = None
    auto: bool = False
    prompt: tuple[int, ...]


def generator_tasks(
    role: roles.Role,
    tokenizer: tokenizer_lib.Tokenizer,
    problems: Sequence[records.Problem],
) -> list[Task]:
    """One task a problem of D_p."""
    return [
        Task(
            role=role,
            problem_id=p.id,
            target=p.id,
            statement=p.statement,
            prompt=role.prompt(tokenizer, statement=p.statement),
        )
        for p in problems
    ]


def verifier_tasks(
    role: roles.Role,
    tokenizer: tokenizer_lib.Tokenizer,
    proofs: Sequence[records.Proof],
) -> list[Task]:
    """One task a labelled proof of D_v; ValueError names an unlabelled one."""
    tasks = []
    for proof in proofs:
        if proof.label is None:
            raise ValueError(f"proof {proof.id} of {proof.source!r} has no label to learn from")
        tasks.append(
            Task(
                role=role,
                problem_id=proof.problem_id,
                target=proof.id,
                statement=proof.statement,
                proof=proof.text,
                label=proof.label.score,
                auto=proof.label.source == "auto",
                prompt=role.prompt(tokenizer, statement=proof.statement, proof=proof.text),
            )
        )
    return tasks


def meta_verifier_tasks(
    role: roles.Role,
    tokenizer: tokenizer_lib.Tokenizer,
    analyses: Sequence[records.Analysis],
) -> list[Task]:
    """One task a labelled analysis of D_mv; ValueError names an unlabelled one."""
    tasks = []
    for analysis in analyses:
        if analysis.label is None:
            raise ValueError(f"analysis {analysis.id} of {analysis.source!r} has no label")
        tasks.append(
            Task(
                role=role,
                problem_id=analysis.problem_id,
                target=analysis.id,
                statement=analysis.statement,
                proof=analysis.proof,
                analysis=analysis.text,
                label=analysis.label.score,
                auto=analysis.label.source == "auto",
                prompt=role.prompt(
                    tokenizer,
                    statement=analysis.statement,
                    proof=analysis.proof,
                    analysis=analysis.text,
                ),
            )
        )
    return tasks
