"""The problems of a search, from a file of ours or of others."""

import json
import re

from etils import epath

from mathv2_jax import records
from mathv2_jax.data import benchmark_columns, graded, raw_files, store

_LONGEST_NAME = 40
_PROOFBENCH = re.compile(r"\bPB-(Basic|Advanced)-\d+$")


def read(path: epath.Path) -> list[records.Problem]:
    """The problems of a file of JSON, JSON lines, CSV, Parquet or ArrayRecord, in order, each once.

    A row is a Problem record, or has the field `problem`, or what benchmarks call it
    (`data/benchmark_columns.py`), and what else `data/graded.py` reads. FileNotFoundError or
    ValueError names what cannot be read.
    """
    found: dict[str, records.Problem] = {}
    rows = raw_files.read(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    for raw in rows:
        try:
            problem = _problem(raw, path)
        except ValueError as error:
            raise ValueError(f"{path}, line {raw.line}: {error}") from error
        found.setdefault(problem.id, problem)
    if not found:
        raise ValueError(f"{path} holds no problem")
    return list(found.values())


def _problem(raw: raw_files.Raw, path: epath.Path) -> records.Problem:
    if raw.fault:
        raise ValueError(raw.fault)
    fields = benchmark_columns.by_our_names(raw.fields)
    if fields.get("kind") == records.Problem.__name__ and "schema" in fields:
        return records.from_json(records.Problem, json.dumps(raw.fields))
    row = graded.Row(file=str(path), line=raw.line, fields=fields)
    source = row.optional_text("source") or path.name.partition(".")[0]
    if part := _PROOFBENCH.search(row.id):  # which the benchmark reports apart
        source = f"{source}-{part[1].lower()}"
    parents = (f"{store.ROW}{row.id}",) if row.id else ()
    return graded.problems_of(row, source, "", parents)[0]


def name(problem: records.Problem) -> str:
    """What its file calls a problem, on a line, else its id."""
    rows = (p.removeprefix(store.ROW) for p in problem.parents if p.startswith(store.ROW))
    return " ".join(next(rows, problem.id).split())[:_LONGEST_NAME]
