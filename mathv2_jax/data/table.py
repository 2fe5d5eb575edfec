"""Many records with random access: parts of JSON lines, and beside each an index of its lines.

An index says where each line begins, its checksum, and what a mixture asks of every record before
it reads any: so a table of a million records opens in a moment.
"""

import collections
import dataclasses
import io
import math
import os
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from absl import logging
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import sources

T = TypeVar("T")
INDEX_SCHEMA = 1
INDEX = ".index"
PART_BYTES = 64 << 20  # of lines, about
_PARTS_KEPT = 4  # whole parts in memory, of folders that are not on this machine


@dataclasses.dataclass(frozen=True)
class Index:
    """Of a part's n lines: where each begins and the last ends, its CRC-32, and the hardness of its
    record's label, NaN where that has none.
    """

    sha256: str
    offsets: np.ndarray  # int64 [n + 1]
    checks: np.ndarray  # uint32 [n]
    hardness: np.ndarray  # float32 [n]

    @classmethod
    def of(cls, data: bytes, hardness: Sequence[float]) -> "Index":
        """That of a part's bytes; the hardness of each line's record is told."""
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
        last = [len(data)] if data and not data.endswith(b"\n") else []
        offsets = np.concatenate([[0], ends, last]).astype(np.int64)
        lines = memoryview(data)
        checks = [zlib.crc32(lines[a:b]) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        assert len(checks) == len(hardness)
        return cls(
            storage.Digest.of(data).sha256,
            offsets,
            np.array(checks, np.uint32),
            np.array(hardness, np.float32),
        )

    def to_bytes(self) -> bytes:
        """For a file."""
        file = io.BytesIO()
        np.savez(file, schema=np.array(INDEX_SCHEMA), **dataclasses.asdict(self))
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Index":
        """What `to_bytes` made; ValueError for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                arrays = dict(found)
            schema = int(arrays.pop("schema"))
            made = cls(sha256=str(arrays.pop("sha256")), **arrays)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{len(data)} bytes that are no index: {error}") from error
        if schema != INDEX_SCHEMA:
            raise ValueError(f"an index of schema {schema}, this program reads {INDEX_SCHEMA}")
        return made


def _hardness(record: Any) -> float:
    label: records.Label | None = getattr(record, "label", None)
    return label.hardness if label is not None else math.nan


def index_name(part: str) -> str:
    """The index that stands beside a part."""
    return part.removesuffix(".jsonl") + INDEX


class Writer:
    """Appends records to a table: parts of about PART_BYTES, which count all at once at the end.

    What was reported as written by `commit` stays, whatever happens after.
    """

    def __init__(self, directory: epath.PathLike, part_bytes: int = PART_BYTES):
        self._directory, self._part_bytes = epath.Path(directory), part_bytes
        self._parts = storage.Parts(directory)
        self._step = max(map(storage.part_step, self._parts.names()), default=0)
        self._parts.discard_after(self._step)
        self._lines: list[bytes] = []
        self._hardness: list[float] = []
        self._size = 0

    def add(self, record: Any) -> None:
        """One more record."""
        line = records.to_lines([record])
        self._lines.append(line)
        self._hardness.append(_hardness(record))
        self._size += len(line)
        if self._size >= self._part_bytes:
            self._flush()

    def commit(self) -> int:
        """Makes all records so far count; how many parts the table has."""
        self._flush()
        self._parts.commit(self._step)
        return len(self._parts.names())

    def _flush(self) -> None:
        if not self._lines:
            return
        self._step += 1
        name, data = storage.part_name(self._step), b"".join(self._lines)
        index = Index.of(data, self._hardness)
        storage.write_whole(self._directory / index_name(name), index.to_bytes())
        self._parts.write_part(name, data)
        self._lines, self._hardness, self._size = [], [], 0


class Table(Sequence[T], Generic[T]):
    """The records of a table that counted when it was opened, read when they are asked for.

    `labelled` [n] says which have a label, `hardness` [n] how hard it is (records.Label.hardness).

    `read` makes a record of a line. Where a part has no index, or one of another part's, it is made
    anew in memory, which reads the part.
    """

    def __init__(self, directory: epath.PathLike, read: Callable[[str], T]):
        folder, parts = epath.Path(directory), storage.Parts(directory)
        self._make([(folder / name, parts.digest(name)) for name in parts.names()], read)

    @classmethod
    def of_file(cls, path: epath.PathLike, read: Callable[[str], T]) -> "Table[T]":
        """That of one file of JSON lines, which `write_file` wrote or somebody else.

        FileNotFoundError where there is none.
        """
        found = cls.__new__(cls)
        found._make([(epath.Path(path), None)], read)
        return found

    def _make(
        self, files: list[tuple[epath.Path, storage.Digest | None]], read: Callable[[str], T]
    ) -> None:
        self._read, self._paths = read, [path for path, _ in files]
        found = [self._index(path, digest) for path, digest in files]
        self._offsets = [index.offsets for index in found]
        self._checks = [index.checks for index in found]
        self._begins = np.cumsum([0, *(len(index.checks) for index in found)])
        hardness = np.concatenate([[], *(index.hardness for index in found)])
        self.labelled = ~np.isnan(hardness)
        self.hardness = np.nan_to_num(hardness)
        self._open()

    def _index(self, path: epath.Path, digest: storage.Digest | None) -> Index:
        """That beside a file, or one made anew where it is not of the file's bytes.

        What a file of no part holds is known by its size, and each line's checksum.
        """
        beside, complaint = path.parent / index_name(path.name), "it is missing"
        if storage.exists(beside):
            try:
                index = Index.from_bytes(storage.read_bytes(beside))
                size = path.stat().length if digest is None else digest.size
                same = digest is None or index.sha256 == digest.sha256
                if same and index.offsets[-1] == size:
                    return index
                complaint = "it is of other bytes"
            except ValueError as error:
                complaint = str(error)
        data = storage.read_bytes(path)
        if digest is not None or storage.exists(beside):
            logging.warning("%s: %s; made anew, which takes longer", beside, complaint)
        if digest is not None and storage.Digest.of(data) != digest:
            raise ValueError(f"{path} is damaged: it is not what was committed; restore the file")
        made = sources.parse(data.splitlines(), self._read, str(path))
        return Index.of(data, list(map(_hardness, made)))

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[int, int] = {}
        weakref.finalize(self, _close, self._files)
        self._whole: collections.OrderedDict[int, bytes] = collections.OrderedDict()

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        return self._read(self.line(at))

    def num_bytes(self) -> np.ndarray:
        """Of each record's line, int64: a bound for the tokens of its texts."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets] or [[]])

    def line(self, at: int) -> str:
        """A record's line; ValueError where it is damaged, IndexError where there is none."""
        at = at + len(self) if at < 0 else at
        if not 0 <= at < len(self):
            raise IndexError(f"record {at} of {len(self)}")
        part = int(np.searchsorted(self._begins, at, side="right")) - 1
        number = int(at - self._begins[part])
        begin, end = (int(x) for x in self._offsets[part][number : number + 2])
        data = self._bytes(part, begin, end)
        if zlib.crc32(data) != int(self._checks[part][number]):
            raise ValueError(
                f"{self._paths[part]} is damaged: record {number + 1}, {end - begin} bytes from "
                f"{begin} on, is not what was written; restore the file"
            )
        return data.decode("utf-8").removesuffix("\n")

    def _bytes(self, part: int, begin: int, end: int) -> bytes:
        path = self._paths[part]
        if storage.is_local(path):
            with self._lock:
                if part not in self._files:
                    self._files[part] = os.open(path, os.O_RDONLY)
            return os.pread(self._files[part], end - begin, begin)
        with self._lock:
            if part not in self._whole:
                self._whole[part] = storage.read_bytes(path)
            self._whole.move_to_end(part)
            while len(self._whole) > _PARTS_KEPT:
                self._whole.popitem(last=False)
            return self._whole[part][begin:end]

    def lines(self) -> Iterator[str]:
        """All of them, in order."""
        return (self.line(at) for at in range(len(self)))

    def close(self) -> None:
        """Lets go of the open files; they are opened again when they are needed."""
        with self._lock:
            _close(self._files)

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in vars(self).items() if n not in ("_lock", "_files", "_whole")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __repr__(self) -> str:
        where = os.fspath(self._paths[0].parent) if self._paths else "nowhere"
        return f"Table({where!r}, {len(self)} records)"


def _close(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def write_file(path: epath.Path, items: Sequence[Any]) -> None:
    """All items as one file of JSON lines, and its index beside it."""
    data = records.to_lines(items)
    storage.write_whole(path, data)
    index = Index.of(data, list(map(_hardness, items)))
    storage.write_whole(path.parent / index_name(path.name), index.to_bytes())


def write(directory: epath.PathLike, items: Iterable[Any]) -> int:
    """Appends all items to a table, which count at once; how many."""
    writer, number = Writer(directory), 0
    for item in items:
        writer.add(item)
        number += 1
    writer.commit()
    return number
