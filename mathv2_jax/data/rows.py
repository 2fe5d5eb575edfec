"""Packed rows of tokens in one global order, whatever the number of hosts and of workers.

The stream's element i belongs to the virtual shard i mod 64. A shard packs its own elements, in
order, into windows of rows: each first-fit, until one finds no room, which begins the next window.
Which shard gives a row of which batch is fixed. So a host packs what its own rows need, and where
all stand is one small table: the element that each shard's window begins with.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain

from mathv2_jax import processes
from mathv2_jax.data import packing

SHARDS = 64
WINDOW = 8  # rows that a shard fills side by side
_AHEAD = 2  # batches
_HOPELESS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Before which batch, and the number of its shard of the element that each window begins with.

    The one position of all hosts.
    """

    batch: int = 0
    begins: tuple[int, ...] = (0,) * SHARDS

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"batch": self.batch, "begins": list(self.begins)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Position":
        """What `to_json` made, or the start of nothing; ValueError for anything else."""
        if not body:
            return cls()
        if set(body) != {"batch", "begins"} or len(body["begins"]) != SHARDS:
            raise ValueError(f"{body!r:.80} is no position of {SHARDS} shards")
        return cls(batch=body["batch"], begins=tuple(body["begins"]))


class Source(NamedTuple):
    """Where a batch's row comes from: a shard, and how many of its rows came before."""

    shard: int
    number: int


def source_of(batch: int, row: int, rows: int) -> Source:
    """That of a row, of batches of so many.

    Rows and shards are cut into the same number of groups (their greatest common divisor), and the
    shards of a group take turns in its rows: hosts that hold whole groups share no shard.
    """
    groups = math.gcd(rows, SHARDS)
    rows_each, shards_each = rows // groups, SHARDS // groups
    group, place = divmod(row, rows_each)
    turn = batch * rows_each + place
    return Source(group * shards_each + turn % shards_each, turn // shards_each)


def given_before(shard: int, batch: int, rows: int) -> int:
    """How many rows a shard gives to the batches before."""
    groups = math.gcd(rows, SHARDS)
    shards_each = SHARDS // groups
    turns, place = batch * (rows // groups), shard % shards_each
    return max(0, -(-(turns - place) // shards_each))


@dataclasses.dataclass(frozen=True)
class Window:
    """A shard's next rows, as items; the element that the next window begins with, and how many
    elements were longer than a row, and left out.
    """

    rows: tuple[tuple[packing.Item, ...], ...]
    end: int
    left_out: int


def fill(stream: grain.MapDataset, shard: int, begin: int, length: int) -> Window:
    """The window that begins with a shard's element: the last of a stream that ends may have room.

    ValueError where _HOPELESS elements after each other are longer than a row.
    """
    rows: list[list[packing.Item]] = [[] for _ in range(WINDOW)]
    used, heads, left_out, long, at = [0] * WINDOW, [0] * WINDOW, 0, 0, begin
    while at * SHARDS + shard < len(stream):
        item: Any = stream[at * SHARDS + shard]
        size, with_head = len(item), item.head_label is not None
        long = long + 1 if size > length else 0
        if long == _HOPELESS:
            raise ValueError(
                f"{long} items after each other are longer than rows of {length} tokens, the last "
                f"has {size}: raise the rows' length"
            )
        if long:
            left_out += 1
        else:
            for row in range(WINDOW):
                if used[row] + size <= length and heads[row] + with_head <= packing.HEAD_SLOTS:
                    rows[row].append(item)
                    used[row], heads[row] = used[row] + size, heads[row] + with_head
                    break
            else:
                break
        at += 1
    return Window(tuple(map(tuple, rows)), at, left_out)


class Row(NamedTuple):
    """A packed row, a batch of one; where its shard's next row finds its window; what was left out
    before it; how many items it holds; and whether its shard holds none after it.
    """

    batch: packing.Batch
    shard: int
    begin: int
    left_out: int
    num_items: int
    is_last: bool


class PackedRows(grain.IterDataset):
    """The rows `wanted` of batch after batch, one by one, from a position on.

    Workers (`mp_prefetch`) take turns row by row; where their number divides that of the wanted
    rows, no two of them pack the same shard, else they do the same work.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        rows: int,
        length: int,
        position: Position,
        wanted: Sequence[int],
    ):
        super().__init__()
        self.stream, self.rows, self.length = stream, rows, length
        self.position, self.wanted = position, tuple(wanted)
        self.turns = slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Of all rows those that a worker makes; Grain calls it."""
        del sequential_slice
        self.turns = slice(sl.start or 0, None, sl.step or 1)

    def __iter__(self) -> grain.DatasetIterator:
        return _Rows(self)

    def __str__(self) -> str:
        return f"PackedRows(rows={self.rows}, length={self.length})"


class _Rows(grain.DatasetIterator):
    def __init__(self, dataset: PackedRows):
        super().__init__()
        self._dataset, self._turn = dataset, dataset.turns.start
        self._windows: dict[int, tuple[int, int, Window]] = {}  # its number, begin, and itself

    def __next__(self) -> Row:
        ds = self._dataset
        ahead, place = divmod(self._turn, len(ds.wanted))
        shard, number = source_of(ds.position.batch + ahead, ds.wanted[place], ds.rows)
        self._turn += ds.turns.step
        begin, window = self._window(shard, number // WINDOW)
        at = number % WINDOW
        packer = packing.Packer(1, ds.length)
        for item in window.rows[at]:
            placed = packer.add(item)
            assert placed, "the window was filled for rows of this length"
        return Row(
            packer.batch,
            shard,
            window.end if at == WINDOW - 1 else begin,
            0 if at else window.left_out,
            len(window.rows[at]),
            not any(window.rows[at + 1 :]) and window.end * SHARDS + shard >= len(ds.stream),
        )

    def _window(self, shard: int, wanted: int) -> tuple[int, Window]:
        ds = self._dataset
        if shard not in self._windows:
            number = given_before(shard, ds.position.batch, ds.rows) // WINDOW
            begin = ds.position.begins[shard]
            self._windows[shard] = number, begin, fill(ds.stream, shard, begin, ds.length)
        number, begin, window = self._windows[shard]
        while number < wanted:
            number, begin = number + 1, window.end
            window = fill(ds.stream, shard, begin, ds.length)
        self._windows[shard] = number, begin, window
        return begin, window

    def get_state(self) -> dict[str, Any]:
        return {"turn": self._turn}

    def set_state(self, state: dict[str, Any]) -> None:
        self._turn = state["turn"]
        self._windows.clear()


class Reader:
    """Batch after batch from a position on: this process's rows of each, the others padding.

    A thread stays _AHEAD batches before what is read. `workers` processes beside this one tokenise
    and pack; 0: that thread does.
    """

    def __init__(self, packed: PackedRows, workers: int = 0):
        self._packed, position = packed, packed.position
        self._batch, self._begins = position.batch, dict(enumerate(position.begins))
        self._endless = len(packed.stream) == sys.maxsize
        self._going = {
            source_of(turn, row, packed.rows).shard
            for turn in range(SHARDS)
            for row in packed.wanted
        }
        dataset: grain.IterDataset = packed
        if workers:
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=_AHEAD * len(packed.wanted)
        )
        self._iterator = iter(dataset)
        self.left_out = 0  # items longer than a row that this process came across

    def read(self) -> packing.Batch | None:
        """The next batch; None where the stream has ended, for all processes alike.

        Towards the end of a stream batches of nothing are passed over.
        """
        while True:
            batch, found = self._read()
            if self._endless or processes.any_of(found > 0):
                return batch
            if not processes.any_of(bool(self._going)):
                return None

    def _read(self) -> tuple[packing.Batch, int]:
        """A batch, and how many items this process has in it."""
        batch, found = packing.empty_batch(self._packed.rows, self._packed.length), 0
        for row in self._packed.wanted:
            made: Row = next(self._iterator)
            for whole, part in zip(batch, made.batch, strict=True):
                if whole is not None:
                    whole[row] = part[0]
            self._begins[made.shard] = made.begin
            self.left_out += made.left_out
            found += made.num_items
            if made.is_last:
                self._going.discard(made.shard)
        self._batch += 1
        return batch, found

    def position(self) -> Position:
        """Before the next batch, of all processes, which call it together."""
        every = processes.exchange(self._begins)
        return Position(
            batch=self._batch,
            begins=tuple(max(begins[shard] for begins in every) for shard in range(SHARDS)),
        )

    def where(self) -> dict[str, Any]:
        """`position` for a checkpoint."""
        return self.position().to_json()

    def close(self) -> None:
        """Ends the workers."""
        self._iterator.close()
