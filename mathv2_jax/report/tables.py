"""Cases as the page reads them: an index of columns without texts, and an entry of texts each.

The index is loaded when the page opens, so a case costs it about a hundred bytes. A score stands
there as a digit, twice the score; several votes are a string of such digits, and what is missing
is null. Entries stand in chunks, which are loaded when one of their cases is opened.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mathv2_jax import records
from mathv2_jax.report import cases as cases_lib
from mathv2_jax.report import scripts

SHOWN = 1_000  # characters of a statement that are in the index
Case = cases_lib.Case
Remark = cases_lib.Remark
Chapter = cases_lib.Chapter


@dataclasses.dataclass(frozen=True)
class Tables:
    """`index` is one object; `chunks` are scripts by name."""

    index: Mapping[str, Any]
    chunks: Mapping[str, bytes]


def make(chapters: Sequence[Chapter]) -> Tables:
    """The tables of these problems and their cases, which keep their order."""
    made, places = dict[str, bytes](), list[tuple[int, int]]()
    for number, run in enumerate(scripts.chunks(_entries(chapters))):
        name, data = scripts.chunk_script(run)
        made[name] = data
        places += [(number, at) for at in range(len(run))]
    rows, problems = _Rows(chapters), list[dict[str, Any]]()
    entry = 0
    for chapter in chapters:
        problems.append(_problem(chapter, places[entry]))
        for case in chapter.cases:
            entry += 1
            rows.add(len(problems) - 1, case, places[entry])
        entry += 1
    index = {
        "chunks": list(made),
        "problems": _columns(problems),
        "cases": _columns(rows.made),
        "stages": rows.stages,
        "outcomes": [outcome.value for outcome in records.Outcome],
    }
    return Tables(index, made)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _problem(chapter: Chapter, place: tuple[int, int]) -> dict[str, Any]:
    problem = chapter.problem
    return {
        "id": problem.id,
        "statement": problem.statement[:SHOWN],
        "source": problem.source,
        "cases": len(chapter.cases),
        "chunk": place[0],
        "place": place[1],
    }


class _Rows:
    """The index's rows of cases, while they are made."""

    def __init__(self, chapters: Sequence[Chapter]):
        self.made: list[dict[str, Any]] = []
        self.stages: list[str] = []
        everyone = [case for chapter in chapters for case in chapter.cases]
        self._numbers = {case.id: number for number, case in enumerate(everyone)}
        self._first: dict[str, int] = {}  # by content, the first of its cases that has votes
        for number, case in enumerate(everyone):
            if case.votes:
                self._first.setdefault(case.content, number)
        self._votes = {number: everyone[number].votes for number in self._first.values()}

    def add(self, problem: int, case: Case, place: tuple[int, int]) -> None:
        """The row of the next case. Votes on an equal text count for one that has none."""
        sample, number, votes = case.sample, len(self.made), case.votes
        same = self._first.get(case.content, number)
        votes = votes or self._votes.get(same, [])
        self.made.append(
            {
                "id": case.id,
                "problem": problem,
                "stage": self._stage(case.source),
                "step": None if sample is None else sample.step,
                "number": None if sample is None else sample.index,
                "outcome": None if sample is None else list(records.Outcome).index(sample.outcome),
                "tokens": None if sample is None else sample.num_tokens,
                "self": _digit(case.self_score),
                "votes": _digits(votes),
                "metas": _digits([m.score for m in case.metas if m.score is not None]),
                "auto": _digit(case.label_by(people=False)),
                "person": _digit(case.label_by(people=True)),
                "total": None if sample is None else _short(sample.rewards.get("total")),
                "advantage": None if sample is None else _short(sample.advantage),
                "parents": [self._numbers[p] for p in case.parents if p in self._numbers],
                "same": None if same == number else same,
                "remarks": len(case.remarks),
                "chunk": place[0],
                "place": place[1],
            }
        )

    def _stage(self, name: str) -> int:
        if name not in self.stages:
            self.stages.append(name)
        return self.stages.index(name)


def _digit(score: float | None) -> int | None:
    return None if score is None else round(2 * score)


def _digits(scores: Sequence[float]) -> str:
    return "".join(str(round(2 * score)) for score in scores)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _entries(chapters: Sequence[Chapter]) -> Iterator[dict[str, Any]]:
    """A problem's entry, then those of its cases."""
    for chapter in chapters:
        problem = chapter.problem
        yield {
            "statement": problem.statement,
            "cluster": problem.cluster,
            "answer": problem.answer,
            "reference": problem.reference,
            "guidelines": problem.guidelines,
        }
        yield from map(_entry, chapter.cases)


def _entry(case: Case) -> dict[str, Any]:
    sample = case.sample
    known: dict[str, Any] = {
        "text": case.text,
        "self": case.self_analysis,
        "parents": list(case.parents),
        "labels": [_label(label) for label in case.labels],
        "metas": [_remark(meta) for meta in case.metas],
        "remarks": [_remark(remark) for remark in case.remarks],
        "thinking": "",
        "rewards": [],
        "checkpoint": "",
        "finish": "",
        "shown": None,
    }
    if sample is not None:
        known |= {
            "thinking": sample.thinking or "",
            "rewards": _rewards(sample),
            "checkpoint": sample.checkpoint,
            "finish": sample.finish.value,
        }
        if case.parents:
            known["shown"] = {"proof": sample.proof, "analysis": sample.analysis}
    return known


def _rewards(sample: records.Sample) -> list[tuple[str, float]]:
    return [(name, round(value, 6)) for name, value in sorted(sample.rewards.items())]


def _label(label: records.Label) -> dict[str, Any]:
    return dataclasses.asdict(label)


def _remark(remark: Remark) -> dict[str, Any]:
    """Fields that only a sample or a label gives are left out where there is none."""
    known: dict[str, Any] = {
        "id": remark.id,
        "text": remark.text,
        "score": remark.score,
        "source": remark.source,
        "vote": remark.is_vote,
        "metas": [_remark(meta) for meta in remark.metas],
    }
    sample = remark.sample
    if sample is not None:
        known |= {
            "step": sample.step,
            "outcome": sample.outcome.value,
            "checkpoint": sample.checkpoint,
            "thinking": sample.thinking or "",
            "rewards": _rewards(sample),
            "advantage": _short(sample.advantage),
            "target": sample.label,
        }
    if remark.label is not None:
        known["label"] = _label(remark.label)
    return known
