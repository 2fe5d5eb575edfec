"""Many records with random access: damage is named, and kills of a writer lose nothing."""

import pathlib
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mathv2_jax import records
from mathv2_jax.data import table

ROOT = pathlib.Path(__file__).resolve().parents[2]


def proof(number, votes=()):
    text = f"Proof {number}, \u2028 of \u0391. " + "x" * (number % 50)
    label = records.Label(score=1.0, source="auto", votes=votes) if votes else None
    return records.Proof(id=f"p{number}", problem_id="q", statement="Show.", text=text, label=label)


def read(line):
    return records.from_json(records.Proof, line)


def write(folder, numbers, part_bytes=2_000):
    writer = table.Writer(folder, part_bytes)
    for number in numbers:
        writer.add(proof(number))
    return writer.commit()


def test_records_come_back_by_index_from_several_parts(tmp_path):
    assert write(tmp_path, range(40)) > 2
    found = table.Table(tmp_path, read)
    assert len(found) == 40
    assert [found[at] for at in range(40)] == [proof(n) for n in range(40)]
    assert found[-1] == proof(39) and found[3:5] == [proof(3), proof(4)]
    lines = [records.to_json(proof(n)) for n in range(40)]
    assert list(found.lines()) == lines
    np.testing.assert_array_equal(found.num_bytes(), [len(line) + 1 for line in lines])
    with pytest.raises(IndexError, match="record 40 of 40"):
        found[40]


def test_a_table_grows_and_one_that_is_open_does_not_see_it(tmp_path):
    write(tmp_path, range(5))
    before = table.Table(tmp_path, read)
    write(tmp_path, range(5, 9))
    assert len(before) == 5
    assert [r.id for r in table.Table(tmp_path, read)] == [f"p{n}" for n in range(9)]


def test_an_empty_folder_is_an_empty_table(tmp_path):
    found = table.Table(tmp_path / "none", read)
    assert len(found) == 0 and found.num_bytes().size == 0 and found.hardness.size == 0


def test_a_table_travels_to_another_process(tmp_path):
    write(tmp_path, range(9))
    found = table.Table(tmp_path, read)
    assert found[2] == proof(2)
    assert list(pickle.loads(pickle.dumps(found))) == list(found)


def test_hardness_is_known_without_reading_records(tmp_path):
    votes = [(1.0, 1.0), (0.0, 1.0), (0.0, 0.5, 1.0), ()]
    table.write(tmp_path, [proof(n, v) for n, v in enumerate(votes)])
    np.testing.assert_allclose(table.Table(tmp_path, read).hardness, [0.0, 1.0, 2 / 3, 0.0], 1e-6)


@pytest.mark.parametrize("fault", ["missing", "of another part", "cut", "no index"])
def test_an_index_that_cannot_be_used_is_made_anew(tmp_path, fault, caplog):
    write(tmp_path, range(20))
    index = tmp_path / "part-000001.index"
    if fault == "missing":
        index.unlink()
    else:
        data = {
            "of another part": (tmp_path / "part-000002.index").read_bytes(),
            "cut": index.read_bytes()[:-30],
            "no index": b"offsets",
        }[fault]
        index.write_bytes(data)
    found = table.Table(tmp_path, read)
    assert list(found) == [proof(n) for n in range(20)]
    assert "made anew, which takes longer" in caplog.text


def test_a_damaged_record_is_named(tmp_path):
    write(tmp_path, range(5), part_bytes=10**6)
    path = tmp_path / "part-000001.jsonl"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"Proof 3", b"Proof 8"))
    found = table.Table(tmp_path, read)
    assert found[2] == proof(2)
    with pytest.raises(ValueError, match="part-000001.jsonl is damaged: record 4"):
        found[3]


WRITER = """
import sys
from mathv2_jax import records
from mathv2_jax.data import table
from tests.data.test_table import proof

number = int(sys.argv[2])
print("ready", flush=True)
while True:
    writer = table.Writer(sys.argv[1], 1_000)
    for _ in range(12):
        writer.add(proof(number))
        number += 1
    writer.commit()
    print(number, flush=True)
"""


def test_a_writer_killed_at_fifty_moments_loses_and_doubles_nothing(tmp_path):
    draw, told = random.Random(0), 0
    for _ in range(50):
        held = len(table.Table(tmp_path, read))
        assert held >= told  # what was told is there; what was just committed may be, untold
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(held)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.0, 0.06))
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[0].split("\n")[:-1]
        told = int(said[-1]) if said else held
    found = table.Table(tmp_path, read)
    assert len(found) >= told > 100
    assert [record.id for record in found] == [f"p{n}" for n in range(len(found))]
