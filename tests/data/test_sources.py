import json

import pytest

from mathv2_jax import records
from mathv2_jax.data import sources

PROBLEMS = [
    records.Problem(id=f"p{i}", statement=f"State {i}.", source="test", cluster=f"c{i}")
    for i in range(3)
]


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
