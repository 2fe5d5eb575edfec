"""A verifier against people: every figure against cases worked by hand."""

import json

import pytest
from etils import epath

from mathv2_jax import records
from mathv2_jax.evaluation import agreement, benchmarks


def rated(*rows):
    """(people's score, rating, characters) a row; each of a problem of its own."""
    return [
        agreement.Rated(
            id=f"r{place}",
            problem_id=f"p{place}",
            source="odd" if place % 2 else "even",
            scale="full-marks",
            score=score,
            rating=rating,
            verdict=None if rating is None else agreement.nearest_score(rating),
            length=length,
            place=place,
        )
        for place, (score, rating, length) in enumerate(rows)
    ]


ROWS = rated(
    (1.0, 1.0, 10),
    (1.0, 0.75, 20),  # nearest: 0.5 and 1 are as near, the lower counts
    (0.5, 0.5, 30),
    (0.0, 0.95, 40),  # confidently wrong
    (0.0, 0.1, 50),
    (0.0, None, 60),  # not rated
)


def measured(items=ROWS):
    return agreement.measure(items, rounds=50)


def test_each_figure_by_hand():
    found = measured()
    assert found["items"] == 6 and found["answered"] == pytest.approx(5 / 6)
    assert found["exact"]["value"] == pytest.approx(3 / 5)
    assert (found["too_high"]["value"], found["too_low"]["value"]) == (1 / 5, 1 / 5)
    assert found["mean_error"]["value"] == pytest.approx((0 + 0.25 + 0 + 0.95 + 0.1) / 5)
    # Ratings of 1: 1.0 and 0.75, of others 0.5, 0.95, 0.1: five of six pairs are in order.
    assert found["auc"]["value"] == pytest.approx(5 / 6)
    assert found["constant"] == pytest.approx(2 / 5)
    assert found["confusion"] == [[1, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert [r["items"] for r in found["calibration"]] == [1, 1, 1, 2]
    assert found["calibration"][-1] == {"items": 2, "rating": 0.975, "score": 0.5}
    gaps = 0.1 + 0.0 + 0.25 + 2 * 0.475
    assert found["calibration_error"]["value"] == pytest.approx(gaps / 5)
    assert [row["upto"] for row in found["length_bias"]] == [20, 40, 50]
    assert found["length_bias"][0]["value"] == pytest.approx(-0.125)
    assert [case["id"] for case in found["confidently_wrong"]] == ["r3"]


def test_ties_of_ratings_count_half_in_the_auc():
    found = measured(rated((1.0, 0.5, 1), (0.0, 0.5, 1), (0.0, 0.2, 1)))
    assert found["auc"]["value"] == pytest.approx(0.75)
    assert measured(rated((1.0, 0.5, 1)))["auc"]["value"] is None


@pytest.mark.parametrize(
    ("rating", "score"), [(0.0, 0.0), (0.25, 0.0), (0.26, 0.5), (0.75, 0.5), (0.76, 1.0)]
)
def test_a_verdict_is_the_nearest_score_and_the_lower_of_two(rating, score):
    assert agreement.nearest_score(rating) == score


def test_groups_are_measured_apart_and_the_table_shows_them():
    found = agreement.by_group(ROWS, rounds=50)
    assert list(found) == ["all", "source even", "source odd"]
    assert found["source odd"]["items"] == 3
    shown = agreement.table(found)
    assert "| source odd | 3 |" in shown and "r3 (odd): people 0, rating 0.950" in shown


def graded(tmp_path, *rows):
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return epath.Path(path)


def test_analyses_are_read_with_what_people_thought_of_them(tmp_path):
    critique = dict(analysis="A gap. <verification>false</verification>", **ROW)
    rows = [
        {**critique, "human_agrees_with_analyst": False},
        {**critique, "human_agrees_with_analyst": None, "verdict": 0},  # nobody judged it
    ]
    path = graded(tmp_path, *rows)
    (found,) = benchmarks.read(path, SCALE, "auto", records.Analysis)
    assert isinstance(found.record, records.Analysis)
    assert found.record.score == 0.0 and "A gap." in found.record.text
    (rated,) = benchmarks.rated([found])
    assert (rated.score, rated.rating, rated.length) == (0.0, 0.9, len(found.record.text))


ROW = dict(id="a", source="s", problem="Show A.", proof="A by GPT-4.", score=1, auto=0.9)
SCALE = benchmarks.Scale(scale="full-marks")


def test_graded_rows_are_read_as_they_stand(tmp_path):
    """Copies, and proofs that name their writer, are measured on all the same."""
    path = graded(tmp_path, ROW, {**ROW, "id": "b", "auto": None}, {**ROW, "score": None})
    found = benchmarks.rated(benchmarks.read(path, SCALE, "auto"))
    assert [(r.id, r.rating, r.verdict, r.score) for r in found] == [
        ("a", 0.9, 1.0, 1.0),
        ("b", None, None, 1.0),
    ]


@pytest.mark.parametrize(
    ("change", "column", "message"),
    [
        ({}, "autos", "no row has a column 'autos'"),
        (dict(auto=3), "auto", "line 1: auto is 3: a mean score lies"),
        (dict(auto=None), "auto", "no graded row has a number in its column 'auto'"),
        (
            dict(schema=1, kind="Proof"),
            "auto",
            "line 1: it is a Proof record of ours, which holds no rating",
        ),
        (dict(score=0.3), "auto", "line 1: score 0.3 is none of"),
        (dict(score=None), "auto", "holds no graded proof"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, change, column, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.read(graded(tmp_path, {**ROW, **change}), SCALE, column)


def test_a_file_without_rows_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no row"):
        benchmarks.read(graded(tmp_path), SCALE, "auto")
