"""Files to typed data, with errors that name file, line and fault."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from etils import epath

from mathv2_jax import records, storage

T = TypeVar("T")


def read(path: epath.PathLike, kind: type[T]) -> list[T]:
    """Every record of a JSON-lines file; ValueError names the file, the line and the fault."""
    # Bytes split at \n and \r, which JSON escapes; text would split at U+2028, which it need not.
    return parse_lines(storage.read_bytes(path).splitlines(), kind, str(path))


def parse_lines(lines: Sequence[str | bytes], kind: type[T], where: str) -> list[T]:
    """As `read`, of lines (in UTF-8 where they are bytes) that came from `where`."""
    return parse(lines, functools.partial(records.from_json, kind), where)


def parse(lines: Sequence[str | bytes], make: Callable[[str], T], where: str) -> list[T]:
    """As `parse_lines`, where `make` makes a record of a line or raises ValueError."""
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(make(line if isinstance(line, str) else line.decode("utf-8")))
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from error
    return found


def read_object(path: epath.PathLike, fields: Sequence[str], way_out: str) -> dict[str, Any]:
    """The JSON object in a file, which holds `fields`; a ValueError ends with the `way_out`.

    FileNotFoundError where there is no file.
    """
    data = storage.read_bytes(path)
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({len(data)} bytes that are no JSON: {error}); {way_out}"
        ) from error
    missing = [f for f in fields if not isinstance(body, dict) or f not in body]
    if missing or not isinstance(body, dict):
        fault = f"it has no field {missing[0]!r}" if missing else "it is no JSON object"
        raise ValueError(f"{path} is damaged ({fault}); {way_out}")
    return body
