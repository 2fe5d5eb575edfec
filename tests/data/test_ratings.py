"""People's ratings as files bring them: exports of Label Studio, and the table filled in."""

import csv
import datetime
import io
import json

import pytest
from etils import epath

from mathv2_jax.data import annotation, ratings
from tests.data.test_annotation import ITEMS, analysis, export, proof, tasks


def read(folder, body, name="export.json"):
    path = epath.Path(folder / name)
    path.write_bytes(body if isinstance(body, bytes) else json.dumps(body).encode())
    return ratings.read(path)


def one(**changes):
    """An export of one annotation, with changes of it."""
    body = export([(0, 1, "1", "0.5")])
    body[0]["annotations"][0] |= changes
    return body


def filled(*changes, items=ITEMS):
    """The table, with changes of its first rows."""
    table = annotation.project(tasks(items))[annotation.TABLE].decode()
    rows = list(csv.DictReader(io.StringIO(table, newline="")))
    for row, change in zip(rows, changes, strict=False):
        row |= change
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def test_a_rating_holds_what_was_said_and_the_place_of_its_task(tmp_path):
    (rating,) = read(tmp_path, export([(1, "ada@example.org", "1", "0.5")]))
    assert rating == ratings.Rating(
        rater="ada@example.org",
        proof_id="proof2",
        score=1.0,
        qualities={"analysis4": 0.5},
        comment="So.",
        place=2,
    )


def test_a_cancelled_annotation_counts_for_nothing(tmp_path):
    assert read(tmp_path, one(was_cancelled=True)) == []


def test_a_field_that_the_team_added_is_left_alone(tmp_path):
    body = one()
    style = {"from_name": "quality_of_style", "type": "choices", "value": {"choices": ["nice"]}}
    stars = {"from_name": "stars", "type": "rating", "value": None}
    body[0]["annotations"][0]["result"] += [style, stars]
    assert read(tmp_path, body) == read(tmp_path, one())


def test_a_person_is_an_email_or_a_number_and_an_annotation_without_one_its_own_rater(tmp_path):
    people = [7, {"email": "ada@example.org", "id": 3}, {"id": 3}, None, {}]
    body = export([(0, by, "1", None) for by in people])
    for number, annotated in enumerate(body[0]["annotations"]):
        annotated["id"] = number
    found = [rating.rater for rating in read(tmp_path, body)]
    assert found == ["7", "ada@example.org", "3", "annotation 3", "annotation 4"]


def test_an_annotation_is_as_old_as_its_last_change(tmp_path):
    changed, made = "2026-03-02T10:00:00.5Z", "2026-03-01T10:00:00Z"
    (rating,) = read(tmp_path, one(updated_at=changed, created_at=made))
    assert rating.at == datetime.datetime(2026, 3, 2, 10, 0, 0, 500_000, tzinfo=datetime.UTC)
    assert read(tmp_path, one(created_at=made))[0].at.day == 1
    assert read(tmp_path, one())[0].at is None


def choice(**changes):
    return {"from_name": "score", "value": {"choices": ["1"]}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(result=None), "the result of an annotation is None, no list"),
        (dict(result=[None]), "a result is None, no object"),
        (dict(result=[{"value": {"choices": ["1"]}}]), "from_name of a result is None, no text"),
        (dict(result=[choice(value=None)]), "the value of score is None, no object"),
        (dict(result=[choice(value={})]), "choices of score is None, no list"),
        (dict(result=[choice(value={"choices": []})]), r"score must be one choice, it is \[\]"),
        (dict(result=[choice(value={"choices": ["0", "1"]})]), "must be one choice"),
        (dict(result=[choice(), choice()]), "must be one choice"),
        (dict(result=[choice(value={"choices": [None]})]), "None is none of 0, 0.5, 1"),
        (dict(result=[choice(value={"choices": ["0.3"]})]), "'0.3' is none of 0, 0.5, 1"),
        (dict(result=[choice(value={"choices": ["nan"]})]), "'nan' is none of"),
        (dict(result=[choice(from_name="comment", value={"text": [1]})]), "comment is 1, no text"),
        (dict(result=[choice(from_name="comment", value={})]), "comment is None, no text"),
        (dict(completed_by=None), "neither completed_by nor an id"),
        (dict(completed_by=[1]), r"completed_by is \[1\]"),
        (dict(updated_at="yesterday"), "updated_at is 'yesterday', no time"),
        (dict(updated_at=3), "updated_at is 3, no text"),
    ],
)
def test_a_malformed_annotation_is_an_error_that_names_file_and_task(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"export\.json, task 1: .*{message}"):
        read(tmp_path, one(**changes))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "no JSON export"),
        ({"a": 1}, "no list of tasks"),
        ([{"proof_id": "x"}], "task 1: .*export as JSON, not JSON-MIN"),
        ([None], "task 1: .*export as JSON, not JSON-MIN"),
        ([{"data": {}, "annotations": []}], "task 1 has no proof_id"),
        ([{"data": {"proof_id": {}}, "annotations": []}], "task 1: proof_id is {}, no text"),
        ([{"data": {"proof_id": "x"}, "annotations": [None]}], "task 1: an annotation is None"),
    ],
)
def test_another_file_is_refused(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, body)


def test_a_filled_in_table_comes_back(tmp_path):
    body = filled({}, dict(score="1", rater="ab", quality_1=" 0.5 ", comment="Nice."))
    (rating,) = read(tmp_path, body, "tasks.csv")
    assert (rating.rater, rating.score, rating.comment) == ("ab", 1.0, "Nice.")
    assert rating.qualities == {"analysis4": 0.5} and rating.place == 2
    with pytest.raises(ValueError, match="row 2 has no rater"):
        read(tmp_path, body.replace(b"ab", b""), "tasks.csv")


@pytest.mark.parametrize(
    ("text", "score"), [("1.0", 1.0), (".5", 0.5), ("0.50", 0.5), ("0.0", 0.0), (" 1 ", 1.0)]
)
def test_scores_in_a_table_are_the_numbers_that_they_are(tmp_path, text, score):
    (rating,) = read(tmp_path, filled(dict(score=text, quality_1=text, rater="ab")), "tasks.csv")
    assert rating.score == score and set(rating.qualities.values()) == {score}


def test_a_table_with_a_text_longer_than_csvs_limit_comes_back(tmp_path):
    body = filled(dict(score="1", rater="ab"), items=[proof(1), analysis(5, "proof1", 1.0)])
    before = csv.field_size_limit(1_000)  # its own is 131,072, or what another reader has set
    try:
        body = body.replace(b"Thought 5.", b"x" * 1_001)
        (rating,) = read(tmp_path, body, "tasks.csv")
        assert rating.score == 1.0 and csv.field_size_limit() == 1_000
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (filled(dict(score="0,5", rater="ab")), "row 1: score: '0,5' is none of"),
        (filled({}, dict(quality_4="1", rater="ab")), "row 2: quality_4 is filled in, but"),
        (filled(dict(proof_id="")), "row 1 has no proof_id: keep the columns of tasks.csv"),
        (b"proof_id,score\r\nx,1,2\r\n", "row 1 has more cells than the header"),
        (b"\xff", "no CSV file in UTF-8"),
    ],
)
def test_a_table_that_was_damaged_is_refused(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, body, "tasks.csv")
