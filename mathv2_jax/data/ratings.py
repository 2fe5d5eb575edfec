"""What people say of proofs and analyses: a Label Studio export, or the CSV file filled in."""

import csv
import dataclasses
import datetime
import io
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import annotation

T = TypeVar("T")
_KINDS: Mapping[type, str] = {dict: "object", list: "list", str: "text"}
_QUALITY = re.compile(r"quality_(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rating:
    """What one person says of one task; None where they say nothing. `qualities` by analysis.

    `place` is that of the task in its file, from 1, `at` when it was said, where the file knows.
    """

    rater: str
    proof_id: str
    score: float | None
    qualities: Mapping[str, float]
    comment: str = ""
    place: int
    at: datetime.datetime | None = None


def read(path: epath.Path) -> list[Rating]:
    """The ratings in a JSON export of Label Studio, or in a filled-in CSV file, in its order.

    An annotation whose person is not known (`completed_by` is missing, as of a deleted account) is
    by a rater of its own, `annotation ID`. Fields that a team added to the page are left alone.
    ValueError names the file, the task and the fault.
    """
    data = storage.read_bytes(path)
    if path.suffix == ".csv":
        return _read_table(data, path)
    try:
        body = storage.parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON export of Label Studio: {error}") from error
    if not isinstance(body, list):
        raise ValueError(f"{path} is no JSON export of Label Studio: it holds no list of tasks")
    found = []
    for place, task in enumerate(body, start=1):
        where = f"{path}, task {place}"
        shown = task.get("data") if isinstance(task, dict) else None
        if not isinstance(shown, dict) or not isinstance(task.get("annotations"), list):
            raise ValueError(f'{where}: no "data" and "annotations"; export as JSON, not JSON-MIN')
        if "proof_id" not in shown:
            raise ValueError(f"{where} has no proof_id: it is of another project")
        _require(shown["proof_id"], str, f"{where}: proof_id")
        for given in task["annotations"]:
            given = _require(given, dict, f"{where}: an annotation")
            if not given.get("was_cancelled"):
                found.append(_of_annotation(given, shown, place, where))
    return found


def _require(value: Any, kind: type[T], what: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r:.40}, no {_KINDS[kind]}")
    return value


def _of_annotation(
    given: Mapping[str, Any], shown: Mapping[str, Any], place: int, where: str
) -> Rating:
    scores: dict[str, float] = {}
    comments: list[str] = []
    for result in _require(given.get("result"), list, f"{where}: the result of an annotation"):
        result = _require(result, dict, f"{where}: a result")
        name = _require(result.get("from_name"), str, f"{where}: from_name of a result")
        target = _target(name, shown, where)
        if target is None and name != "comment":
            continue
        value = _require(result.get("value"), dict, f"{where}: the value of {name}")
        if target is None:
            comments += _texts(value.get("text"), f"{where}: the text of {name}")
            continue
        choices = _require(value.get("choices"), list, f"{where}: choices of {name}")
        if len(choices) != 1 or target in scores:
            raise ValueError(f"{where}: {name} must be one choice, it is {choices!r:.40}")
        scores[target] = _score(choices[0], f"{where}: {name}")
    proof_id = shown["proof_id"]
    return Rating(
        rater=_rater(given, where),
        proof_id=proof_id,
        score=scores.get(proof_id),
        qualities={target: score for target, score in scores.items() if target != proof_id},
        comment="\n".join(comments),
        place=place,
        at=_time(given, where),
    )


def _target(name: str, shown: Mapping[str, Any], where: str) -> str | None:
    """The id of what a field of the page is about; None of a field that is about neither."""
    match = _QUALITY.fullmatch(name)
    if name != "score" and match is None:
        return None
    column = "proof_id" if match is None else f"analysis_{match[1]}_id"
    return _require(shown.get(column, ""), str, f"{where}: {column}") or None


def _texts(value: Any, what: str) -> list[str]:
    return [_require(text, str, what) for text in (value if isinstance(value, list) else [value])]


def _rater(given: Mapping[str, Any], where: str) -> str:
    by = given.get("completed_by")
    if isinstance(by, dict):
        by = by.get("email") or by.get("id")
    if by is None or by == "":
        if given.get("id") is None:
            raise ValueError(f"{where}: an annotation has neither completed_by nor an id")
        return f"annotation {given['id']}"
    if isinstance(by, bool) or not isinstance(by, int | str):
        raise ValueError(f"{where}: completed_by is {by!r:.40}, nobody's number or e-mail")
    return str(by)


def _time(given: Mapping[str, Any], where: str) -> datetime.datetime | None:
    for name in ("updated_at", "created_at"):
        if given.get(name) is not None:
            text = _require(given[name], str, f"{where}: {name}")
            try:
                at = datetime.datetime.fromisoformat(text)
            except ValueError as error:
                raise ValueError(f"{where}: {name} is {text!r:.40}, no time") from error
            return at if at.tzinfo else at.replace(tzinfo=datetime.UTC)
    return None


def _score(text: Any, where: str) -> float:
    """Digits as the number that they are: spreadsheets write 1 as 1.0, people .5."""
    try:
        return next(s for s in records.SCORES if isinstance(text, str) and s == float(text))
    except (StopIteration, ValueError):
        raise ValueError(f"{where}: {text!r:.40} is none of 0, 0.5, 1") from None


def _read_table(data: bytes, path: epath.Path) -> list[Rating]:
    limit = csv.field_size_limit()  # one for the process
    try:
        csv.field_size_limit(max(limit, len(data)))
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    finally:
        csv.field_size_limit(limit)
    found = (_of_row(row, place, f"{path}, row {place}") for place, row in enumerate(rows, start=1))
    return [rating for rating in found if rating is not None]


def _of_row(row: Mapping[str, Any], place: int, where: str) -> Rating | None:
    """None of a row that nobody has filled in."""
    if None in row:
        raise ValueError(f"{where} has more cells than the header")
    cells = {name: (value or "").strip() for name, value in row.items()}
    if not cells.get("proof_id"):
        raise ValueError(f"{where} has no proof_id: keep the columns of {annotation.TABLE}")
    qualities = {}
    for name, value in cells.items():
        match = _QUALITY.fullmatch(name)
        if match and value:
            analysis = cells.get(f"analysis_{match[1]}_id")
            if not analysis:
                raise ValueError(f"{where}: {name} is filled in, but there is no such analysis")
            qualities[analysis] = _score(value, f"{where}: {name}")
    score = cells.get("score", "")
    if not score and not qualities:
        return None
    if not cells.get("rater"):
        raise ValueError(f"{where} has no rater: write a name or initials there")
    return Rating(
        rater=cells["rater"],
        proof_id=cells["proof_id"],
        score=_score(score, f"{where}: score") if score else None,
        qualities=qualities,
        comment=cells.get("comment", ""),
        place=place,
    )
