"""A verifier's scores against people's: how often it is right, how it errs, and whom it favours.

The same figures are those of a meta-verifier's ratings against people's judgements of analyses.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mathv2_jax import records
from mathv2_jax.evaluation import intervals

BINS = 5  # of calibration
SURE = 0.1  # so near to 0 or 1 a rating is confident


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rated:
    """One text that people scored and a verifier rated.

    `score` is people's; `rating` the verifier's mean vote, in [0, 1], None where it gave none;
    `verdict` the score that it stands for. `length` counts characters, `place` is the item's in its
    file.
    """

    id: str
    problem_id: str
    source: str
    scale: str
    score: float
    rating: float | None
    verdict: float | None
    length: int
    place: int


def nearest_score(rating: float) -> float:
    """The one of 0, 0.5 and 1 that a mean rating is nearest to, the lower of two."""
    return min(records.SCORES, key=lambda score: (abs(score - rating), score))


def measure(items: Sequence[Rated], **settings: int) -> dict[str, Any]:
    """JSON-able figures, all with intervals over problems: of all items that have a rating.

    `answered` is the share that has one. `exact` and `mean_error` are of verdicts and of ratings;
    `too_high` and `too_low` are the shares whose verdict lies above people's score, and below it;
    `auc` is the chance that a proof of score 1 is rated above another, ties half; the rows of
    `confusion` are people's scores, its columns verdicts. `length_bias` and `place_bias` are the
    mean of rating - score in thirds of the items. `confidently_wrong` names items.
    """
    rated = [i for i in items if i.rating is not None and i.verdict is not None]
    problems = [i.problem_id for i in rated]
    score = np.array([i.score for i in rated])
    rating = np.array([i.rating for i in rated], float)
    verdict = np.array([i.verdict for i in rated], float)
    return {
        "items": len(items),
        "answered": len(rated) / len(items) if items else None,
        "exact": _body(intervals.mean(problems, (verdict == score).tolist(), **settings)),
        "too_high": _body(intervals.mean(problems, (verdict > score).tolist(), **settings)),
        "too_low": _body(intervals.mean(problems, (verdict < score).tolist(), **settings)),
        "mean_error": _body(intervals.mean(problems, np.abs(rating - score).tolist(), **settings)),
        "auc": _body(intervals.bootstrap(problems, _Auc(score, rating), **settings)),
        "constant": _constant(score),
        "confusion": [
            [int(np.sum((score == s) & (verdict == v))) for v in records.SCORES]
            for s in records.SCORES
        ],
        "calibration": _calibration(rating, score),
        "calibration_error": _body(
            intervals.bootstrap(problems, _CalibrationError(rating, score), **settings)
        ),
        "length_bias": _thirds(rated, [i.length for i in rated], settings),
        "place_bias": _thirds(rated, [i.place for i in rated], settings),
        "confidently_wrong": [_case(i) for i in rated if _is_confidently_wrong(i)],
    }


def _body(figure: intervals.Figure) -> dict[str, Any]:
    return dataclasses.asdict(figure)


def _constant(score: np.ndarray) -> float | None:
    """The share that the best constant verdict gets right."""
    return max(float(np.mean(score == s)) for s in records.SCORES) if len(score) else None


@dataclasses.dataclass(frozen=True)
class _Auc:
    score: np.ndarray
    rating: np.ndarray

    def __call__(self, at: np.ndarray) -> float:
        good, other = self.rating[at][self.score[at] == 1.0], self.rating[at][self.score[at] < 1.0]
        if not len(good) or not len(other):
            return math.nan
        ordered = np.sort(other)
        below = np.searchsorted(ordered, good, "left")
        upto = np.searchsorted(ordered, good, "right")
        return float(np.mean(below + upto) / (2 * len(other)))


@dataclasses.dataclass(frozen=True)
class _CalibrationError:
    """The mean distance of bins' mean rating from their mean score, by their items."""

    rating: np.ndarray
    score: np.ndarray

    def __call__(self, at: np.ndarray) -> float:
        if not len(at):
            return math.nan
        rows = _calibration(self.rating[at], self.score[at])
        return sum(r["items"] * abs(r["rating"] - r["score"]) for r in rows) / len(at)


def _calibration(rating: np.ndarray, score: np.ndarray) -> list[dict[str, float]]:
    """Bins of ratings that hold any: how many items, and the means of both."""
    bins = np.minimum((rating * BINS).astype(int), BINS - 1)
    return [
        {
            "items": int(np.sum(bins == b)),
            "rating": float(rating[bins == b].mean()),
            "score": float(score[bins == b].mean()),
        }
        for b in range(BINS)
        if np.any(bins == b)
    ]


def _thirds(
    rated: Sequence[Rated], by: Sequence[int], settings: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Mean rating - score in the lowest, middle and highest third of the items."""
    found = []
    for part in np.array_split(np.argsort(by, kind="stable"), 3):
        members = [rated[place] for place in part]
        if members:
            gaps = [(i.rating or 0.0) - i.score for i in members]
            figure = intervals.mean([i.problem_id for i in members], gaps, **settings)
            upto = max(by[place] for place in part)
            found.append({"upto": int(upto), **_body(figure)})
    return found


def _is_confidently_wrong(item: Rated) -> bool:
    assert item.rating is not None
    high, low = item.rating >= 1.0 - SURE, item.rating <= SURE
    return (high and item.score < 1.0) or (low and item.score > 0.0)


def _case(item: Rated) -> dict[str, Any]:
    return {"id": item.id, "source": item.source, "score": item.score, "rating": item.rating}


def by_group(items: Sequence[Rated], **settings: int) -> dict[str, dict[str, Any]]:
    """`measure` of all items, and of each source and scale where there are several."""
    found = {"all": measure(items, **settings)}
    for field in ("source", "scale"):
        names = sorted({getattr(item, field) for item in items})
        for name in names if len(names) > 1 else ():
            own = [item for item in items if getattr(item, field) == name]
            found[f"{field} {name}"] = measure(own, **settings)
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for each group, then all items' confusion, calibration and bias."""
    lines = [
        "| items | n | rated | right verdicts | too high | too low | constant | mean error | AUC | "
        "calibration error |",
        "|---|--:|--:|---|---|---|--:|---|---|---|",
    ]
    for name, body in found.items():
        answered = "-" if body["answered"] is None else f"{body['answered']:.0%}"
        constant = "-" if body["constant"] is None else f"{body['constant']:.3f}"
        verdicts = [_cell(body[key]) for key in ("exact", "too_high", "too_low")]
        ratings = [_cell(body[key]) for key in ("mean_error", "auc", "calibration_error")]
        cells = [name, str(body["items"]), answered, *verdicts, constant, *ratings]
        lines.append(f"| {' | '.join(cells)} |")
    whole = found["all"]
    lines += ["", "| people's score | verdict 0 | 0.5 | 1 |", "|---|--:|--:|--:|"]
    for score, row in zip(records.SCORES, whole["confusion"], strict=True):
        lines.append(f"| {score:g} | " + " | ".join(map(str, row)) + " |")
    lines += ["", "| rating (mean) | n | people's mean score |", "|---|--:|--:|"]
    for row in whole["calibration"]:
        lines.append(f"| {row['rating']:.3f} | {row['items']} | {row['score']:.3f} |")
    for name, key in (("characters", "length_bias"), ("place in the file", "place_bias")):
        lines += ["", f"| {name} up to | n | rating - score |", "|---|--:|---|"]
        for row in whole[key]:
            lines.append(f"| {row['upto']} | {row['items']} | {_cell(row)} |")
    wrong = whole["confidently_wrong"]
    lines += ["", f"Confidently wrong (within {SURE:g} of 0 or 1): {len(wrong)}", ""]
    lines += [
        f"- {case['id']} ({case['source']}): people {case['score']:g}, rating {case['rating']:.3f}"
        for case in wrong
    ]
    return "\n".join(lines) + "\n"


def _cell(body: Mapping[str, Any]) -> str:
    names = ("value", "low", "high", "items", "problems")
    return str(intervals.Figure(*(body[name] for name in names)))
