"""What waits for people, and the project in which it goes to them."""

import csv
import dataclasses
import io
import json
import xml.etree.ElementTree as etree

from mathv2_jax import records
from mathv2_jax.data import annotation
from mathv2_jax.text import parse

STATEMENT = r"Show that $a < b$ & \[ \frac{1}{2} \ge 0 \] holds."


def proof(number, label=None):
    return records.Proof(
        id=f"proof{number}",
        problem_id="p",
        statement=STATEMENT,
        text=f"By $x^{number}$.\nDone.",
        label=label,
    )


def analysis(number, of, score, label=None):
    return records.Analysis(
        id=f"analysis{number}",
        problem_id="p",
        proof_id=of,
        statement=STATEMENT,
        proof=f"By $x^{of.removeprefix('proof')}$.\nDone.",
        text=parse.write_analysis(f"Thought {number}.", score),
        score=score,
        label=label,
        parents=(f"f00:{number}", f"row:a{number}"),
    )


def sample(of, text, **fields):
    return records.Sample(
        id="s",
        role="verifier",
        stage="label",
        step=0,
        problem_id="p",
        target=of,
        index=0,
        statement=STATEMENT,
        proof="P",
        analysis="",
        text=text,
        outcome=records.Outcome.PARSED,
        finish=records.Finish.STOP,
        num_tokens=3,
        checkpoint="v@1",
        score=0.5,
        **fields,
    )


def human(score, **fields):
    return records.Label(score=score, source="human", **fields)


LABELLED = proof(9, human(1.0))
ITEMS = [
    proof(1),
    proof(2),
    LABELLED,
    *(analysis(n, "proof1", 1.0) for n in range(3)),
    analysis(3, "proof1", 0.0),
    analysis(4, "proof2", 0.5),
]


def tasks(found, most=annotation.ANALYSES):
    return annotation.tasks(annotation.items(found), most)


def shown(task):
    return task.proof.id, [a.id for a in task.analyses]


def export(answers, items=ITEMS):
    """What Label Studio exports: (task number, rater, score, quality of the first analysis)."""
    body = json.loads(annotation.project(tasks(items))[annotation.TASKS])
    for task in body:
        task["annotations"] = []
    for at, rater, score, quality in answers:
        result = [
            {"from_name": name, "type": "choices", "value": {"choices": [value]}}
            for name, value in (("score", score), ("quality_1", quality))
            if value is not None
        ]
        result.append({"from_name": "comment", "type": "textarea", "value": {"text": ["So."]}})
        body[at]["annotations"].append({"completed_by": rater, "result": result})
    return body


def test_what_waits_for_people_are_proofs_without_a_label_with_unlike_analyses():
    first, second = tasks(ITEMS, most=2)
    assert shown(first) == ("proof1", ["analysis3", "analysis0"])  # the rarer score first
    assert shown(second) == ("proof2", ["analysis4"])


def test_a_sampled_analysis_becomes_a_record_that_names_its_sample():
    text = parse.write_analysis("Fine.", 0.5)
    (task,) = tasks([proof(1), sample("proof1", text)])
    (found,) = task.analyses
    assert (found.text, found.score, found.parents, found.proof_id) == (text, 0.5, ("s",), "proof1")


def test_analyses_of_a_proof_that_has_a_label_go_out_after_the_undecided_proofs():
    items = [LABELLED, analysis(5, "proof9", 1.0), sample("proof9", "So."), proof(1)]
    first, second = tasks(items)
    assert shown(first) == ("proof1", [])
    assert second.proof == LABELLED and len(second.analyses) == 2


def test_an_analysis_brings_its_proof_where_that_is_no_record():
    (task,) = tasks([analysis(5, "proof7", 1.0)])
    assert shown(task) == ("proof7", ["analysis5"])
    assert (task.proof.text, task.proof.statement) == ("By $x^7$.\nDone.", STATEMENT)
    assert task.proof.parents == ("f00:5",)  # and not the row's id


def test_what_has_a_label_is_not_asked_for_again():
    rated = analysis(5, "proof1", 1.0, human(1.0, scale="agrees-with-critique"))
    (task,) = tasks([proof(1), rated, analysis(6, "proof1", 0.0)])
    assert shown(task) == ("proof1", ["analysis6"])
    again = sample("proof1", rated.text)  # the same text as that of a rated record
    text_id = records.content_id("analysis", again.statement, again.proof, again.text)
    (task,) = tasks([proof(1), dataclasses.replace(rated, id=text_id), again])
    assert shown(task) == ("proof1", [])


def test_a_persons_label_hides_a_machines_wherever_it_stands():
    machine = proof(1, records.Label(score=0.0, source="auto"))
    for items in ([proof(1, human(1.0)), machine], [machine, proof(1, human(1.0)), proof(1)]):
        assert annotation.items(items).proofs["proof1"].label == human(1.0)


def test_the_page_asks_for_a_score_and_a_rating_of_each_analysis():
    page = etree.fromstring(annotation.labelling_config(4))
    choices = {c.get("name"): [x.get("value") for x in c] for c in page.iter("Choices")}
    assert choices == {
        n: ["0", "0.5", "1"] for n in ("score", *(f"quality_{i}" for i in range(1, 5)))
    }
    filled = {tag.get("value") for tag in page.iter("HyperText")}
    files = annotation.project(tasks(ITEMS))
    for task in json.loads(files[annotation.TASKS]):
        assert filled <= {f"${name}" for name in task["data"]}


def test_a_task_says_whether_the_score_of_its_proof_is_asked_for():
    files = annotation.project(tasks([proof(1), LABELLED, analysis(5, "proof9", 1.0)]))
    asked = [task["data"]["asked"] for task in json.loads(files[annotation.TASKS])]
    assert "score the proof" in asked[0] and "analyses only" in asked[1]
    page = etree.fromstring(files[annotation.CONFIG])
    assert not any(choices.get("required") for choices in page.iter("Choices"))
    table = csv.DictReader(io.StringIO(files[annotation.TABLE].decode(), newline=""))
    assert [row["asked"] in text for row, text in zip(table, asked, strict=True)] == [True, True]
