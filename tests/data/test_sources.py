import collections
import json

import pytest

from mathv2_jax import records
from mathv2_jax.data import sources

PROBLEMS = [
    records.Problem(id=f"p{i}", statement=f"State {i}.", source="test", cluster=f"c{i}")
    for i in range(3)
]


def take(stream, start, stop):
    return [stream[i] for i in range(start, stop)]


def test_records_come_back_in_order_as_they_were_written(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(records.to_lines(PROBLEMS))
    assert sources.read(path, records.Problem) == PROBLEMS


def test_a_text_may_hold_any_unescaped_end_of_line_but_the_line_feed(tmp_path):
    body = dict(id="a", statement="one\u2028two\u0085three", source="b", cluster="c")
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(body, ensure_ascii=False) + "\n", "utf-8")
    assert sources.read(path, records.Problem) == [records.Problem(**body)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ('{"kind": "Proof", "schema": 1}', "this is a Proof, expected a Problem"),
        ('{"id": "a", "statement": "b", "source": "c"}', "lacks cluster"),
    ],
)
def test_a_bad_line_is_named_with_its_file_its_number_and_its_fault(tmp_path, line, message):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(records.to_lines(PROBLEMS[:2]) + f"{line}\n".encode())
    with pytest.raises(ValueError, match=rf"problems\.jsonl, line 3: .*{message}"):
        sources.read(path, records.Problem)


def test_a_line_in_another_encoding_is_named_too(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(records.to_lines(PROBLEMS[:2]) + b'{"id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"problems\.jsonl, line 3: .*can't decode byte 0xff"):
        sources.read(path, records.Problem)


def test_an_element_is_a_function_of_the_seed_and_its_index():
    kinds = {"a": list(range(7)), "b": list(range(100, 113))}
    weights = {"a": 0.3, "b": 0.7}
    stream = sources.stream(kinds, weights, 5)
    in_order = take(stream, 0, 60)
    assert take(sources.stream(kinds, weights, 5), 25, 60) == in_order[25:]
    assert [stream[i] for i in reversed(range(60))] == in_order[::-1]
    assert take(sources.stream(kinds, weights, 6), 0, 60) != in_order


def test_every_epoch_holds_each_record_once_in_an_order_of_its_own():
    stream = sources.stream({"only": list(range(9))}, {"only": 1.0}, 0)
    epochs = [take(stream, 9 * e, 9 * e + 9) for e in range(4)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_mixture_keeps_its_weights_over_any_long_stretch():
    kinds = {"a": ["a"] * 3, "b": ["b"] * 50, "unused": ["u"]}
    stream = sources.stream(kinds, {"a": 3.0, "b": 1.0, "unused": 0.0}, 1)
    for start in (0, 1_000):
        counts = collections.Counter(take(stream, start, start + 80))
        assert counts.keys() == {"a", "b"}
        assert abs(counts["a"] - 60) <= 1


def test_equal_sources_are_shuffled_apart():
    stream = sources.stream(
        {"a": list(range(20)), "b": list(range(100, 120))}, {"a": 1.0, "b": 1.0}, 3
    )
    drawn = take(stream, 0, 40)
    assert [x for x in drawn if x < 100] != [x - 100 for x in drawn if x >= 100]


def test_an_empty_source_is_named_only_where_it_has_a_weight():
    with pytest.raises(ValueError, match="source 'b' is empty"):
        sources.stream({"a": [1], "b": []}, {"a": 1.0, "b": 0.5}, 0)
    assert sources.stream({"a": [1], "b": []}, {"a": 1.0}, 0)[3] == 1


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_named(weight):
    with pytest.raises(ValueError, match=f"source 'b' has weight {weight}"):
        sources.stream({"a": [1], "b": [2]}, {"a": 1.0, "b": weight}, 0)


def test_a_mixture_of_nothing_is_an_error_that_lists_the_sources():
    with pytest.raises(ValueError, match=r"no source has a positive weight among \['a', 'b'\]"):
        sources.stream({"b": [1], "a": [2]}, {"a": 0.0}, 0)
