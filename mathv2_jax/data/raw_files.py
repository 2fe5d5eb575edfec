"""Files of others, row by row: JSON, JSON lines, CSV, Parquet and ArrayRecord.

A row is a mapping from names to values, or the reason why it is none. Rows are counted from 1: the
lines of JSON lines, the records of the other formats (a CSV file's header is no record).
"""

import codecs
import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from mathv2_jax import storage

_ANY_CELL = 2**31 - 1  # characters: the limit of csv itself is 131,072
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Raw(NamedTuple):
    """One row: its fields, or the `fault` that keeps it from having any."""

    line: int
    fields: Mapping[str, Any]
    fault: str = ""


def read(path: epath.Path) -> Iterator[Raw]:
    """The rows of a file, by its name's ending: .json, .jsonl, .csv, .parquet or .array_record.

    Empty lines are no rows. ValueError where the file as a whole cannot be read, or its ending is
    another.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(
            f"{path}: a file to import ends in one of {', '.join(_READERS)}, this in "
            f"{path.suffix!r}"
        )
    return reader(path)


def _json_row(number: int, data: bytes) -> Raw:
    try:
        body = storage.parse_json(data.decode("utf-8"))
    except ValueError as error:
        return Raw(number, {}, f"no JSON: {error}")
    return _as_row(number, body)


def _as_row(number: int, body: Any) -> Raw:
    if not isinstance(body, dict):
        return Raw(number, {}, f"a row is a JSON object, this is a {type(body).__name__}")
    return Raw(number, body)


def _json(path: epath.Path) -> Iterator[Raw]:
    """The objects of a list."""
    data = storage.read_bytes(path).removeprefix(codecs.BOM_UTF8)
    try:
        body = storage.parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; JSON lines end in .jsonl") from error
    if not isinstance(body, list):
        raise ValueError(f"{path} holds a JSON {type(body).__name__}, rows stand in a list")
    yield from (_as_row(number, item) for number, item in enumerate(body, start=1))


def _json_lines(path: epath.Path) -> Iterator[Raw]:
    # Bytes split at line feeds, which JSON escapes; text would split at U+2028, which it need not.
    data = storage.read_bytes(path).removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield _json_row(number, line)


def _csv(path: epath.Path) -> Iterator[Raw]:
    """Empty cells are left out: CSV has no other way to say that there is no value."""
    data = storage.read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 ({error}); convert it first") from error
    csv.field_size_limit(_ANY_CELL)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise ValueError(f"{path}: its first line is no CSV header: {error}") from error
    if len(set(header)) < len(header) or not all(header):
        raise ValueError(f"{path}: its header {header!r:.200} lacks a name or has one twice")
    number = 0
    while True:
        number += 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            yield Raw(number, {}, f"no CSV: {error}")
            continue
        if cells is None:
            return
        if len(cells) != len(header):
            if cells:
                yield Raw(number, {}, f"{len(cells)} cells, the header has {len(header)}")
            continue
        yield Raw(number, {name: c for name, c in zip(header, cells, strict=True) if c != ""})


def _parquet(path: epath.Path) -> Iterator[Raw]:
    try:
        from pyarrow import parquet
        from pyarrow.lib import ArrowInvalid
    except ImportError as error:
        raise ValueError(f'{path}: Parquet needs pyarrow: pip install -e ".[data]"') from error
    try:
        with path.open("rb") as file, parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Raw(number, {n: v for n, v in fields.items() if v is not None})
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error


def _array_record(path: epath.Path) -> Iterator[Raw]:
    """Records of JSON objects."""
    if not storage.is_local(path):
        raise ValueError(f"{path}: ArrayRecord files are read from local folders; copy it first")
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue] - no stubs

    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
    except ValueError as error:
        raise ValueError(f"{path} is no ArrayRecord file: {error}") from error
    try:
        for number in range(reader.num_records()):
            yield _json_row(number + 1, reader.read([number])[0])
    finally:
        reader.close()


_READERS: Mapping[str, Callable[[epath.Path], Iterator[Raw]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
    ".array_record": _array_record,
}


def as_number(value: Any) -> Any:
    """A cell of text that is a number, as that number; anything else as it is."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return value
    return float(value)
