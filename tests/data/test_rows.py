"""Packed rows come in one order, whoever packs them and wherever a run stopped."""

import random

import grain
import numpy as np
import pytest
from absl import flags

from mathv2_jax.data import mixture, packing, rows

LENGTH = 32
START = rows.Position()
SOURCES = {
    "human": [("human", i, random.Random(i).randint(3, 14)) for i in range(90)],
    "auto": [("auto", i, random.Random(-i).randint(3, 20)) for i in range(40)],
}
NUMBER = {name: 1_000 * place + 1 for place, name in enumerate(SOURCES, start=1)}


def as_item(element):
    """An item whose tokens name its record."""
    source, index, size = element
    answer = packing.Answer(
        tokens=[NUMBER[source] + index] * (size - 1), weights=[1.0] * (size - 1)
    )
    return packing.Item(prompt=[NUMBER[source] + index], answers=(answer,))


def make_stream(exhausted=mixture.REPEAT):
    phases = [mixture.Phase(begin=0, weights={"human": 0.6, "auto": 0.4})]
    return mixture.stream(SOURCES, phases, 7, exhausted=exhausted).map(as_item)


def reader_of(stream):
    return rows.Reader(rows.PackedRows(stream, 8, LENGTH, START, range(8)))


def ids(batch):
    """The record of each place, row by row; 0 padding."""
    return [[int(t) for t in row] for row in batch.tokens_BT]


def read(number, position=START, *, batch_rows=8, hosts=1, workers=0, stream=None):
    """So many batches by some hosts, put together; and where these then stand."""
    each = batch_rows // hosts
    parts, begins = [], []
    for host in range(hosts):
        wanted = range(host * each, (host + 1) * each)
        reader = rows.Reader(
            rows.PackedRows(stream or make_stream(), batch_rows, LENGTH, position, wanted), workers
        )
        parts.append([ids(reader.read())[host * each : (host + 1) * each] for _ in range(number)])
        begins.append(reader.position().begins)
        reader.close()
    batches = [sum((part[at] for part in parts), []) for at in range(number)]
    merged = tuple(map(max, zip(*begins, strict=True)))
    return batches, rows.Position(batch=position.batch + number, begins=merged)


WHOLE = 136  # batches of 8 rows: 17 rows of every shard, two windows and the beginning of a third


@pytest.fixture(scope="module")
def uninterrupted():
    return read(WHOLE)[0]


def test_every_row_comes_from_a_shard_of_its_own_group():
    for batch_rows in (1, 2, 3, 8, 24, 64, 128, 192):
        given = {}
        for batch in range(70):
            for row in range(batch_rows):
                shard, number = rows.source_of(batch, row, batch_rows)
                assert number == given.get(shard, 0)  # one after the other
                given[shard] = number + 1
            for shard in range(rows.SHARDS):
                assert rows.given_before(shard, batch + 1, batch_rows) == given.get(shard, 0)
        assert set(given) == set(range(rows.SHARDS))
        assert max(given.values()) - min(given.values()) <= max(1, batch_rows // rows.SHARDS + 1)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_no_shard(hosts):
    mine = [
        {rows.source_of(batch, row, 8).shard for batch in range(64) for row in range(begin, end)}
        for begin, end in ((h * 8 // hosts, (h + 1) * 8 // hosts) for h in range(hosts))
    ]
    assert sum(map(len, mine)) == rows.SHARDS == len(set.union(*mine))


def test_each_element_of_the_stream_is_packed_once_and_in_its_shards_order():
    stream = make_stream()
    reader = reader_of(stream)
    met = {shard: [] for shard in range(rows.SHARDS)}
    for number in range(40):  # five rows of every shard
        batch = reader.read()
        for row in range(8):
            first = (batch.positions_BT[row] == 0) & (batch.tokens_BT[row] > 0)
            shard = rows.source_of(number, row, 8).shard
            met[shard] += batch.tokens_BT[row][first].tolist()
    for shard, found in met.items():
        window = rows.fill(stream, shard, 0, LENGTH)
        assert found == [int(item.prompt[0]) for row in window.rows[:5] for item in row]
        whole = sorted(int(item.prompt[0]) for row in window.rows for item in row)
        places = [at * rows.SHARDS + shard for at in range(window.end)]
        assert whole == sorted(int(stream[place].prompt[0]) for place in places)


def test_rows_are_nearly_full(uninterrupted):
    used = np.mean([[token > 0 for token in row] for batch in uninterrupted for row in batch])
    assert used > 0.85


@pytest.mark.parametrize("hosts", [2, 4])
def test_several_hosts_read_what_one_reads(uninterrupted, hosts):
    assert read(WHOLE, hosts=hosts)[0] == uninterrupted


@pytest.fixture
def workers_may_start():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers are given the flags


def test_twenty_stops_and_other_numbers_of_hosts_and_workers_change_nothing(
    uninterrupted, workers_may_start
):
    """Most stops are in the middle of a window of rows; workers, which take seconds to start, are
    there after three of them, on one host, two and four.
    """
    draw = random.Random(0)
    stops = sorted(draw.sample(range(1, WHOLE), 20))
    found, position = [], START
    for number, (begin, end) in enumerate(zip([0, *stops], [*stops, WHOLE], strict=True)):
        position = rows.Position.from_json(position.to_json())
        hosts, workers = {6: (1, 2), 12: (2, 2), 18: (4, 2)}.get(
            number, (draw.choice((1, 2, 4)), 0)
        )
        batches, position = read(end - begin, position, hosts=hosts, workers=workers)
        found += batches
    assert found == uninterrupted
    assert position.batch == WHOLE
    assert min(position.begins) > 0  # every shard has left its first window


def test_a_stream_that_ends_gives_every_record_once():
    stream = make_stream(mixture.DROP)
    reader = reader_of(stream)
    found = []
    while (batch := reader.read()) is not None:
        starts = np.unique(batch.segments_BT[batch.tokens_BT > 0])
        assert starts.size
        found += [int(t) for row in batch.tokens_BT for t in np.unique(row[row > 0])]
    names = [NUMBER[s] + i for source in SOURCES.values() for s, i, _ in source]
    assert sorted(found) == sorted(names)


def test_items_longer_than_a_row_are_left_out_and_counted():
    long = [("human", i, 40 if i % 3 == 0 else 5) for i in range(30)]
    stream = mixture.stream(
        {"human": long}, [mixture.Phase(begin=0, weights={"human": 1.0})], 0, exhausted="drop"
    ).map(as_item)
    reader = reader_of(stream)
    while reader.read() is not None:
        pass
    assert reader.left_out == 10


def test_a_stream_of_nothing_but_too_long_items_is_an_error(monkeypatch):
    monkeypatch.setattr(rows, "_HOPELESS", 50)
    stream = grain.MapDataset.source([("human", 1, 40)]).repeat().map(as_item)
    with pytest.raises(ValueError, match="50 items after each other are longer than rows of 32"):
        rows.fill(stream, 0, 0, LENGTH)


@pytest.mark.parametrize("body", [{"batch": 1}, {"batch": 1, "begins": [0]}, {"next": 4}])
def test_another_position_is_refused(body):
    with pytest.raises(ValueError, match="no position of 64 shards"):
        rows.Position.from_json(body)
