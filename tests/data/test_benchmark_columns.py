"""Files of public benchmarks are read as they are: their headers, and lists of JSON objects."""

import csv
import json

import pytest
from etils import epath

from mathv2_jax.data import benchmark_columns, graded
from mathv2_jax.evaluation import benchmarks
from mathv2_jax.search import problems


def write_csv(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return epath.Path(path)


def test_problems_of_imo_proofbench(tmp_path):
    row = {
        "Problem ID": "PB-Basic-001",
        "Problem": "Show that 1 = 1.",
        "Solution": "Look.",
        "Grading guidelines": "7 for looking.",
        "Category": "Algebra",
        "Level": "IMO-easy",
        "Short Answer": "",
        "Source": "Some Olympiad 2001",
    }
    (found,) = problems.read(write_csv(tmp_path / "proofbench.csv", row))
    assert (found.statement, found.source) == ("Show that 1 = 1.", "proofbench-basic")
    assert problems.name(found) == "PB-Basic-001"
    assert (found.reference, found.guidelines) == ("Look.", "7 for looking.")


def test_gradings_of_imo_gradingbench(tmp_path):
    row = {
        "Grading ID": "GB-0001",
        "Problem ID": "PB-Basic-001",
        "Problem": "Show that 1 = 1.",
        "Solution": "The reference.",
        "Response": "By symmetry.",
        "Points": "6",
        "Reward": "Almost",
    }
    scale = benchmarks.Scale(scale="imo", score_map=graded.ScoreMap.parse("marks:7"))
    (found,) = benchmarks.read(write_csv(tmp_path / "gradingbench.csv", row), scale)
    assert (found.id, found.record.text) == ("GB-0001", "By symmetry.")
    assert found.record.label is not None and found.record.label.score == 0.5


def test_lists_of_json_objects(tmp_path):
    path = epath.Path(tmp_path / "putnam.json")
    rows = [
        {"problem_name": "putnam_2024_a1", "informal_statement": "Find."},
        {"problem": "How many?", "answer": 12},
    ]
    path.write_text(json.dumps(rows))
    first, second = problems.read(path)
    assert (first.statement, first.source) == ("Find.", "putnam")
    assert (problems.name(first), problems.name(second)) == ("putnam_2024_a1", second.id)
    assert second.answer == "12"


def test_a_name_of_ours_comes_first_and_nothing_is_lost():
    fields = {"problem": "ours", "Problem": "theirs", "question": "other", "x": 1}
    assert benchmark_columns.by_our_names(fields) == fields
    assert benchmark_columns.by_our_names({"problem": None, "question": "q"})["problem"] == "q"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"problem": "Show."}', "holds a JSON dict, rows stand in a list"),
        ('{"problem": "a"}\n{"problem": "b"}', "JSON lines end in .jsonl"),
        ('["Show."]', "line 1: a row is a JSON object, this is a str"),
        ('[{"text": "Show."}]', "line 1: field 'problem' holds no text"),
    ],
)
def test_what_is_no_list_of_rows_is_named(tmp_path, body, message):
    path = epath.Path(tmp_path / "file.json")
    path.write_text(body)
    with pytest.raises(ValueError, match=message):
        problems.read(path)
