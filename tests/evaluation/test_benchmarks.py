"""Gradings from a file: what is read, left out and refused."""

import json

import pytest
from etils import epath

from mathv2_jax import records
from mathv2_jax.evaluation import benchmarks

ROW = dict(id="r0", source="imo", problem="Show X.", proof="By luck.", score=1, rated=0.7)
SCALE = benchmarks.Scale(scale="full-marks")


def read(tmp_path, *rows, scale=SCALE, **settings):
    path = epath.Path(tmp_path / "graded.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return benchmarks.read(path, scale, **settings)


def test_a_row_keeps_its_id_place_and_rating_and_an_ungraded_one_is_left_out(tmp_path):
    ungraded = {k: v for k, v in ROW.items() if k != "score"} | dict(id="r1", proof="By rule.")
    rows = [ROW, ungraded, ROW | dict(id="r2", proof="By hope.", score=0, rated=None)]
    found = read(tmp_path, *rows, rating="rated")
    assert [(g.id, g.place, g.rating) for g in found] == [("r0", 1, 0.7), ("r2", 3, None)]
    rated = benchmarks.rated(found)
    assert [(r.score, r.rating, r.verdict) for r in rated] == [(1.0, 0.7, 0.5), (0.0, None, None)]
    assert [r.length for r in rated] == [len("By luck."), len("By hope.")]


def test_our_records_are_read_by_their_label(tmp_path):
    label = records.Label(score=0.5, source="human", rater="people", rubric="I_v")
    made = records.Proof(id="p", problem_id="q", statement="Show X.", text="So.", label=label)
    unlabelled = records.Proof(id="o", problem_id="q", statement="Show X.", text="Or so.")
    (found,) = read(tmp_path, *(json.loads(records.to_json(p)) for p in (made, unlabelled)))
    assert (found.id, found.record, found.rating) == ("p", made, None)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (ROW | dict(rated=1.5), dict(rating="rated"), r"line 1: rated is 1\.5: .* in 0\.\.1"),
        (ROW, dict(rating="rateds"), r"no row has a column 'rateds'; there are id, "),
        (ROW | dict(rated=None), dict(rating="rated"), "no graded row has a number in its column"),
        (ROW | dict(score=None), {}, "holds no graded proof"),
        (ROW, dict(kind=records.Analysis), "line 1: |holds no graded analysis"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, row, settings, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, row, **settings)


def test_a_rating_of_our_own_records_is_refused_and_a_missing_file_said(tmp_path):
    label = records.Label(score=0.5, source="human", rater="people", rubric="I_v")
    made = records.Proof(id="p", problem_id="q", statement="Show X.", text="So.", label=label)
    own = json.loads(records.to_json(made))
    with pytest.raises(ValueError, match="it is a Proof record of ours, which holds no rating"):
        read(tmp_path, own | dict(rated=0.5), rating="rated")
    with pytest.raises(FileNotFoundError, match=r"there is no such file"):
        benchmarks.read(epath.Path(tmp_path / "none.jsonl"), SCALE)
    with pytest.raises(ValueError, match="holds no row"):
        read(tmp_path)
