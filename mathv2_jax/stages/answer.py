"""The stage that answers the held-out test set; its records are what evaluation measures."""

import dataclasses
from collections.abc import Sequence

from mathv2_jax import records, reward
from mathv2_jax.evaluation import held_out
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import shares


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerStage:
    """Answers with the variables that stages `verifier` and `generator` left.

    The seed does not depend on the stage's name: two such stages draw the same noise for the
    same items, so their difference is paired.
    """

    name: str
    verifier: str
    generator: str
    num_autolabel: int = 300
    rule: reward.AutoLabelRule = dataclasses.field(default_factory=reward.AutoLabelRule)


def test_set(run: run_lib.Run, stage: AnswerStage) -> held_out.TestSet:
    """The held-out items of the run's input."""
    return held_out.TestSet(
        problems=run.input("test_problems", records.Problem),
        proofs=run.input("test_proofs", records.Proof),
        analyses=run.input("test_analyses", records.Analysis),
        num_autolabel=stage.num_autolabel,
        rule=stage.rule,
    )


def run_stage(run: run_lib.Run, stage: AnswerStage) -> dict[str, float]:
    """One part per chunk of items; parts that are there already are not asked again."""
    run.judge.load(run.variables(stage.verifier), stage.verifier)
    run.policy.load(run.variables(stage.generator), stage.generator)
    seed, test = run.seed_for("test set"), test_set(run, stage)
    answers = {
        replica: list(
            held_out.answers(
                held_out.Players(
                    roles=run.roles,
                    verifier=run.judge.engines[replica],
                    generator=run.policy.engines[replica],
                ),
                test,
                stage.name,
                seed,
            )
        )
        for replica in run.policy.engines
    }
    total = len(next(iter(answers.values())))
    shares.write_parts(
        run,
        stage.name,
        total,
        lambda replica, number: records.to_lines(answers[replica][number - 1]()),
    )
    samples = run.samples(stage.name)
    proofs = run.input("test_proofs", records.Proof)
    return {"answers": float(len(samples)), **agreement(samples, proofs)}


def agreement(
    samples: Sequence[records.Sample], proofs: Sequence[records.Proof]
) -> dict[str, float]:
    """How well the verifier's scores meet human labels, by the labels' scale; empty without any.

    `accuracy` counts an analysis that does not parse as wrong, `parsed` is the others' share.
    """
    labels = {p.id: p.label for p in proofs if p.label is not None}
    found: dict[str, list[tuple[bool, bool]]] = {}
    for sample in samples:
        label = labels.get(sample.target)
        if label is not None and sample.role == held_out.VERIFY:
            pair = (sample.score is not None, sample.score == label.score)
            found.setdefault(label.scale, []).append(pair)
    return {
        f"human/{scale}/{name}": value
        for scale, pairs in found.items()
        for name, value in (
            ("parsed", sum(parsed for parsed, _ in pairs) / len(pairs)),
            ("accuracy", sum(right for _, right in pairs) / len(pairs)),
            ("n", float(len(pairs))),
        )
    }
