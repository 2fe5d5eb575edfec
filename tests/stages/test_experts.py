"""Experts' labels of a generator's proofs: what is asked, what is answered, what is refused."""

import dataclasses

import pytest

from mathv2_jax import records, roles, storage
from mathv2_jax.cli import inputs
from mathv2_jax.stages import experts
from mathv2_jax.text import parse
from mathv2_jax.world import corpus, judge
from tests.by_hand import VERDICTS, proof, sample

WORLD = corpus.WorldConfig(label_error=0.2)
STATEMENT = "Given: A. Rules: (1) A implies B (2) B implies C. Show: C."
PROOFS = ("Step 1: A implies C", "Step 1: A implies B\nStep 2: B implies C", "Step 1: A implies B")
TRUE = (0.0, 1.0, 0.0)


def stage(**fields):
    return experts.ExpertsStage(
        **{"name": "grade", "proofs_from": "gen", "num_proofs": 9, **fields}
    )


@pytest.fixture
def run(make_run):
    """A run whose generator wrote PROOFS, oldest first."""
    run = make_run()
    found = [
        sample(
            f"gen/{step}/0/0",
            parse.write_generation(text, VERDICTS[1.0]),
            roles.GENERATOR,
            statement=STATEMENT,
        )
        for step, text in enumerate(PROOFS)
    ]
    parts = run.parts("gen")
    parts.write_part(storage.part_name(1), records.to_lines(found))
    parts.commit(1)
    return run


def wanted(run):
    return run.stage_records("grade-wanted", records.Proof)


def labelled(found, score=0.5, source="human", **fields):
    label = records.Label(score=score, source=source, rater="me", **fields)
    return [dataclasses.replace(p, label=label) for p in found]


def answer(run, proofs):
    inputs.write_files(run.workdir, {"experts/grade": proofs})


def test_without_an_answer_the_run_says_what_it_waits_for_and_goes_on_once_it_is_there(run):
    with pytest.raises(
        ValueError, match="3 proofs wait for experts in .*grade-wanted/part-000001.jsonl; copy"
    ):
        experts.run_stage(run, stage())
    asked = wanted(run)
    assert [p.text for p in asked] == list(reversed(PROOFS))  # the newest first
    assert [p.label for p in asked] == [None] * 3
    answer(run, labelled(asked[:2]))
    figures = experts.run_stage(run, stage())
    assert figures == {"wanted": 3.0, "labelled": 2.0, "mean_label": 0.5}
    assert run.stage_records("grade", records.Proof) == labelled(asked[:2])


def test_no_more_are_wanted_than_asked_for(run):
    answer(run, [])
    with pytest.raises(ValueError, match="holds no labelled proof"):
        experts.run_stage(run, stage(num_proofs=2))
    assert [p.text for p in wanted(run)] == [PROOFS[2], PROOFS[1]]


def test_while_it_waits_a_stage_may_be_changed_and_asks_anew(run):
    for number in (3, 2, 3):
        with pytest.raises(ValueError, match=f"{number} proofs wait for experts"):
            experts.run_stage(run, stage(num_proofs=number))
        assert len(wanted(run)) == number


def test_the_undecided_of_an_auto_labelling_stage_can_be_asked_about(run):
    undecided = [proof(f"p{n}", f"Proof {n}.") for n in range(3)]
    parts = run.parts("auto-undecided")
    parts.write_part(storage.part_name(1), records.to_lines(undecided))
    parts.commit(1)
    answer(run, labelled(undecided[:2], 1.0))
    asks = stage(proofs_from=None, undecided_from="auto", num_proofs=2)
    assert experts.run_stage(run, asks)["mean_label"] == 1.0
    assert wanted(run) == undecided[:2]


def test_the_worlds_experts_answer_by_themselves_each_time_the_same(run):
    run.ask_experts = inputs.world_experts(
        run.workdir, dataclasses.replace(WORLD, label_error=0.0), 0
    )
    experts.run_stage(run, stage())
    graded = {p.text: p.label for p in run.stage_records("grade", records.Proof)}
    assert tuple(graded[text].score for text in PROOFS) == TRUE
    assert {label.source for label in graded.values()} == {"world"}
    path = run.input_path("experts/grade")
    before = storage.read_bytes(path)
    experts.run_stage(run, stage())  # as after a kill
    assert storage.read_bytes(path) == before


def test_the_worlds_experts_err_as_often_as_those_of_d_v_and_not_by_order():
    proofs = corpus.graded_proofs(WORLD, 0, "train", 1000, labelled=False)
    graded = corpus.grade(WORLD, 0, proofs)
    wrong = sum(p.label.score != judge.judge_proof(p.statement, p.text).score for p in graded)
    assert abs(wrong - 200) <= 4 * (1000 * 0.2 * 0.8) ** 0.5
    assert corpus.grade(WORLD, 0, proofs[::-1]) == graded[::-1]
    assert corpus.grade(WORLD, 1, proofs) != graded


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda found: found, "line 1: proof .* has no label"),
        (lambda found: labelled(found, source="auto"), "an expert's is 'human'"),
        (lambda found: labelled(found, scale="opc-5-of-7"), "a label of scale 'opc-5-of-7'; exp"),
        (lambda found: labelled([*found, found[1]]), "line 4: proof .* stands in an earlier line"),
        (lambda found: labelled([*found, proof("other")]), "line 4: proof other is none of the"),
    ],
)
def test_an_answer_that_is_none_is_refused_with_its_line(run, change, complaint):
    with pytest.raises(ValueError, match="wait for experts"):
        experts.run_stage(run, stage())
    answer(run, change(wanted(run)))
    with pytest.raises(ValueError, match=complaint):
        experts.run_stage(run, stage())


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (dict(num_proofs=0), "num_proofs = 0"),
        (dict(undecided_from="auto"), "'gen' and 'auto'"),
        (dict(proofs_from=None), "None and None"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        stage(**fields)


def test_where_nothing_is_to_be_graded_nothing_is_waited_for_and_the_log_says_so(make_run, caplog):
    run = make_run()
    for folder in ("gen", "auto-undecided"):
        parts = run.parts(folder)
        parts.write_part(storage.part_name(1), records.to_lines([]))
        parts.commit(1)
    nothing = {"wanted": 0.0, "labelled": 0.0}
    assert experts.run_stage(run, stage()) == nothing
    assert experts.run_stage(run, stage(proofs_from=None, undecided_from="auto")) == nothing
    assert caplog.text.count("grade: there is no proof for experts to grade") == 2
    assert run.stage_records("grade", records.Proof) == []
