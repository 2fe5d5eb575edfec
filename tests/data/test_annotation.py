"""Proofs out to people and their ratings back; what they differ about is told."""

import csv
import io
import json
import xml.etree.ElementTree as etree

import pytest
from etils import epath

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


def analysis(number, of, score):
    return records.Analysis(
        id=f"analysis{number}",
        problem_id="p",
        proof_id=of,
        statement=STATEMENT,
        proof="",
        text=parse.write_analysis(f"Thought {number}.", score),
        score=score,
    )


LABELLED = proof(9, records.Label(score=1.0, source="human"))
ITEMS = [
    proof(1),
    proof(2),
    LABELLED,
    *(analysis(n, "proof1", 1.0) for n in range(3)),
    analysis(3, "proof1", 0.0),
    analysis(4, "proof2", 0.5),
]


def test_what_waits_for_people_are_proofs_without_a_label_with_unlike_analyses():
    first, second = annotation.tasks(ITEMS, most=2)
    assert (first.proof.id, second.proof.id) == ("proof1", "proof2")
    assert [a.id for a in first.analyses] == ["analysis3", "analysis0"]  # the rarer score first
    assert [a.id for a in second.analyses] == ["analysis4"]


def test_a_sampled_analysis_becomes_a_record_that_names_its_sample():
    text = parse.write_analysis("Fine.", 0.5)
    sample = records.Sample(
        id="s",
        role="verifier",
        stage="label",
        step=0,
        problem_id="p",
        target="proof1",
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
    )
    (task,) = annotation.tasks([proof(1), sample])
    (found,) = task.analyses
    assert (found.text, found.score, found.parents, found.proof_id) == (text, 0.5, ("s",), "proof1")


def test_the_page_asks_for_a_score_and_a_rating_of_each_analysis():
    page = etree.fromstring(annotation.labelling_config(4))
    choices = {c.get("name"): [x.get("value") for x in c] for c in page.iter("Choices")}
    assert choices == {
        n: ["0", "0.5", "1"] for n in ("score", *(f"quality_{i}" for i in range(1, 5)))
    }
    shown = {tag.get("value") for tag in page.iter("HyperText")}
    files = annotation.project(annotation.tasks(ITEMS))
    for task in json.loads(files[annotation.TASKS]):
        assert shown <= {f"${name}" for name in task["data"]}


def export(answers):
    """What Label Studio exports: (task number, rater, score, quality of the first analysis)."""
    tasks = json.loads(annotation.project(annotation.tasks(ITEMS))[annotation.TASKS])
    for task in tasks:
        task["annotations"] = []
    for at, rater, score, quality in answers:
        result = [
            {"from_name": name, "type": "choices", "value": {"choices": [value]}}
            for name, value in (("score", score), ("quality_1", quality))
            if value is not None
        ]
        result.append({"from_name": "comment", "type": "textarea", "value": {"text": ["So."]}})
        tasks[at]["annotations"].append({"completed_by": rater, "result": result})
    return tasks


def read(folder, body, name="export.json"):
    path = epath.Path(folder / name)
    path.write_bytes(body if isinstance(body, bytes) else json.dumps(body).encode())
    return annotation.read(path)


def test_an_export_comes_back_as_human_labels_of_proofs_and_analyses(tmp_path):
    ratings = read(tmp_path, export([(0, 1, "0.5", "1"), (1, 1, "0", None)]))
    found = annotation.labels(ratings, annotation.tasks(ITEMS))
    assert [(p.id, p.label.score, p.label.source, p.label.rubric) for p in found.proofs] == [
        ("proof1", 0.5, "human", "I_v"),
        ("proof2", 0.0, "human", "I_v"),
    ]
    assert found.proofs[0].label.comment == "1: So." and found.proofs[0].label.scale == "full-marks"
    assert [(a.id, a.label.score, a.label.rubric) for a in found.analyses] == [
        ("analysis3", 1.0, "I_mv")
    ]
    assert not found.open_proofs and not found.open_analyses


def test_a_cancelled_annotation_counts_for_nothing(tmp_path):
    body = export([(0, 1, "0.5", None)])
    body[0]["annotations"][0]["was_cancelled"] = True
    assert read(tmp_path, body) == []


def test_raters_who_differ_are_decided_by_the_majority_or_by_the_last_word(tmp_path):
    body = export([(0, 1, "1", "1"), (0, 2, "0", "1"), (1, 1, "1", "0"), (1, 2, "1", "1")])
    ratings, tasks = read(tmp_path, body), annotation.tasks(ITEMS)
    found = annotation.labels(ratings, tasks)
    assert [p.id for p in found.proofs] == ["proof2"] and found.open_proofs == ["proof1"]
    assert found.open_analyses == ["analysis4"]
    assert found.proofs[0].label.votes == (1.0, 1.0) and found.proofs[0].label.rater == "1, 2"
    last = annotation.labels(ratings, tasks, "2")
    assert {p.id: p.label.score for p in last.proofs} == {"proof1": 0.0, "proof2": 1.0}
    third = [*ratings, *read(tmp_path, export([(0, 3, "0", None)]))]
    assert {p.id: p.label.score for p in annotation.labels(third, tasks).proofs}["proof1"] == 0.0
    with pytest.raises(ValueError, match="--adjudicate=9: no rater of that name; there are 1, 2"):
        annotation.labels(ratings, tasks, "9")


def test_a_filled_in_table_comes_back_too(tmp_path):
    table = annotation.project(annotation.tasks(ITEMS))[annotation.TABLE].decode()
    rows = list(csv.DictReader(io.StringIO(table, newline="")))
    assert rows[0]["proof"] == "By $x^1$.\nDone."
    rows[0] |= dict(score="1", rater="ab", quality_2=" 0.5 ", comment="Nice.")
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (rating,) = read(tmp_path, out.getvalue().encode(), "tasks.csv")
    assert (rating.rater, rating.score, rating.comment) == ("ab", 1.0, "Nice.")
    assert list(rating.qualities.values()) == [0.5]
    with pytest.raises(ValueError, match="row 1 has no rater"):
        read(tmp_path, out.getvalue().replace("ab", "").encode(), "tasks.csv")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "no JSON export"),
        ({"a": 1}, "no list of tasks"),
        ([{"proof_id": "x"}], "export as JSON, not JSON-MIN"),
        ([{"data": {}, "annotations": []}], "has no proof_id"),
    ],
)
def test_another_file_is_refused(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, body)


def test_ratings_of_other_proofs_are_refused(tmp_path):
    ratings = read(tmp_path, export([(0, 1, "1", None)]))
    with pytest.raises(ValueError, match="speaks of proof1, which does not wait"):
        annotation.labels(ratings, annotation.tasks(ITEMS[1:]))


def test_kappas_are_those_of_the_textbooks():
    # Cohen 1960, the usual two-by-two example: 20, 5, 10, 15 of 50.
    pairs = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15
    assert annotation.cohen_kappa(pairs) == pytest.approx(0.4)
    # Fleiss 1971 by hand: three raters, four items.
    items = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]]
    observed = (1 + 1 + 1 / 3 + 1 / 3) / 4
    chance = (5 / 12) ** 2 + (6 / 12) ** 2 + (1 / 12) ** 2
    assert annotation.fleiss_kappa(items) == pytest.approx((observed - chance) / (1 - chance))
    assert annotation.cohen_kappa([(1.0, 1.0)] * 3) is None
    assert annotation.fleiss_kappa([]) is None
    with pytest.raises(ValueError, match="one number > 1"):
        annotation.fleiss_kappa([[1.0], [1.0, 0.0]])
