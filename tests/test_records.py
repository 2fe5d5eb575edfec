import dataclasses
import enum
import hashlib
import json
import types
import typing
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mathv2_jax import records

KINDS = [
    records.Label,
    records.Origin,
    records.Problem,
    records.Proof,
    records.Analysis,
    records.Demonstration,
    records.Sample,
    records.Request,
    records.Response,
]
TEXT = st.text(st.characters())  # lone surrogates too: a model's bytes may hold anything
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def values(hint):
    """Any value of a field, from its annotation; of a record's, the dictionary of its fields."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(st.none() if a is types.NoneType else values(a) for a in args))
    if origin is tuple and args[-1] is not Ellipsis:
        return st.tuples(*map(values, args))
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(TEXT, values(args[1]), max_size=3)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if dataclasses.is_dataclass(hint):
        fields = {name: values(field) for name, field in typing.get_type_hints(hint).items()}
        scores = st.sampled_from(records.SCORES)
        if hint is records.Label:
            fields["score"] = scores
            fields["votes"] = st.lists(scores, max_size=3).map(tuple)
            fields["source"] = st.sampled_from(["human", "auto", "world"])
        if hint is records.Proof:
            fields["self_score"] = st.none() | scores
        if hint is records.Analysis:
            fields["score"] = scores
        return st.fixed_dictionaries(fields)
    return {str: TEXT, int: st.integers(), float: NUMBERS}[hint]


def built(kind, fields):
    nested = {"label": records.Label, "origin": records.Origin}
    nested |= dict.fromkeys(("experts", "prompt_experts"), records.Ints)
    return kind(
        **{
            name: built(nested[name], value)
            if name in nested and isinstance(value, dict)
            else value
            for name, value in fields.items()
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_survives_json(kind):
    @settings(max_examples=40)
    @given(values(kind))
    def survives(fields):
        record = built(kind, fields)
        line = records.to_json(record)
        assert "\n" not in line and line.isascii()
        found = records.from_json(kind, line)
        assert found == record
        assert records.to_json(found) == line

    survives()


PROBLEM = records.Problem(id="1", statement="Show: B.", source="test", cluster="c")
LABEL = {"score": 0.5, "source": "human"}
PROOF = {"id": "1", "problem_id": "2", "statement": "s", "text": "t"}
SAMPLE = {
    "id": "1",
    "role": "verifier",
    "stage": "rl",
    "step": 3,
    "problem_id": "2",
    "target": "4",
    "index": 0,
    "statement": "s",
    "proof": "p",
    "analysis": "",
    "text": "t",
    "outcome": "parsed",
    "finish": "stop",
    "num_tokens": 7,
    "checkpoint": "rl@2",
}


def test_what_a_line_leaves_out_takes_its_default():
    proof = records.from_json(records.Proof, json.dumps(PROOF))
    assert proof == records.Proof(**PROOF)
    assert (proof.label, proof.self_score, proof.parents) == (None, None, ())


def test_a_whole_number_is_read_as_a_float_where_a_float_belongs():
    line = json.dumps(PROOF | {"self_score": 1, "label": {"score": 0, "source": "human"}})
    proof = records.from_json(records.Proof, line)
    assert type(proof.self_score) is float and proof.label is not None
    assert type(proof.label.score) is float


@pytest.mark.parametrize(
    ("kind", "body", "complaint"),
    [
        (records.Proof, PROOF | {"labels": None}, "Proof has no field labels"),
        (records.Proof, {"id": "1", "text": "t"}, "Proof lacks problem_id, statement"),
        (records.Proof, PROOF | {"id": 1}, "Proof.id must be str, it is 1"),
        (records.Proof, PROOF | {"text": None}, "Proof.text must be str"),
        (records.Proof, PROOF | {"self_score": "1"}, "Proof.self_score must be float"),
        (records.Proof, PROOF | {"self_score": True}, "Proof.self_score must be float"),
        (records.Proof, PROOF | {"parents": "1"}, "Proof.parents must be a list"),
        (records.Proof, PROOF | {"parents": [1]}, "Proof.parents must be str"),
        (records.Proof, PROOF | {"label": 1.0}, "Proof.label must be an object"),
        (records.Proof, PROOF | {"label": {"score": 1.0}}, "Label lacks source"),
        (records.Proof, PROOF | {"label": LABEL | {"score": 0.7}}, "0.7 is not one of 0, 0.5, 1"),
        (records.Proof, PROOF | {"label": LABEL | {"source": "us"}}, "'us' is not human, auto"),
        (records.Sample, SAMPLE | {"step": 3.0}, "Sample.step must be int"),
        (records.Sample, SAMPLE | {"step": True}, "Sample.step must be int"),
        (records.Sample, SAMPLE | {"rewards": [1.0]}, "Sample.rewards must be an object"),
        (records.Sample, SAMPLE | {"rewards": {"total": "1"}}, "Sample.rewards must be float"),
        (records.Sample, SAMPLE | {"outcome": "fine"}, "Sample.outcome must be one of parsed"),
        (records.Sample, SAMPLE | {"finish": ["stop"]}, "Sample.finish must be one of stop"),
        (records.Sample, SAMPLE | {"kind": "Proof"}, "this is a Proof, expected a Sample"),
        (records.Sample, SAMPLE | {"schema": 2}, "schema 2 of Sample: this program reads 1"),
        (records.Sample, [SAMPLE], "a Sample is a JSON object, this is a list"),
    ],
)
def test_a_line_that_is_no_such_record_is_refused(kind, body, complaint):
    with pytest.raises(ValueError) as raised:
        records.from_json(kind, json.dumps(body))
    assert complaint in str(raised.value)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_number_that_no_float_holds_is_refused(number):
    line = json.dumps(PROOF)[:-1] + f', "self_score": {number}}}'
    with pytest.raises(ValueError, match="Proof.self_score must be"):
        records.from_json(records.Proof, line)


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ValueError, match="not a JSON object"):
        records.from_json(records.Problem, '{"id": "1"')


def test_a_reward_that_is_not_finite_is_not_written():
    sample = records.from_json(records.Sample, json.dumps(SAMPLE))
    with pytest.raises(ValueError):
        records.to_json(dataclasses.replace(sample, rewards={"total": float("nan")}))


def test_lines_are_one_record_each():
    data = records.to_lines([PROBLEM, dataclasses.replace(PROBLEM, id="2", statement="a\nb\u2028")])
    assert data.endswith(b"\n")
    found = [records.from_json(records.Problem, x) for x in data.decode().splitlines()]
    assert [p.id for p in found] == ["1", "2"]
    assert records.to_lines([]) == b""


def test_a_content_id_is_the_hash_of_its_parts_behind_their_lengths():
    # Ids name rows in files: another rule of naming would orphan every old record.
    data = b"\0\0\0\0\0\0\0\x05proof" + b"\0\0\0\0\0\0\0\x02\xc3\xa9" + b"\0" * 8
    assert records.content_id("proof", "\u00e9", "") == hashlib.sha256(data).hexdigest()[:16]
    assert records.content_id("proof", "\ud800") != records.content_id("proof", "\udc00")


@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(TEXT, min_size=1, max_size=4))
def test_different_texts_have_different_ids(one, other):
    same = records.content_id(*one) == records.content_id(*other)
    assert same == (one == other)


def test_an_id_depends_on_where_one_text_ends_and_the_next_begins():
    names = [("proof", "ab", ""), ("proof", "a", "b"), ("proof", "", "ab"), ("proofa", "b")]
    assert len({records.content_id(*n) for n in [*names, ("proof", "ab")]}) == 5


@pytest.mark.parametrize("score", [0, 0.5, 1, 1.0])
def test_the_three_scores_are_scores(score):
    assert records.require_score(score, "here") == score


@pytest.mark.parametrize("score", [0.25, -1, 2, True, "1", None, float("nan")])
def test_anything_else_is_no_score(score):
    with pytest.raises(ValueError, match="here: score .* is not one of 0, 0.5, 1"):
        records.require_score(score, "here")
