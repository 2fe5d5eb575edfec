"""What people judged, from a file: proofs or analyses, and the ratings that a model gave them.

A benchmark (IMO-ProofBench, Putnam, IMO, CMO) is a file of problems, which `mathv2-search` takes,
and one of gradings, which is read here: rows as `data/graded.py` reads them, under our names or
benchmarks' own (`data/benchmark_columns.py`), and Proof and Analysis records. They are read as they
stand: nothing is imported, no copy is taken out.
"""

import dataclasses
import json
from collections.abc import Sequence

from etils import epath

from mathv2_jax import records
from mathv2_jax.data import benchmark_columns, graded, raw_files
from mathv2_jax.evaluation import agreement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How scores become 0, 0.5 or 1; see `graded.Scale`."""

    scale: str = ""
    score_map: graded.ScoreMap | None = None


Kind = type[records.Proof] | type[records.Analysis]
NAMES: dict[Kind, str] = {records.Proof: "proof", records.Analysis: "analysis"}


@dataclasses.dataclass(frozen=True)
class Graded:
    """A row: its own id, its place in its file, what people labelled, and a rating beside it."""

    id: str
    place: int
    record: records.Proof | records.Analysis
    rating: float | None


def read(
    path: epath.Path,
    scale: Scale,
    rating: str = "",
    kind: Kind = records.Proof,
) -> list[Graded]:
    """What of a `kind` people graded in a file; `rating` names the column of a mean score, if any.

    Rows without people's score are left out; of an analysis that is ms. ValueError names a row that
    cannot be read, or a rating outside [0, 1]; FileNotFoundError where there is no file.
    """
    rows = raw_files.read(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    found, columns = [], set[str]()
    for raw in rows:
        columns.update(raw.fields)
        try:
            made = _graded(raw, path, scale, rating, kind)
        except ValueError as error:
            raise ValueError(f"{path}, line {raw.line}: {error}") from error
        if made is not None:
            found.append(made)
    if not columns:
        raise ValueError(f"{path} holds no row")
    if rating and rating not in columns:
        raise ValueError(
            f"{path}: no row has a column {rating!r}; there are {', '.join(sorted(columns))}"
        )
    if not found:
        raise ValueError(f"{path} holds no graded {NAMES[kind]}")
    if rating and all(item.rating is None for item in found):
        raise ValueError(f"{path}: no graded row has a number in its column {rating!r}")
    return found


def _graded(
    raw: raw_files.Raw,
    path: epath.Path,
    scale: Scale,
    rating: str,
    kind: Kind,
) -> Graded | None:
    if raw.fault:
        raise ValueError(raw.fault)
    fields = benchmark_columns.by_our_names(raw.fields)
    row = graded.Row(file=str(path), line=raw.line, fields=fields)
    if "schema" in raw.fields and "kind" in raw.fields:
        if rating:
            raise ValueError(
                f"it is a {kind.__name__} record of ours, which holds no rating {rating!r}: ask an "
                "engine, or give rows with a column"
            )
        own = records.from_json(kind, json.dumps(raw.fields))
        return None if own.label is None else Graded(own.id, raw.line, own, None)
    source = row.optional_text("source") or path.name.partition(".")[0]
    if kind is records.Proof:
        label = graded.label_of(row, source, scale)
        record = None if label is None else graded.as_proof(row, source, label)
    else:
        record = graded.as_analysis(row, source)
    if record is None or record.label is None:
        return None
    given = row.number(rating) if rating else None
    if given is not None and not 0.0 <= given <= 1.0:
        raise ValueError(f"{rating} is {given:g}: a mean score lies in 0..1")
    return Graded(row.id, raw.line, record, given)


def rated(items: Sequence[Graded]) -> list[agreement.Rated]:
    """The rows with the ratings that stand in their file; verdicts are the nearest scores."""
    return [
        as_rated(
            item,
            item.rating,
            None if item.rating is None else agreement.nearest_score(item.rating),
        )
        for item in items
    ]


def as_rated(item: Graded, rating: float | None, verdict: float | None) -> agreement.Rated:
    """A row under a model's rating and verdict."""
    record = item.record
    assert record.label is not None
    return agreement.Rated(
        id=item.id or record.id,
        problem_id=record.problem_id,
        source=record.source,
        scale=record.label.scale,
        score=record.label.score,
        rating=rating,
        verdict=verdict,
        length=len(record.text),
        place=item.place,
    )
