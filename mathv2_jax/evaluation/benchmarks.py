"""What people graded, from a file: proofs with scores, and the ratings that a verifier gave them.

A benchmark (IMO-ProofBench, Putnam, IMO, CMO) is a file of problems, which `mathv2-search` takes,
and one of gradings, which is read here: rows as `data/graded.py` reads them, from JSON lines, CSV
or Parquet, and Proof records. They are read as they stand: nothing is imported, no copy is taken
out.
"""

import dataclasses
import json
from collections.abc import Sequence

from etils import epath

from mathv2_jax import records
from mathv2_jax.data import graded, raw_files
from mathv2_jax.evaluation import agreement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How scores become 0, 0.5 or 1; see `graded.Scale`."""

    scale: str = ""
    score_map: graded.ScoreMap | None = None


@dataclasses.dataclass(frozen=True)
class Graded:
    """A row: its own id, the proof with people's label, and a rating that stands beside it."""

    id: str
    proof: records.Proof
    rating: float | None


def read(path: epath.Path, scale: Scale, rating: str = "") -> list[Graded]:
    """The graded proofs of a file; `rating` names the column of a verifier's mean score, if any.

    Rows without a score are left out. ValueError names a row that cannot be read, or a rating
    outside [0, 1]; FileNotFoundError where there is no file.
    """
    rows = raw_files.read(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    found, columns = [], set[str]()
    for raw in rows:
        columns.update(raw.fields)
        try:
            made = _graded(raw, path, scale, rating)
        except ValueError as error:
            raise ValueError(f"{path}, line {raw.line}: {error}") from error
        if made is not None:
            found.append(made)
    if rating and rating not in columns:
        raise ValueError(
            f"{path}: no row has a column {rating!r}; there are {', '.join(sorted(columns))}"
        )
    if not found:
        raise ValueError(f"{path} holds no graded proof")
    return found


def _graded(raw: raw_files.Raw, path: epath.Path, scale: Scale, rating: str) -> Graded | None:
    if raw.fault:
        raise ValueError(raw.fault)
    row = graded.Row(file=str(path), line=raw.line, fields=raw.fields)
    if raw.fields.get("kind") == records.Proof.__name__ and "schema" in raw.fields:
        own = records.from_json(records.Proof, json.dumps(raw.fields))
        return None if own.label is None else Graded(own.id, own, None)
    source = row.optional_text("source") or path.name.partition(".")[0]
    label = graded.label_of(row, source, scale)
    if label is None:
        return None
    given = row.number(rating) if rating else None
    if given is not None and not 0.0 <= given <= 1.0:
        raise ValueError(f"{rating} is {given:g}: a mean score lies in 0..1")
    return Graded(row.id, graded.as_proof(row, source, label), given)


def rated(items: Sequence[Graded]) -> list[agreement.Rated]:
    """The rows with the ratings that stand in their file; verdicts are the nearest scores."""
    return [
        as_rated(
            item,
            place,
            item.rating,
            None if item.rating is None else agreement.nearest_score(item.rating),
        )
        for place, item in enumerate(items)
    ]


def as_rated(
    item: Graded, place: int, rating: float | None, verdict: float | None
) -> agreement.Rated:
    """A row under a verifier's rating and verdict."""
    proof = item.proof
    assert proof.label is not None
    return agreement.Rated(
        id=item.id or proof.id,
        problem_id=proof.problem_id,
        source=proof.source,
        scale=proof.label.scale,
        score=proof.label.score,
        rating=rating,
        verdict=verdict,
        length=len(proof.text),
        place=place,
    )
