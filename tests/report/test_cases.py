"""Records that name each other become problems, proofs and what was said about them."""

from mathv2_jax import records
from mathv2_jax.report import cases
from mathv2_jax.text import parse
from tests.data.test_lineage import sample

ANALYSIS = parse.write_analysis("It holds.", 1.0)
TEXT = parse.write_generation("It is so.", ANALYSIS)
PROBLEM = records.Problem(id="prob", statement="Show it.", source="world", cluster="c")
LABEL = records.Label(score=0.5, source="auto", rater="ver", votes=(0.5, 0.5))


def generated(name, **fields):
    return sample(name, "generator", "prob", **{"text": TEXT, **fields})


def proof(name, **fields):
    body = dict(id=name, problem_id="prob", statement="Show it.", text="It is so.")
    return records.Proof(**{**body, **fields})


def only(items, stages=()):
    (chapter,) = cases.gather(items, stages)
    (case,) = chapter.cases
    return case


def test_a_generators_sample_is_read_and_judged_in_all_its_parts():
    case = only(
        [
            sample("a/meta/0", "meta_verifier", "a", score=0.5),
            sample("a/ver/0/meta", "meta_verifier", "a/ver/0", score=1.0),
            sample("a/ver/0", "verifier", "a", score=0.0),
            sample("a/ver/1", "verifier", "a", outcome=records.Outcome.LENGTH),
            generated("a"),
            PROBLEM,
        ]
    )
    assert (case.text, case.self_score, case.self_analysis) == ("It is so.", 1.0, ANALYSIS)
    assert case.votes == [0.0]  # a lost vote is no 0
    assert [(r.id, [m.id for m in r.metas]) for r in case.remarks] == [
        ("a/ver/0", ["a/ver/0/meta"]),
        ("a/ver/1", []),
    ]
    assert [meta.id for meta in case.metas] == ["a/meta/0"]


def test_labels_and_analyses_of_a_proofs_record_belong_to_the_sample_that_it_was_made_of():
    person = records.Label(score=0.0, source="human")
    case = only(
        [
            PROBLEM,
            proof("p", parents=("a",), label=LABEL),
            proof("p", parents=("a",), label=person),
            proof("p", parents=("a",), label=person),
            proof("p", parents=("a",)),
            sample("lab/0", "verifier", "p", score=0.5),
            generated("a"),
        ]
    )
    assert case.id == "a"
    assert case.labels == [LABEL, person]
    assert (case.label_by(people=False), case.label_by(people=True)) == (0.5, 0.0)
    assert [remark.id for remark in case.remarks] == ["lab/0"]


def test_a_proof_of_a_file_is_a_case_with_its_analyses_and_their_judgements():
    analysis = records.Analysis(
        id="v",
        problem_id="prob",
        proof_id="p",
        statement="Show it.",
        proof="It is so.",
        text=ANALYSIS,
        score=1.0,
        label=records.Label(score=1.0, source="world"),
    )
    judged = sample("m", "meta_verifier", "v", score=0.5, rewards={"total": 0.5})
    voted = sample("t", "verifier", "p", score=0.5)
    case = only([judged, analysis, voted, proof("p", source="putnam")])
    assert (case.id, case.source, case.votes) == ("p", "putnam", [0.5])  # a file's is no vote
    assert [remark.id for remark in case.remarks] == ["v", "t"]
    assert [meta.id for meta in case.remarks[0].metas] == ["m"]


def test_a_judgement_of_what_is_not_among_the_records_is_shown_with_its_own_prompt():
    lone = sample("x", "verifier", "gone", proof="An old proof.", score=0.0)
    meta = sample("y", "meta_verifier", "v", proof="Another.", analysis="I see.", score=0.0)
    (chapter,) = cases.gather([lone, meta])
    assert [case.text for case in chapter.cases] == ["Another.", "An old proof."]
    assert chapter.cases[0].remarks[0].text == "I see."
    assert chapter.problem.statement == "Show it."


def test_evaluations_answers_are_cases_with_the_judges_votes_and_labels():
    rows = [
        sample("end/prove/prob", "prove", "prob", stage="end", text=TEXT, proof="It is so."),
        sample("end/judge/prob", "judge", "prob", stage="end", score=0.5),
        sample("end/autolabel/p", "autolabel", "p", stage="end", label=0.0, votes=(0.0, 0.5)),
        sample("end/verify/p", "verify", "p", stage="end", score=1.0),
        proof("p", label=records.Label(score=1.0, source="world")),
    ]
    (chapter,) = cases.gather(rows)
    given, written = chapter.cases
    assert (written.id, written.votes) == ("end/prove/prob", [0.5])
    assert given.votes == [1.0]
    assert (given.label_by(people=False), given.label_by(people=True)) == (0.0, 1.0)


def test_an_unreadable_response_is_shown_whole():
    case = only([generated("a", text="I am lost", outcome=records.Outcome.LENGTH)])
    assert (case.text, case.self_score) == ("I am lost", None)


def test_cases_come_in_the_order_of_stages_steps_and_places():
    made = [
        generated("late/1/0/1", stage="late", step=1, index=1),
        generated("late/1/0/0", stage="late", step=1, index=0),
        generated("early/2/0/0", stage="early", step=2),
        generated("early/10/0/0", stage="early", step=10),
        proof("given"),
    ]
    (chapter,) = cases.gather(made, ["early", "late"])
    assert [case.id for case in chapter.cases] == [
        "given",
        "early/2/0/0",
        "early/10/0/0",
        "late/1/0/0",
        "late/1/0/1",
    ]


def test_a_problem_without_proofs_is_left_out():
    assert cases.gather([PROBLEM]) == []
