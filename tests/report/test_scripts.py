"""Data scripts: what is in them cannot end them, and they read back as what was put in."""

import json
import re

import hypothesis
import pytest
from hypothesis import strategies

from mathv2_jax.report import scripts
from tools import report_runs

CALL = re.compile(r'report\.accept\("(\w+)", "([^"]*)", (.*)\);\n', re.DOTALL)


def read(data):
    """The kind, name and data of a script."""
    match = CALL.fullmatch(data.decode("ascii"))
    assert match is not None
    return match[1], match[2], json.loads(match[3])


@pytest.mark.parametrize("text", report_runs.HOSTILE)
def test_hostile_text_stays_inside_its_script(text):
    data = scripts.script("index", "", [text, {"text": text}])
    assert not set(data.decode("ascii")) & set("<>&\u2028\u2029\x00")
    assert data.count(b"\n") == 1
    assert read(data) == ("index", "", [text, {"text": text}])


@hypothesis.given(strategies.text())
def test_any_text_reads_back(text):
    literal = scripts.literal(text)
    assert literal.isascii() and literal.isprintable()
    assert json.loads(literal) == text


def test_a_number_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        scripts.literal([float("nan")])


def test_chunks_are_of_about_their_size_and_cut_no_entry():
    entries = ["x" * 300, "y" * 300, "z" * 2000, "a", "b"]
    found = list(scripts.chunks(entries, size=700))
    assert [[json.loads(literal) for literal in run] for run in found] == [
        entries[:2],
        entries[2:3],
        entries[3:],
    ]


def test_a_chunk_is_named_by_what_it_holds():
    name, data = scripts.chunk_script(['"one"', '"two"'])
    assert read(data) == ("texts", name, ["one", "two"])
    assert re.fullmatch("texts-[0-9a-f]{16}", name)
    assert scripts.chunk_script(['"one"'])[0] != name
