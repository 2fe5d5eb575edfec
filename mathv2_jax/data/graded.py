"""Rows of human-graded files as records; a row that cannot be used is named, not just dropped.

A graded row has `problem`, `proof` and a score: `score` of 0, 0.5 or 1, or `human_score` of
`human_max` marks with a stated map. A row of analyses has, beside the proof, an `analysis`. Each
source grades on a scale of its own, whose name every label keeps; `ScaleMap` says which scales may
be learned from together.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mathv2_jax import records, storage
from mathv2_jax.data import raw_files
from mathv2_jax.data import store as store_lib
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
# Names of families of models that are no words of a proof; others must be named in full.
_FAMILIES = (
    *("claude", "deepseek", "doubao", "ernie", "gemini", "gemma", "grok", "hunyuan", "internlm"),
    *("kimi", "llama", "magistral", "minimax", "mistral", "mixtral", "nemotron", "olmo", "qwen"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a file, its columns by our names; `most` bytes of text may stand in one."""

    file: str
    line: int
    fields: Mapping[str, Any]
    most: int = 1_000_000

    @property
    def id(self) -> str:
        """The row's own id."""
        value = self.fields.get("id")
        return "" if value is None else str(value)

    def reject(self, rule: str, reason: str) -> store_lib.Reject:
        """This row, left out by `rule`."""
        return store_lib.Reject(
            file=self.file, line=self.line, id=self.id, rule=rule, reason=reason
        )

    def text(self, name: str) -> str:
        """A field that must hold text; ValueError where it holds none that can be encoded.

        TooLongError where it holds too much.
        """
        value = self.fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"field {name!r} holds no text")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"field {name!r} holds a lone surrogate, which is no text")
        size = len(value.encode())
        if size > self.most:
            raise TooLongError(
                f"field {name!r} holds {size} bytes, --max_text_bytes is {self.most}"
            )
        return value.strip()

    def optional_text(self, name: str) -> str | None:
        """As `text`; None where the field is missing, null or blank."""
        value = self.fields.get(name)
        missing = value is None or (isinstance(value, str) and not value.strip())
        return None if missing else self.text(name)

    def number(self, name: str) -> float | None:
        """A field that holds a number, or digits; None where there is none, ValueError else."""
        value = raw_files.as_number(self.fields.get(name))
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"field {name!r} is {value!r:.40}, no number")
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"field {name!r} is {value!r:.40}, no finite number")
        return float(value)

    def truth(self, name: str) -> bool | None:
        """A field that holds true or false, in a CSV cell too; None without it, ValueError else."""
        value = self.fields.get(name)
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.strip().lower(), value)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.40}, neither true nor false")
        return value

    def items(self, name: str) -> list[Any] | None:
        """A field that holds a list, as JSON in a CSV cell; None without it, ValueError else."""
        value = self.fields.get(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = storage.parse_json(value)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{name} is {value!r:.40}, no list")
        return value


class TooLongError(ValueError):
    """A text is longer than is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreMap:
    """What other scores are in 0, 0.5 and 1.

    By `marks`: of the row's human_max, or of `best`; all of them 1, at least 85 % of them (6 of 7)
    0.5, less 0. Else by `pairs` (theirs, ours), and `otherwise` for the rest; None rejects it.
    """

    marks: bool = False
    best: float | None = None
    pairs: tuple[tuple[float, float], ...] = ()
    otherwise: float | None = None

    @classmethod
    def parse(cls, text: str) -> "ScoreMap":
        """From a flag: `marks`, `marks:7`, or pairs like `7:1,6:0.5,else:0`; ValueError else."""
        name, _, best = text.partition(":")
        try:
            if name == "marks":
                made = cls(marks=True, best=float(best) if best else None)
                if made.best is not None and not 0.0 < made.best < float("inf"):
                    raise ValueError(f"{best} marks")
                return made
            pairs, otherwise = [], None
            for part in text.split(","):
                theirs, colon, ours = part.partition(":")
                if not colon:
                    raise ValueError(f"{part!r} has no colon")
                score = records.require_score(float(ours), part)
                if theirs.strip() == "else":
                    if otherwise is not None:
                        raise ValueError("else stands there twice")
                    otherwise = score
                elif not math.isfinite(float(theirs)):
                    raise ValueError(f"{theirs} is no finite number")
                else:
                    pairs.append((float(theirs), score))
        except ValueError as error:
            raise ValueError(
                f"--score_map={text}: {error}; give marks, marks:7, or pairs like "
                "7:1,6:0.5,else:0 (theirs:ours)"
            ) from error
        if len({theirs for theirs, _ in pairs}) < len(pairs):
            raise ValueError(f"--score_map={text}: a score stands there twice")
        return cls(pairs=tuple(pairs), otherwise=otherwise)

    def score(self, value: float, best: float | None) -> float:
        """Ours of theirs, `best` being the row's marks; ValueError where the map has none."""
        if not self.marks:
            found = dict(self.pairs).get(value, self.otherwise)
            if found is None:
                raise ValueError(f"score {value:g} is none that --score_map names")
            return found
        best = self.best if best is None else best
        if best is None:
            raise ValueError("field 'human_max' is missing: --score_map=marks:N says of how many")
        return of_marks(value, best)


def of_marks(score: float, best: float) -> float:
    """All marks 1, at least 85 percent of them 0.5, else 0; ValueError where they are no marks."""
    if not 0 <= score <= best or best <= 0:
        raise ValueError(f"human_score {score:g} does not lie in 0..human_max = {best:g}")
    return 1.0 if score == best else 0.5 if score >= NEARLY_FULL * best else 0.0


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


def score_of(row: Row, given: ScoreMap | None) -> float | None:
    """The row's score, None where it has none; ValueError where it is none of ours, without a map.

    Where marks stand beside a score they must agree.
    """
    score, marks, best = (row.number(name) for name in ("score", "human_score", "human_max"))
    if given is not None and (marks if score is None else score) is not None:
        theirs = marks if marks is not None else score
        assert theirs is not None
        ours = given.score(theirs, best)
        if given.marks and marks is not None and score in records.SCORES and score != ours:
            raise ValueError(f"score {score:g}, but human_score {marks:g} is a {ours:g} by the map")
        return ours
    if score is None and marks is not None:
        raise ValueError(f"human_score {marks:g} has no map: --score_map=marks, or pairs")
    if score is None:
        return None
    if score not in records.SCORES:
        raise ValueError(f"score {score:g} is none of 0, 0.5, 1 and has no map: give --score_map")
    if marks is not None and best is not None and of_marks(marks, best) != score:
        raise ValueError(
            f"score {score:g}, but {marks:g} of {best:g} marks are a {of_marks(marks, best):g}"
        )
    return score


class Scale(Protocol):
    """What is said of the scores of all rows: the scale's name, "" where rows say, and a map."""

    @property
    def scale(self) -> str: ...

    @property
    def score_map(self) -> ScoreMap | None: ...


def label_of(row: Row, source: str, given: Scale) -> records.Label | None:
    """The human label of a graded row, None without a score; ValueError says what is wrong."""
    score = score_of(row, given.score_map)
    if score is None:
        return None
    named = given.scale or str(row.fields.get("scale") or "") or SCALES.get(source, "")
    if not named:
        raise ValueError(
            f"source {source!r} has no known scale: --scale=NAME ({records.FULL_MARKS} where a 1 "
            "is every mark)"
        )
    rater = str(row.fields.get("rater") or "")
    return records.Label(score=score, source="human", scale=named, rater=rater)


def problems_of(row: Row, source: str, cluster: str, parents: tuple[str, ...]) -> Any:
    """The problem that a row is about, and its false variant where the row has one."""
    statement = row.text("problem")
    problem = records.Problem(
        id=records.content_id("problem", statement),
        statement=statement,
        source=source,
        cluster=cluster,
        answer=_answer(row),
        reference=row.optional_text("reference_solution"),
        guidelines=row.optional_text("grading_guidelines"),
        parents=parents,
    )
    wrong = row.optional_text("false_variant")
    if wrong is None:
        return [problem]
    variant = records.Problem(
        id=records.content_id("problem", wrong),
        statement=wrong,
        source=source,
        cluster=cluster,
        false_variant_of=problem.id,
        parents=parents,
    )
    return [problem, variant]


def _answer(row: Row) -> str | None:
    """The final answer, as text, or as a number, which tables of answers hold."""
    value = row.fields.get("answer")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return row.optional_text("answer")


def proof_of(
    row: Row, source: str, label: records.Label | None, parents: tuple[str, ...]
) -> records.Proof:
    """A row's proof; ValueError where a field is missing or wrong, or a text names the model that
    wrote it.
    """
    proof = as_proof(row, source, label, parents)
    require_anonymous((proof.statement, proof.text), str(row.fields.get("model") or ""))
    return proof


def as_proof(
    row: Row, source: str, label: records.Label | None, parents: tuple[str, ...] = ()
) -> records.Proof:
    """As `proof_of`, whatever its texts name: for proofs that nothing is learned from."""
    statement, text = row.text("problem"), row.text("proof")
    return records.Proof(
        id=records.content_id("proof", statement, text),
        problem_id=records.content_id("problem", statement),
        statement=statement,
        text=text,
        source=source,
        label=label,
        parents=parents,
    )


def analysis_of(
    row: Row, source: str, given: Scale, parents: tuple[str, ...]
) -> list[records.Analysis | records.Proof]:
    """A row's analysis, and the proof that it is about where the row has people's marks of that.

    The analysis is in the verifier's format, by what the row says of it:

    `human_agrees_with_analyst`: a critique that a person judged (ms 1 or 0), whose own verdict
    stands in `<verification>` tags; `issues`, a list: an analysis that scores 0 where it has any,
    else 1; `verdict`: its score; else its text is in the verifier's format.
    """
    analysis = as_analysis(row, source, parents)
    texts = (analysis.statement, analysis.proof, analysis.text)
    require_anonymous(texts, str(row.fields.get("analyst") or ""))
    if row.number("human_score") is None:
        return [analysis]
    return [analysis, proof_of(row, source, label_of(row, source, given), parents)]


def as_analysis(row: Row, source: str, parents: tuple[str, ...] = ()) -> records.Analysis:
    """As `analysis_of`, whatever its texts name: for analyses that nothing is learned from."""
    agrees, issues = row.truth("human_agrees_with_analyst"), row.items("issues")
    body = row.text("analysis")
    label = None
    if agrees is not None:
        body, score, label = _judged(row, body, agrees)
    elif issues is not None:
        score = 0.0 if issues else 1.0
    elif row.fields.get("verdict") is not None:
        score = records.require_score(row.number("verdict"), "verdict")
    else:
        parsed = parse.parse_analysis(body)
        if parsed is None:
            raise ValueError(
                "the analysis is not in the verifier's format, and no field says its verdict "
                "(verdict, issues, or human_agrees_with_analyst)"
            )
        body, score = parsed
    statement, proof = row.text("problem"), row.text("proof")
    text = parse.write_analysis(body, score)
    return records.Analysis(
        id=records.content_id("analysis", statement, proof, text),
        problem_id=records.content_id("problem", statement),
        proof_id=records.content_id("proof", statement, proof),
        statement=statement,
        proof=proof,
        text=text,
        score=score,
        source=source,
        label=label,
        parents=parents,
    )


def _judged(row: Row, raw: str, agrees: bool) -> tuple[str, float, records.Label]:
    """A critique without tags and chunk marks, its verdict, and what a person thinks of it."""
    verdicts = {verdict.lower() for verdict in _VERDICT_TAG.findall(raw)}
    if not verdicts:
        raise ValueError("the critique holds no verdict in <verification> tags")
    body = _CHUNK_MARK.sub("", _VERDICT_TAG.sub("", raw)).strip()
    comments = row.items("human_comments") or ()
    label = records.Label(
        score=1.0 if agrees else 0.0,
        source="human",
        scale=AGREEMENT,
        rubric="I_mv",
        comment="\n".join(map(str, comments)),
    )
    return body, 0.0 if "false" in verdicts else 1.0, label


def names_of(model: str) -> set[str]:
    """What a writer is called, for a search in texts: a/grok-3 is a/grok-3, grok-3 and grok.

    A first word alone counts where it begins with a known family's name: step-2 is not `step`.
    """
    model = model.partition(" (")[0].casefold()
    parts = [model, *model.split("/")]
    found = set(parts)
    for name in _FAMILIES:
        for part in parts:
            if part.startswith(name):
                found |= {name, *re.findall(r"^[a-z]+", part)}
    return {name for name in found if len(name) >= _MIN_NAME}


def require_anonymous(texts: Sequence[str], model: str) -> None:
    """ValueError where a text that a prompt will hold names the model that wrote it."""
    for name in sorted(names_of(model)):
        if any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", t.casefold()) for t in texts):
            raise ValueError(f"a text names its writer, {name!r}, which must not reach a prompt")
