"""Rows of graded files: scores, scales and their map, critiques, names, malformed lines."""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax import records
from mathv2_jax.data import graded, importing, raw_files
from mathv2_jax.text import parse

MARKS = graded.ScoreMap(marks=True)
GIVEN = importing.ImportConfig(score_map=MARKS)


def row(**fields: Any) -> graded.Row:
    body = {
        "id": "opc/1/grok-3",
        "source": "opc",
        "problem": "Prove that 1 + 1 = 2.",
        "proof": "By definition.",
        "human_score": 1,
        "human_max": 1,
        "model": "xai/grok-3-mini",
    }
    return graded.Row(file="graded/opc.jsonl", line=7, fields={**body, **fields})


def critique(**fields: Any) -> graded.Row:
    text = "[chunk 2] <verification>false</verification>\nStep 3 has no reason."
    return row(analysis=text, analyst="GPT-5 (verdict: False)", **fields)


def label(score: float, scale: str) -> records.Label:
    return records.Label(score=score, source="human", scale=scale)


@pytest.mark.parametrize(
    ("score", "best", "ours"),
    [
        (7, 7, 1.0),
        (6, 7, 0.5),
        (5, 7, 0.0),
        (18, 21, 0.5),
        (17, 21, 0.0),
        (8.5, 10, 0.5),
        (5, 6, 0.0),
        (1, 1, 1.0),
        (0, 1, 0.0),
    ],
)
def test_marks_become_scores(score: float, best: float, ours: float) -> None:
    marks = row(human_score=score, human_max=best)
    assert graded.score_of(marks, MARKS) == ours
    assert graded.score_of(row(human_score=score, human_max=best, score=ours), None) == ours


@pytest.mark.parametrize(
    ("fields", "given"),
    [
        (dict(human_score=True), MARKS),
        (dict(human_score="seven", human_max=7), MARKS),
        (dict(human_score=8, human_max=7), MARKS),
        (dict(human_score=-1, human_max=7), MARKS),
        (dict(human_score=0, human_max=0), MARKS),
        (dict(human_score=float("nan"), human_max=7), MARKS),
        (dict(human_score=1, human_max=None), MARKS),
        (dict(human_score=6, human_max=7, score=1.0), None),
        (dict(human_score=6, human_max=7), None),
        (dict(human_score=None, score=0.3), None),
        (dict(human_score=None, score=True), None),
    ],
)
def test_marks_and_scores_that_make_no_sense_are_refused(fields: Any, given: Any) -> None:
    with pytest.raises(ValueError, match="human_score|human_max|score|marks"):
        graded.score_of(row(**fields), given)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("marks:7", {7.0: 1.0, 6.0: 0.5, 5.0: 0.0}),
        ("7:1,6:0.5,else:0", {7.0: 1.0, 6.0: 0.5, 5.0: 0.0, 99.0: 0.0}),
        ("1:1, 0:0", {1.0: 1.0, 0.0: 0.0, 0.5: None}),
    ],
)
def test_a_score_map_is_read_from_a_flag(text: str, scores: dict[float, float | None]) -> None:
    given = graded.ScoreMap.parse(text)
    for theirs, ours in scores.items():
        if ours is None:
            with pytest.raises(ValueError, match="none that --score_map names"):
                given.score(theirs, None)
        else:
            assert given.score(theirs, None) == ours


@pytest.mark.parametrize("text", ["", "7", "7:2", "marks:0", "marks:x", "7:1,7:0", "a:1"])
def test_a_score_map_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--score_map={text}"):
        graded.ScoreMap.parse(text)


def made(one: graded.Row) -> records.Proof:
    return graded.proof_of(one, "opc", graded.label_of(one, "opc", GIVEN), (one.id,))


def analysed(one: graded.Row) -> records.Analysis:
    found = graded.analysis_of(one, "opc", GIVEN, (one.id,))[0]
    assert isinstance(found, records.Analysis)
    return found


def test_a_proof_keeps_the_scale_of_its_source_and_the_row_that_it_came_from() -> None:
    proof = made(row())
    assert proof.label == records.Label(score=1.0, source="human", scale="opc-5-of-7")
    assert proof.parents == ("opc/1/grok-3",)
    assert "grok" not in proof.statement + proof.text


def test_a_row_without_a_score_is_a_proof_without_a_label() -> None:
    assert made(row(human_score=None, human_max=None)).label is None


def test_a_source_without_a_scale_is_refused_unless_one_is_given() -> None:
    with pytest.raises(ValueError, match="'mine' has no known scale: --scale=NAME"):
        graded.label_of(row(), "mine", GIVEN)
    named = importing.ImportConfig(score_map=MARKS, scale="full-marks")
    label = graded.label_of(row(), "mine", named)
    assert label is not None and label.scale == "full-marks"


def test_labels_of_another_scale_need_a_map() -> None:
    with pytest.raises(ValueError, match="opc-5-of-7 is not mixed with full-marks"):
        graded.ScaleMap().mapped(label(0.0, "opc-5-of-7"))
    kept = label(0.5, "full-marks")
    assert graded.ScaleMap().mapped(kept) == kept


def test_the_map_changes_the_score_and_not_the_name_of_the_scale() -> None:
    scales = graded.ScaleMap(pairs={"opc-5-of-7": ((1.0, 0.5),)})
    assert scales.mapped(label(1.0, "opc-5-of-7")) == label(0.5, "opc-5-of-7")
    with pytest.raises(ValueError, match=r"does not name its score 0\.0"):
        scales.mapped(label(0.0, "opc-5-of-7"))


def test_with_another_target_it_is_full_marks_that_need_a_map() -> None:
    scales = graded.ScaleMap(target="opc-5-of-7")
    assert scales.mapped(label(1.0, "opc-5-of-7")).score == 1.0
    with pytest.raises(ValueError, match="full-marks is not mixed with opc-5-of-7"):
        scales.mapped(label(1.0, "full-marks"))


@pytest.mark.parametrize("pairs", [((0.7, 1.0),), ((1.0, 2.0),), ((1.0, 1.0), (1.0, 0.5))])
def test_a_map_holds_scores_and_each_once(pairs: Any) -> None:
    with pytest.raises(ValueError, match="scale map of s"):
        graded.ScaleMap(pairs={"s": pairs})


@pytest.mark.parametrize("agrees", [True, False])
def test_a_judged_critique_is_an_analysis_whose_quality_is_the_persons_agreement(
    agrees: bool,
) -> None:
    analysis = analysed(critique(human_agrees_with_analyst=agrees))
    assert analysis.label is not None
    assert (analysis.label.score, analysis.label.rubric) == (float(agrees), "I_mv")
    assert parse.parse_analysis(analysis.text) == ("Step 3 has no reason.", 0.0)
    assert analysis.proof_id == made(row()).id


def test_a_critique_without_a_judgement_or_a_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="neither true nor false"):
        analysed(critique(human_agrees_with_analyst="yes"))
    with pytest.raises(ValueError, match="not in the verifier's format"):
        analysed(critique())
    with pytest.raises(ValueError, match="no verdict"):
        analysed(row(analysis="Fine.", human_agrees_with_analyst=True))


@pytest.mark.parametrize(("issues", "score"), [([], 1.0), ([{"category": "gap"}], 0.0)])
def test_a_listed_analysis_scores_by_whether_it_lists_issues(issues: Any, score: float) -> None:
    analysis = analysed(row(analysis="The proof is short.", issues=issues))
    assert analysis.label is None
    assert parse.parse_analysis(analysis.text) == ("The proof is short.", score)


@pytest.mark.parametrize("name", ["grok", "GROK-3-mini", "xai/grok-3-mini"])
@pytest.mark.parametrize("field", ["problem", "proof"])
def test_a_text_that_names_its_writer_is_refused(name: str, field: str) -> None:
    with pytest.raises(ValueError, match="names its writer"):
        made(row(**{field: f"This is by {name}."}))


def test_the_analyst_may_not_be_named_either() -> None:
    with pytest.raises(ValueError, match="names its writer, 'gpt-5'"):
        text = "<verification>false</verification> GPT-5 disagrees."
        fields = dict(analysis=text, analyst="GPT-5 (verdict: False)")
        analysed(row(human_agrees_with_analyst=True, **fields))


@pytest.mark.parametrize("text", ["O3 is a point on o4.", "a grokking argument", "mini high pro"])
def test_short_names_and_parts_of_words_are_no_names(text: str) -> None:
    graded.require_anonymous([text], "openai/o3")
    graded.require_anonymous([text], "xai/grok-3-mini-high")


@pytest.mark.parametrize("proof", [None, "", "  \n", 3, "\ud800 lone"])
def test_a_row_without_text_is_refused(proof: Any) -> None:
    with pytest.raises(ValueError, match="'proof' holds"):
        made(row(proof=proof))


def test_an_analysis_brings_the_proof_that_people_marked() -> None:
    found = graded.analysis_of(row(analysis="Short.", issues=[]), "opc", GIVEN, ("i:1",))
    assert [type(one).__name__ for one in found] == ["Analysis", "Proof"]
    assert found[1] == dataclasses.replace(made(row()), parents=("i:1",))


def test_a_malformed_line_is_named_by_its_number(tmp_path: pathlib.Path) -> None:
    lines = [b'{"id": "a"}', b'{"id": ', b"", b"[1]", b'{"id": "\xff"}', b'{"id": "b\\u2028"}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    found = list(raw_files.read(epath.Path(tmp_path / "rows.jsonl")))
    assert [(r.line, r.fields["id"]) for r in found if not r.fault] == [(1, "a"), (6, "b\u2028")]
    assert [r.line for r in found if r.fault] == [2, 4, 5]
    assert "list" in found[2].fault


@given(st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.text(max_size=3)))
def test_no_object_makes_a_reader_raise_anything_but_value_errors(body: dict[str, Any]) -> None:
    base = json.loads(json.dumps(dict(row().fields)))
    for fields in (body, {**base, **body}, {**base, "analysis": "x", "issues": [], **body}):
        found = graded.Row(file="f", line=1, fields=fields)
        for make in (analysed, made):
            with contextlib.suppress(ValueError):
                make(found)
