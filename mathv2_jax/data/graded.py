"""Rows of human-graded files to records; a row that cannot be used is named, not just dropped.

A file is JSON lines. A graded row has id, source, problem, proof, human_score and human_max; a row
of analyses has, beside the proof, `analysis` and its analyst. Each source grades on a scale of its
own, whose name every label keeps; `ScaleMap` says which scales may be learned from together.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.text import parse

# What a 1 means in each public source: `source` of a row -> name of its scale.
SCALES: Mapping[str, str] = {
    "deepseek_math_v2": records.FULL_MARKS,  # experts, every mark of 7, 10 or 21
    "opc": "opc-5-of-7",  # "correct": would earn 5 of 7 or more, small slips pass
    "mathconverse": "one-reader-6-of-6",  # one reader each, students among them
    "rprover": "disputed-gold",  # a second look at labels that a model doubted
}
AGREEMENT = "agrees-with-critique"  # scale of ms: a person agreed (1) with a critique or not (0)
NEARLY_FULL = 0.85  # of the marks: 0.5

_VERDICT_TAG = re.compile(r"<verification>\s*(true|false)\s*</verification>", re.IGNORECASE)
_CHUNK_MARK = re.compile(r"^\s*\[chunk \d+\]\s*", re.MULTILINE)
_MIN_NAME = 4  # shorter names of writers (o3) are also names of points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reject:
    """A row that is not used, or not for what its file is for. `rule` is a word to count by.

    `line` counts from 1; `id` is empty where none was read.
    """

    file: str
    line: int
    id: str
    rule: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One JSON object and where it stood."""

    file: str
    line: int
    fields: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The row's own id."""
        return str(self.fields.get("id", ""))

    def reject(self, rule: str, reason: str) -> Reject:
        """This row, left out by `rule`."""
        return Reject(file=self.file, line=self.line, id=self.id, rule=rule, reason=reason)

    def text(self, name: str) -> str:
        """A field that must hold text; ValueError where it holds none that can be encoded."""
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"field {name!r} holds no text")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"field {name!r} holds a lone surrogate, which is no text")
        return value.strip()


def read_rows(folder: epath.Path, file: str, rejects: list[Reject]) -> list[Row]:
    """The objects of a JSON-lines file, malformed lines to `rejects`.

    FileNotFoundError names a file that is not there.
    """
    path = folder / file
    if not storage.exists(path):
        raise FileNotFoundError(
            f"{path} does not exist: a folder of real data holds graded/*.jsonl and "
            "problems/*.jsonl; config.data names the folder, config.real its files"
        )
    rows = []
    for number, line in enumerate(storage.read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            body = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # the latter where it nests too deeply
            body, fault = None, f"no JSON: {error}"
        else:
            fault = f"a row is a JSON object, this is a {type(body).__name__}"
        row = Row(file=file, line=number, fields=body if isinstance(body, dict) else {})
        if isinstance(body, dict):
            rows.append(row)
        else:
            rejects.append(row.reject("malformed", fault))
    if not rows:
        logging.warning("%s holds no row that can be read, though config.real names it", path)
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleMap:
    """Which labels may be learned from together.

    `target` is the scale of the training labels. A label of another scale is used only where
    `pairs` names that scale and the label's score: (theirs, ours). Scores that are not named are
    left out. Mapped or not, a label keeps the name of the scale that it was given on.
    """

    target: str = records.FULL_MARKS
    pairs: Mapping[str, tuple[tuple[float, float], ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for scale, pairs in self.pairs.items():
            for theirs, ours in pairs:
                records.require_score(theirs, f"scale map of {scale}")
                records.require_score(ours, f"scale map of {scale}")
            if len({theirs for theirs, _ in pairs}) < len(pairs):
                raise ValueError(f"scale map of {scale}: {pairs} maps one score twice")

    def mapped(self, label: records.Label) -> records.Label:
        """The label with our score; ValueError says what the map lacks."""
        if label.scale == self.target:
            return label
        if label.scale not in self.pairs:
            raise ValueError(
                f"scale {label.scale} is not mixed with {self.target} without a stated map"
            )
        scores = dict(self.pairs[label.scale])
        if label.score not in scores:
            raise ValueError(f"scale {label.scale}: the map does not name its score {label.score}")
        return dataclasses.replace(label, score=scores[label.score])


def human_score(row: Row) -> float:
    """Full marks 1, at least 85 percent 0.5, else 0; ValueError where the row's `score` differs."""
    score, best = row.fields.get("human_score"), row.fields.get("human_max")
    for name, value in (("human_score", score), ("human_max", best)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"field {name!r} is {value!r:.40}, no number")
    assert isinstance(score, int | float) and isinstance(best, int | float)
    if not 0 <= score <= best or best <= 0:
        raise ValueError(f"human_score {score} does not lie in 0..human_max = {best}")
    found = 1.0 if score == best else 0.5 if score >= NEARLY_FULL * best else 0.0
    stated = row.fields.get("score", found)
    if stated != found:
        raise ValueError(f"score {stated!r:.40}, but {score} of {best} marks are a {found}")
    return found


def statement_of(row: Row, cluster: str) -> records.Problem:
    """The problem that a row is about."""
    statement = row.text("problem")
    return records.Problem(
        id=records.content_id("problem", statement),
        statement=statement,
        source=str(row.fields.get("source", "")),
        cluster=cluster,
    )


def proof_of(row: Row, scales: Mapping[str, str]) -> records.Proof:
    """A graded row as a labelled proof, its score on the scale of its source.

    ValueError where a field is missing or wrong, the source has no known scale, or a text names
    the model that wrote the proof.
    """
    statement, text = row.text("problem"), row.text("proof")
    source = str(row.fields.get("source", ""))
    if source not in scales:
        raise ValueError(f"source {source!r} has no scale: name it in config.real.source_scales")
    require_anonymous((statement, text), str(row.fields.get("model") or ""))
    return records.Proof(
        id=records.content_id("proof", statement, text),
        problem_id=records.content_id("problem", statement),
        statement=statement,
        text=text,
        source=source,
        label=records.Label(score=human_score(row), source="human", scale=scales[source]),
        parents=(row.id,),
    )


def judged_analysis_of(row: Row) -> records.Analysis:
    """A critique that a person judged: ms is 1 where the person agrees with it, else 0.

    The critique's own verdict stands in `<verification>` tags, true or false; it becomes the score
    1 or 0 of an analysis in the verifier's format, without tags and chunk marks.
    """
    agrees = row.fields.get("human_agrees_with_analyst")
    if not isinstance(agrees, bool):
        raise ValueError(f"human_agrees_with_analyst is {agrees!r:.40}, neither true nor false")
    raw = row.text("analysis")
    verdicts = {verdict.lower() for verdict in _VERDICT_TAG.findall(raw)}
    if not verdicts:
        raise ValueError("the critique holds no verdict in <verification> tags")
    body = _CHUNK_MARK.sub("", _VERDICT_TAG.sub("", raw)).strip()
    label = records.Label(
        score=1.0 if agrees else 0.0, source="human", scale=AGREEMENT, rubric="I_mv"
    )
    return _analysis(row, body, 0.0 if "false" in verdicts else 1.0, label)


def listed_analysis_of(row: Row) -> records.Analysis:
    """An analysis that lists issues and gives no score: 0 where it lists any, else 1."""
    issues = row.fields.get("issues")
    if not isinstance(issues, list):
        raise ValueError(f"issues is {issues!r:.40}, no list")
    return _analysis(row, row.text("analysis"), 0.0 if issues else 1.0, None)


def _analysis(row: Row, body: str, score: float, label: records.Label | None) -> records.Analysis:
    statement, proof = row.text("problem"), row.text("proof")
    require_anonymous((statement, proof, body), str(row.fields.get("analyst") or ""))
    text = parse.write_analysis(body, score)
    return records.Analysis(
        id=records.content_id("analysis", statement, proof, text),
        problem_id=records.content_id("problem", statement),
        proof_id=records.content_id("proof", statement, proof),
        statement=statement,
        proof=proof,
        text=text,
        score=score,
        source=str(row.fields.get("source", "")),
        label=label,
        parents=(row.id,),
    )


def names_of(model: str) -> set[str]:
    """What a writer is called, for a search in texts: a/grok-3 is a/grok-3, grok-3 and grok."""
    model = model.partition(" (")[0].casefold()
    parts = [model, *model.split("/")]
    families = [found[0] for p in parts if (found := re.match(r"[a-z]+", p))]
    return {name for name in (*parts, *families) if len(name) >= _MIN_NAME}


def require_anonymous(texts: Sequence[str], model: str) -> None:
    """ValueError where a text that a prompt will hold names the model that wrote it."""
    for name in sorted(names_of(model)):
        if any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", t.casefold()) for t in texts):
            raise ValueError(f"a text names its writer, {name!r}, which must not reach a prompt")
