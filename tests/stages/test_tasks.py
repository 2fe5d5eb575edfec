"""What a policy is asked: prompts as their templates read, labels as they were given."""

import dataclasses

import pytest

from mathv2_jax import records
from mathv2_jax.stages import tasks
from tests import scripted
from tests.by_hand import PROOF, STATEMENT, VERDICTS, proof

ROLES = scripted.ROLES


def analysis(name, score, source="human"):
    label = None if score is None else records.Label(score=score, source=source, rubric="I_mv")
    return records.Analysis(
        id=name,
        problem_id="p",
        proof_id="y",
        statement=STATEMENT,
        proof=PROOF,
        text=VERDICTS[0.5],
        score=0.5,
        label=label,
    )


def test_a_generator_is_asked_the_problem_and_has_no_label(house):
    problem = records.Problem(id="x", statement=STATEMENT, source="s", cluster="c")
    task = tasks.make_task(ROLES.generator, house.tokenizer, problem)
    asked = scripted.shown(ROLES.generator, statement=STATEMENT)
    assert house.tokenizer.decode(task.prompt) == asked and STATEMENT in asked
    assert (task.label, task.auto, task.target, task.problem_id) == (None, False, "x", "x")


def test_a_verifier_is_asked_the_proof_and_labelled_by_its_score(house):
    labelled = [proof("a", score=0.0), proof("b", score=0.5, source="auto"), proof("c", score=1.0)]
    made = [tasks.make_task(ROLES.verifier, house.tokenizer, p) for p in labelled]
    assert [(t.target, t.label, t.auto) for t in made] == [
        ("a", 0.0, False),
        ("b", 0.5, True),
        ("c", 1.0, False),
    ]
    asked = scripted.shown(ROLES.verifier, statement=STATEMENT, proof=PROOF)
    assert {house.tokenizer.decode(t.prompt) for t in made} == {asked} and PROOF in asked
    assert {(t.statement, t.proof, t.analysis) for t in made} == {(STATEMENT, PROOF, "")}


def test_a_meta_verifier_is_asked_the_analysis_and_labelled_by_its_quality(house):
    labelled = [analysis("a", 0.0), analysis("b", 1.0, "auto")]
    made = [tasks.make_task(ROLES.meta_verifier, house.tokenizer, a) for a in labelled]
    assert [(t.target, t.label, t.auto) for t in made] == [("a", 0.0, False), ("b", 1.0, True)]
    fields = dict(statement=STATEMENT, proof=PROOF, analysis=VERDICTS[0.5])
    asked = scripted.shown(ROLES.meta_verifier, **fields)
    assert {house.tokenizer.decode(t.prompt) for t in made} == {asked}
    assert PROOF in asked and VERDICTS[0.5] in asked
    assert all(dataclasses.asdict(t).items() >= fields.items() for t in made)


def test_what_has_no_label_is_named(house):
    with pytest.raises(ValueError, match="proof u of '' has no label"):
        tasks.make_task(ROLES.verifier, house.tokenizer, proof("u"))
    with pytest.raises(ValueError, match="analysis u of '' has no label"):
        tasks.make_task(ROLES.meta_verifier, house.tokenizer, analysis("u", None))
