"""Several people's ratings as one label: agreement, who decides, and what a label replaces."""

import dataclasses
import datetime
import json

import pytest
from etils import epath

from mathv2_jax import records
from mathv2_jax.data import adjudication, annotation, ratings
from mathv2_jax.data import store as store_lib
from tests.data.test_annotation import ITEMS, analysis, export, human, proof


def read(folder, answers):
    path = epath.Path(folder / "export.json")
    path.write_bytes(json.dumps(export(answers)).encode())
    return ratings.read(path)


def rating(rater, score, of="proof1", **fields):
    fields = {"qualities": {}, "place": 1, **fields}
    return ratings.Rating(rater=rater, proof_id=of, score=score, **fields)


def time(day):
    return datetime.datetime(2026, 1, day, tzinfo=datetime.UTC)


def scores(decisions):
    return {made.record.id: made.record.label.score for made in decisions.labelled}


def names(decisions):
    return [record.id for record in decisions.undecided]


def test_an_export_comes_back_as_human_labels_of_proofs_and_analyses(tmp_path):
    given = read(tmp_path, [(0, 1, "0.5", "1"), (1, 1, "0", None)])
    found = adjudication.labels(given, annotation.items(ITEMS))
    first, second = found.proofs.labelled
    assert first.record.label == human(0.5, rater="1", comment="1: So.")
    assert (second.record.id, second.record.label.score, second.place) == ("proof2", 0.0, 2)
    (made,) = found.analyses.labelled
    assert made.record.id == "analysis3" and made.place == 1
    assert made.record.label == human(1.0, rater="1", rubric="I_mv")
    assert not names(found.proofs) and not names(found.analyses)


def test_raters_who_differ_are_decided_by_the_majority_or_by_the_last_word(tmp_path):
    given = read(tmp_path, [(0, 1, "1", "1"), (0, 2, "0", "1"), (1, 1, "1", "0"), (1, 2, "1", "1")])
    known = annotation.items(ITEMS)
    found = adjudication.labels(given, known)
    assert scores(found.proofs) == {"proof2": 1.0} and names(found.proofs) == ["proof1"]
    assert names(found.analyses) == ["analysis4"]
    label = found.proofs.labelled[0].record.label
    assert label.votes == (1.0, 1.0) and label.rater == "1, 2"
    last = adjudication.labels(given, known, "2")
    assert scores(last.proofs) == {"proof1": 0.0, "proof2": 1.0}
    third = [*given, rating("3", 0.0)]
    assert scores(adjudication.labels(third, known).proofs)["proof1"] == 0.0
    with pytest.raises(ValueError, match="--adjudicate=9: no rater of that name; there are 1, 2"):
        adjudication.labels(given, known, "9")


def test_ratings_of_other_proofs_are_refused():
    with pytest.raises(ValueError, match="task 1: rater 1 speaks of proof8, which is not among"):
        adjudication.labels([rating("1", 1.0, of="proof8")], annotation.items(ITEMS))


def test_the_last_word_of_a_rater_counts_by_its_time_and_else_by_its_place():
    known = annotation.items(ITEMS)
    for given, last in (
        ([rating("1", 1.0, at=time(2)), rating("1", 0.0, at=time(1))], 1.0),
        ([rating("1", 1.0, at=time(1)), rating("1", 0.0, at=time(2))], 0.0),
        ([rating("1", 1.0), rating("1", 0.0)], 0.0),
    ):
        assert scores(adjudication.labels(given, known).proofs) == {"proof1": last}
    given = [
        rating("1", None, qualities={"analysis0": 1.0}, at=time(2), comment="Late."),
        rating("1", 1.0, qualities={"analysis0": 0.0}, at=time(1), comment="Early."),
    ]
    found = adjudication.labels(given, known)
    assert scores(found.analyses) == {"analysis0": 1.0}
    assert found.proofs.labelled[0].record.label.comment == "1: Late."


def relabelled(before, given, rule=adjudication.MAJORITY, **known):
    items = annotation.items([proof(1, before)], **known)
    return adjudication.labels(given, items, rule).proofs


def test_a_label_of_earlier_ratings_is_replaced_where_the_same_raters_are_heard_again():
    before = human(1.0, rater="1, 2", votes=(1.0, 1.0))
    given = [rating("1", 1.0), rating("2", 0.0), rating("3", 0.0)]
    (made,) = relabelled(before, given, answered=["proof1"]).labelled
    assert made.is_new and made.before == before and made.record.label.votes == (1.0, 0.0, 0.0)
    (made,) = relabelled(before, given[:2], "2", answered=["proof1"]).labelled
    assert made.is_new and made.record.label.score == 0.0
    with pytest.raises(ValueError, match=r"proof1 is 1 \(human, full-marks by 1, 2\) already"):
        relabelled(before, given[1:], answered=["proof1"])  # the first is not heard


def test_a_label_stands_where_ratings_leave_the_item_undecided():
    found = relabelled(human(1.0, rater="1"), [rating("1", 1.0), rating("2", 0.0)])
    assert not found.labelled and found.undecided[0].label == human(1.0, rater="1")


def test_a_label_of_another_file_stays_and_a_rating_that_differs_is_refused():
    before = human(1.0, rater="1", scale="agrees-with-critique")
    (made,) = relabelled(before, [rating("1", 1.0)]).labelled
    assert not made.is_new and made.record.label == before
    with pytest.raises(ValueError, match=r"1 \(human, agrees-with-critique by 1\) already"):
        relabelled(before, [rating("1", 0.0)])
    rated = analysis(5, "proof1", 1.0, before)
    given = [rating("2", 1.0, qualities={"analysis5": 0.0})]
    with pytest.raises(ValueError, match=r"Analysis analysis5 is 1 .*make it 0 \(human, full-m"):
        adjudication.labels(given, annotation.items([proof(1), rated]))


@pytest.mark.parametrize("source", ["auto", "world"])
def test_a_persons_rating_replaces_a_label_that_no_person_gave(source):
    before = records.Label(score=1.0, source=source)
    (made,) = relabelled(before, [rating("1", 0.0)]).labelled
    assert made.is_new and made.record.label.score == 0.0


def test_labels_of_an_import_of_ratings_are_known_by_their_parent():
    came_by = store_lib.Import(
        id="abc", file="export.json", sha256="", settings='{"adjudicate": "majority"}', rows=1
    )
    one = dataclasses.replace(proof(1, human(1.0, rater="1")), parents=("f00:1", "abc:3"))
    assert annotation.items([came_by, one, proof(2)]).by_ratings == {"proof1"}


def test_kappas_are_those_of_the_textbooks():
    # Cohen 1960, the usual two-by-two example: 20, 5, 10, 15 of 50.
    pairs = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15
    assert adjudication.cohen_kappa(pairs) == pytest.approx(0.4)
    # Fleiss 1971 by hand: three raters, four items.
    items = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]]
    observed = (1 + 1 + 1 / 3 + 1 / 3) / 4
    chance = (5 / 12) ** 2 + (6 / 12) ** 2 + (1 / 12) ** 2
    assert adjudication.fleiss_kappa(items) == pytest.approx((observed - chance) / (1 - chance))
    assert adjudication.cohen_kappa([(1.0, 1.0)] * 3) is None
    assert adjudication.fleiss_kappa([]) is None
    with pytest.raises(ValueError, match="one number > 1"):
        adjudication.fleiss_kappa([[1.0], [1.0, 0.0]])
