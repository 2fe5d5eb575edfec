"""What a refiner is shown and asked in reinforcement learning, and how its answers are recorded."""

from typing import Any

import pytest

from mathv2_jax import records, roles, storage
from mathv2_jax.cli import inputs
from mathv2_jax.rl import optimizer
from mathv2_jax.stages import attempts, groups, rejection, rl, scoring, sft, task_stream, tasks
from tests import scripted
from tests.by_hand import GENERATIONS, PROOF, STATEMENT, VERDICTS, answer, sample

ADAM = optimizer.OptimizerConfig(learning_rate=1e-3)
CONFIG = rl.RlConfig(steps=2, groups=2, samples=2, rows=2, row_length=400, optimizer=ADAM)
SFT = sft.SftConfig(steps=1, rows=1, row_length=8, optimizer=ADAM)
BOTH = {"generator": 0.75, "refiner": 0.25}


def stage(**fields):
    values = dict(name="r", init="start", judge="j", mixture=BOTH, attempts_from=("g",), rl=CONFIG)
    return rl.RlStage(**{**values, **fields})


def verdict(name, score, **fields):
    return sample(name, VERDICTS[score], score=score, **fields)


def generation(name, score, **fields):
    return sample(name, GENERATIONS[score], roles.GENERATOR, score=score, **fields)


def drawn_from(stream, number) -> list[Any]:
    return [stream[n] for n in range(number)]


def write(run, *found):
    for name in {s.stage for s in found}:
        parts = run.parts(name)
        lines = records.to_lines([s for s in found if s.stage == name])
        parts.write_part(storage.part_name(1), lines)
        parts.commit(1)


def test_attempts_are_proofs_with_analyses_that_report_issues_each_once(make_run):
    run = make_run()
    unread = dict(outcome=records.Outcome.UNPARSEABLE)
    write(
        run,
        generation("g/0/0/0", 0.5),  # its own doubts
        verdict("g/0/0/0/verifier/0", 0.0, target="g/0/0/0"),
        verdict("g/0/0/0/verifier/1", 0.0, target="g/0/0/0"),  # the same words
        generation("g/0/0/1", 1.0),  # content
        verdict("g/0/0/1/verifier/0", 1.0, target="g/0/0/1"),
        verdict("g/0/0/1/verifier/1", 0.5, proof="Step 1: A implies Q", **unread),
        sample("g/0/0/1/meta_verifier/0", VERDICTS[0.0], roles.META_VERIFIER, score=0.0),
        verdict("v/0/0/0", 0.0, proof="Step 1: A implies C", target="h"),  # of D_v
    )
    own, judged, labelled = attempts.with_issues(run, ["g", "v"])
    assert (own.proof, own.text, own.parents) == (PROOF, VERDICTS[0.5], ("g/0/0/0",))
    assert (judged.proof, judged.text) == (PROOF, VERDICTS[0.0])
    assert judged.parents == ("g/0/0/0", "g/0/0/0/verifier/0")
    assert (labelled.proof, labelled.parents) == ("Step 1: A implies C", ("h", "v/0/0/0"))
    assert {a.label for a in (own, judged, labelled)} == {None}
    assert attempts.with_issues(run, ["v"]) == [labelled]


def test_a_refiner_is_asked_for_the_problem_with_the_attempt_in_its_prompt(make_run):
    run = make_run()
    write(run, generation("g/0/0/0", 0.5))
    (attempt,) = attempts.with_issues(run, ["g"])
    task = tasks.make_task(scripted.ROLES.refiner, run.tokenizer, attempt)
    fields = dict(statement=STATEMENT, proof=PROOF, analysis=VERDICTS[0.5])
    assert run.tokenizer.decode(task.prompt) == scripted.shown(scripted.ROLES.refiner, **fields)
    assert (task.label, task.target, task.problem_id) == (None, "p", "p")
    assert task.parents == ("g/0/0/0",)


def test_refiners_have_their_share_of_the_tasks(make_run):
    run = make_run()
    problem = records.Problem(id="x", statement=STATEMENT, source="s", cluster="c")
    inputs.write_files(run.workdir, {"problems": [problem]})
    write(run, generation("g/0/0/0", 0.5), verdict("g/0/0/0/verifier/0", 0.0, target="g/0/0/0"))
    stream = task_stream.make(run, stage())
    drawn = drawn_from(stream, 80)
    assert sum(task.role.name == roles.REFINER for task in drawn) == 20
    assert {task.analysis for task in drawn} == {"", VERDICTS[0.5], VERDICTS[0.0]}


def test_without_an_attempt_the_generator_has_all_the_tasks_and_it_is_said(make_run, caplog):
    run = make_run()
    problem = records.Problem(id="x", statement=STATEMENT, source="s", cluster="c")
    inputs.write_files(run.workdir, {"problems": [problem]})
    write(run, generation("g/0/0/0", 1.0))
    stream = task_stream.make(run, stage())
    assert {task.role.name for task in drawn_from(stream, 8)} == {roles.GENERATOR}
    assert "r: no analysis of g reports an issue" in caplog.text
    with pytest.raises(ValueError, match="no source has a positive weight"):
        task_stream.make(run, stage(mixture={"refiner": 1.0}))


def test_a_refinement_is_recorded_as_a_generators_proof_and_imitated_under_its_prompt(make_run):
    run = make_run()
    write(run, generation("g/0/0/0", 0.5))
    (attempt,) = attempts.with_issues(run, ["g"])
    task = tasks.make_task(scripted.ROLES.refiner, run.tokenizer, attempt)
    said = answer(scripted.ROLES.refiner, GENERATIONS[1.0]).opinion
    answered = [scoring.Answered(task, said)] * 2
    scored = [scoring.Scored({"total": total}) for total in (0.5, 1.0)]
    group = groups.make_group(answered, scored, "mean")
    _, best = groups.to_samples("r", 0, {0: group})
    assert (best.role, best.parents) == (roles.GENERATOR, ("g/0/0/0",))
    assert (best.proof, best.analysis) == (PROOF, VERDICTS[0.5])
    write(run, best)
    again = rejection.RejectionStage(name="again", init="r", samples_from=("r",), sft=SFT)
    (found,) = rejection.best_responses(run, again)
    shown = scripted.shown(
        scripted.ROLES.refiner, statement=STATEMENT, proof=PROOF, analysis=VERDICTS[0.5]
    )
    assert (found.user, found.assistant) == (shown, GENERATIONS[1.0])


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (dict(attempts_from=()), "a refiner is shown attempts of the stages that"),
        (dict(mixture={"generator": 1.0}), "give both or neither"),
        (dict(judge=None), "a generator needs a judge"),
        (dict(mixture={"refiner": 1.0, "verifier": 1.0}), "a generator trains alone"),
    ],
)
def test_an_impossible_stage_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        stage(**fields)
