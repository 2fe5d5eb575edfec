"""Files to typed data, with errors that name file, line and fault; records to endless streams."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import grain
from etils import epath

from mathv2_jax import records, storage

T = TypeVar("T")


def read(path: epath.PathLike, kind: type[T]) -> list[T]:
    """Every record of a JSON-lines file; ValueError names the file, the line and the fault."""
    # Bytes split at \n and \r, which JSON escapes; text would split at U+2028, which it need not.
    return parse_lines(storage.read_bytes(path).splitlines(), kind, str(path))


def parse_lines(lines: Sequence[str | bytes], kind: type[T], where: str) -> list[T]:
    """As `read`, of lines (in UTF-8 where they are bytes) that came from `where`."""
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line if isinstance(line, str) else line.decode("utf-8")
            found.append(records.from_json(kind, text))
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


def stream(
    sources: Mapping[str, Sequence[Any]], weights: Mapping[str, float], seed: int
) -> grain.MapDataset:
    """An endless, shuffled mixture with random access: element i is a function of (seed, i).

    Each source is reshuffled every epoch. A stage's data position is one number, the index of
    the next element, whatever the number of hosts or workers. A source of weight 0 is left out;
    ValueError names one that is empty, or whose weight is negative or not finite.
    """
    for name, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"source {name!r} has weight {weight}: give it 0 or more")
    names = sorted(name for name in sources if weights.get(name, 0.0) > 0.0)
    if not names:
        raise ValueError(f"no source has a positive weight among {sorted(sources)}")
    parts = []
    for place, name in enumerate(names):
        if not sources[name]:
            raise ValueError(f"source {name!r} is empty: give it records or take its weight away")
        part = grain.MapDataset.source(sources[name]).seed((seed + place) % 2**31)
        parts.append(part.shuffle().repeat())
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, weights=[weights[name] for name in names])
