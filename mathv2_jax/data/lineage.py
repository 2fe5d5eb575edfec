"""Where a record comes from: the tree of what it was made of, down to files and checkpoints."""

import collections
import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import store as store_lib

_KINDS = {**store_lib.KINDS, records.Sample.__name__: records.Sample}
_WIDTH = 72  # characters of a text that are shown
Known = tuple[dict[str, Any], dict[str, list[records.Sample]]]


def read(folder: epath.Path) -> Iterator[Any]:
    """Every record in a store, or in the `records` folder of a run.

    ValueError where there is none, or a line is damaged.
    """
    tables = [folder, *(p for p in _folders(folder))]
    found = False
    for at in tables:
        if storage.list_names(at, "manifest-*.json"):
            found = True
            yield from _parsed(storage.Parts(at).read(), at)
        for name in storage.list_names(at, "*.jsonl") if at.name in ("input", "experts") else ():
            found = True
            yield from _parsed(storage.read_bytes(at / name).split(b"\n")[:-1], at / name)
    if not found:
        raise ValueError(
            f"{folder} holds no records: give the folder that mathv2-records imports into, or the "
            "folder `records` of a run"
        )


def _folders(folder: epath.Path) -> list[epath.Path]:
    inside = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.name)
    return [*inside, *(p / "experts" for p in inside if (p / "experts").is_dir())]


def _parsed(lines: Iterable[str | bytes], where: epath.Path) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        try:
            text = line if isinstance(line, str) else line.decode()
            body = storage.parse_json(text)
            if not isinstance(body, dict):
                raise ValueError("no JSON object")
            kind = _KINDS.get(str(body.get("kind")))
            record = None if kind is None else records.from_json(kind, text)
        except ValueError as error:
            raise ValueError(f"{where}, line {number} is damaged ({error})") from error
        if record is not None:
            yield record


def known(items: Iterable[Any]) -> Known:
    """Records by id, the labelled before others of one text; and samples by what they judge."""
    by_id: dict[str, Any] = {}
    judging: dict[str, list[records.Sample]] = collections.defaultdict(list)
    for item in items:
        if isinstance(item, store_lib.Reject):
            continue
        if item.id not in by_id or getattr(item, "label", None) is not None:
            by_id[item.id] = item
        if isinstance(item, records.Sample) and item.target not in ("", item.problem_id):
            judging[item.target].append(item)
    return by_id, judging


def tree(given: str, found: Known) -> list[str]:
    """The tree of a record, named by its id or by the beginning of one; a line an entry.

    ValueError where no record, or more than one, has it.
    """
    by_id, judging = found
    names = [given] if given in by_id else [name for name in by_id if name.startswith(given)]
    if len(names) != 1:
        near = difflib.get_close_matches(given, by_id, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        said = f"{len(names)} records, such as {names[0]} and {names[1]}" if names else "no record"
        raise ValueError(f"--lineage={given}: {said} here{' begin so' if names else hint}")
    return _lines(names[0], by_id, judging, seen=set())


def _lines(
    name: str, by_id: dict[str, Any], judging: dict[str, list[records.Sample]], seen: set[str]
) -> list[str]:
    record = by_id.get(name)
    if record is None:
        return [_outside(name, by_id)]
    if name in seen:
        return [f"{_title(record)} (see above)"]
    seen.add(name)
    branches = [[line] for line in _facts(record)]
    for parent in _parents(record):
        branches.append(_lines(parent, by_id, judging, seen))
    label = getattr(record, "label", None)
    if isinstance(label, records.Label) and label.source == "auto":
        for sample in judging.get(record.id, ()):
            branches.append(_lines(sample.id, by_id, judging, seen))
    return [_title(record), *_joined(branches)]


def _joined(branches: list[list[str]]) -> Iterator[str]:
    for place, lines in enumerate(branches):
        last = place == len(branches) - 1
        yield ("`- " if last else "|- ") + lines[0]
        yield from (("   " if last else "|  ") + line for line in lines[1:])


def _parents(record: Any) -> list[str]:
    found = list(getattr(record, "parents", None) or ())
    for field in ("problem_id", "proof_id", "target", "false_variant_of"):
        value = getattr(record, field, None)
        if value and value != record.id:
            found.append(value)
    return list(dict.fromkeys(found))


def _title(record: Any) -> str:
    text = next(
        (
            getattr(record, f)
            for f in ("text", "statement", "assistant", "file")
            if hasattr(record, f)
        ),
        "",
    )
    shown = " ".join(text.split())
    shown = shown if len(shown) <= _WIDTH else f"{shown[: _WIDTH - 3]}..."
    source = getattr(record, "source", "") or getattr(record, "stage", "")
    return f"{type(record).__name__} {record.id}" + (f" [{source}]" if source else "") + f" {shown}"


def _facts(record: Any) -> Iterator[str]:
    """What is known of it beside other records."""
    label = getattr(record, "label", None)
    if isinstance(label, records.Label):
        votes = f", votes {' '.join(f'{v:g}' for v in label.votes)}" if label.votes else ""
        rater = f" by {label.rater}" if label.rater else ""
        yield f"label {label.score:g}: {label.source}{rater}, {label.rubric}, {label.scale}{votes}"
    origin = getattr(record, "origin", None)
    if isinstance(origin, records.Origin):
        facts = " ".join(f"{name} {value}" for name, value in dataclasses.asdict(origin).items())
        yield f"made by {facts}"
    if isinstance(record, records.Sample):
        said = f"says {record.score:g}" if record.score is not None else record.outcome.value
        rewards = " ".join(f"{name} {value:g}" for name, value in sorted(record.rewards.items()))
        yield (
            f"{record.role} at {record.checkpoint}, step {record.step} of {record.stage}: {said}"
            + (f"; rewards {rewards}" if rewards else "")
            + (
                f"; meta-votes {' '.join(f'{v:g}' for v in record.meta_votes)}"
                if record.meta_votes
                else ""
            )
        )
    if isinstance(record, store_lib.Import):
        yield f"{record.rows} rows, sha256 {record.sha256[:16]}, settings {record.settings}"


def _outside(name: str, by_id: dict[str, Any]) -> str:
    """A parent that is no record: a line of an imported file, a checkpoint, a row's own id."""
    number, colon, line = name.rpartition(":")
    if colon and number in by_id:
        came_by = by_id[number]
        part = "task" if came_by.of_ratings else "line"
        return f"{part} {line} of {came_by.file} (import {number})"
    if name.startswith(store_lib.ROW):
        return f"{name.removeprefix(store_lib.ROW)} (the row's own id)"
    return f"{name} (not among these records)"
