"""What the recipe talks about, as frozen host-side records that turn into JSON and back.

Symbols of the paper (arXiv 2511.22570): X is a `Problem`, Y a `Proof`, V an `Analysis`. Ids are
content hashes, so the same text has the same id in every run; nothing here holds a clock.
"""

import base64
import dataclasses
import enum
import functools
import hashlib
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

SCHEMA_VERSION = 1
SCORES = (0.0, 0.5, 1.0)
FULL_MARKS = "full-marks"  # the scale of labels by I_v itself


class Outcome(enum.StrEnum):
    """How a sampled response ended, as far as its reader is concerned."""

    PARSED = "parsed"
    UNPARSEABLE = "unparseable"  # format indicator 0
    LENGTH = "length"  # cut at its own token limit
    LOST = "lost"  # cancelled or failed: never a verdict


class Finish(enum.StrEnum):
    """Why an engine stopped writing."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    LOST = "lost"


def _absent_where_none() -> Any:
    """A field that lines of JSON lack where it is None."""
    return dataclasses.field(default=None, metadata={"absent": True})


def content_id(kind: str, *texts: str) -> str:
    """16 hex digits that name a text (or several, in order) of a kind."""
    digest = hashlib.sha256()
    for part in (kind, *texts):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:16]


def require_score(value: object, where: str) -> float:
    """`value` as one of 0, 0.5, 1; ValueError names it and `where` it stood otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in SCORES:
        raise ValueError(f"{where}: score {value!r} is not one of 0, 0.5, 1; map it first")
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """A trusted score: of a proof under I_v, or of an analysis under I_mv.

    `votes` are the scores that it was made of: analyses', or those of several raters. `comment` is
    what a person said beside it. `rubric` names the rubric, and its version where that has one:
    a template's fingerprint after an @.
    `scale` names how the score was made from the rater's own scale (say `full-marks`, or
    `opc-5-of-7`); labels of different scales are never mixed without a stated map.
    """

    score: float
    source: str  # human | auto | world
    scale: str = FULL_MARKS
    rater: str = ""
    votes: tuple[float, ...] = ()
    rubric: str = "I_v"
    comment: str = ""

    def __post_init__(self):
        require_score(self.score, f"label by {self.source}")
        for vote in self.votes:
            require_score(vote, f"vote of a label by {self.source}")
        if self.source not in ("human", "auto", "world"):
            raise ValueError(f"label source {self.source!r} is not human, auto or world")

    @property
    def hardness(self) -> float:
        """How much the analyses behind it disagree: 4 times the variance of their votes, 0 to 1.

        0 without votes. Ours: the paper asks for hard proofs and gives no formula.
        """
        return 4.0 * float(np.var(self.votes)) if self.votes else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What made a record: enough to make it again. Checkpoints are named `stage@step`,
    what a finished stage left by the stage alone."""

    stage: str
    step: int
    checkpoint: str
    template: str
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """X. `cluster` is shared by problems that must not be split between training and test.

    A `reference` solution, an `answer` and a grader's `guidelines` are for evaluation. Any proof of
    a statement that is a `false_variant_of` another problem scores 0.
    """

    id: str
    statement: str
    source: str
    cluster: str
    answer: str | None = _absent_where_none()
    reference: str | None = _absent_where_none()
    guidelines: str | None = _absent_where_none()
    false_variant_of: str | None = _absent_where_none()
    parents: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """Y with its problem's text beside it, and, when a generator wrote it, Z."""

    id: str
    problem_id: str
    statement: str
    text: str
    source: str = ""
    self_analysis: str = ""
    self_score: float | None = None
    label: Label | None = None
    origin: Origin | None = None
    parents: tuple[str, ...] = ()

    def __post_init__(self):
        if self.self_score is not None:
            require_score(self.self_score, f"self-score of proof {self.id}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """V: a verifier's analysis of one proof. `label` is ms, the analysis's own quality."""

    id: str
    problem_id: str
    proof_id: str
    statement: str
    proof: str
    text: str
    score: float
    source: str = ""
    label: Label | None = None
    origin: Origin | None = None
    parents: tuple[str, ...] = ()

    def __post_init__(self):
        require_score(self.score, f"analysis {self.id}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One supervised conversation: the user's text and the assistant's, for `role`.

    `learned` are the character spans of the assistant's text that are learned, ascending, where
    that is not the whole of it. `thinking` comes before that text where the role thinks.
    """

    id: str
    role: str
    problem_id: str
    user: str
    assistant: str
    learned: tuple[tuple[int, int], ...] = ()
    source: str = ""
    parents: tuple[str, ...] = ()
    thinking: str | None = _absent_where_none()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled response with everything a reader asks of it.

    `step` counts from 0; the part of records and the row of metrics that belong to it count the
    steps taken, from 1.

    `role` is the role that wrote it; `text` its final response. `statement`, `proof` and
    `analysis` are what its prompt was filled with, `target` the id of what it judged, `index` its
    place inside the group. `rewards` holds every component apart (`format`, `score`, `meta`, ...)
    and `total`; `votes` and `meta_votes` are the judge's. `score` is what the response says,
    `label` what it was compared with. `thinking` is what a role that thinks wrote before `text`.
    `parents` are the samples that its prompt shows, where it refines an earlier attempt.
    """

    id: str
    role: str
    stage: str
    step: int
    problem_id: str
    target: str
    index: int
    statement: str
    proof: str
    analysis: str
    text: str
    outcome: Outcome
    finish: Finish
    num_tokens: int
    checkpoint: str
    score: float | None = None
    label: float | None = None
    advantage: float | None = None
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)
    votes: tuple[float, ...] = ()
    meta_votes: tuple[float, ...] = ()
    thinking: str | None = _absent_where_none()
    parents: tuple[str, ...] | None = _absent_where_none()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt for an engine, to be answered `num_samples` times.

    An engine of ours is given token ids, `prompt`; a server is given `messages`, pairs of role and
    text.

    `seed` and the sample's index decide the noise, so an answer does not depend on its
    neighbours. Limits count generated tokens. `stop_ids` end a response beside the tokenizer's
    end token, and so does the token that completes one of the strings in `stop`; either is a part
    of it (servers leave stop strings out). `top_p`, `top_k` and `min_p` leave tokens out (1, 0 and
    0: none), each by looking at the whole distribution.
    """

    id: str
    prompt: tuple[int, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    num_samples: int
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    parameters: str = "policy"


@dataclasses.dataclass(frozen=True)
class Ints:
    """An array of small integers as a value: its shape, and its entries as int16 in base64."""

    shape: tuple[int, ...]
    data: str

    @classmethod
    def of(cls, array: np.ndarray) -> "Ints":
        """That of an array; ValueError where an entry does not fit int16."""
        small = np.asarray(array).astype("<i2")
        if not np.array_equal(small, array):
            raise ValueError(f"entries from {np.min(array)} to {np.max(array)} do not fit int16")
        return cls(small.shape, base64.b64encode(small.tobytes()).decode("ascii"))

    def array(self) -> np.ndarray:
        """The entries as int32; ValueError where they are not as many as the shape says."""
        flat = np.frombuffer(base64.b64decode(self.data), "<i2").astype(np.int32)
        return flat.reshape(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """One answer. `logprobs` are under the distribution that was sampled from, per token id.

    `policy_logprobs` are those without truncation. `experts` [tokens, sparse layers, experts per
    token] are those that the token before each was sent to, and `prompt_experts` [tokens of the
    prompt but the last, ...] those of the prompt. `kept` are the ids that truncation left for each
    token, None for a token where they were too many to record. All three are None where they were
    not asked for. `final_text` is None where the role thinks and never closed its thinking.

    A server's response has text alone: no ids, no log-probabilities. `counted_tokens` is how many
    it says that the response has, None where it does not say.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    final_text: str | None
    thinking_text: str
    finish: Finish
    parameter_version: str
    policy_logprobs: tuple[float, ...] = ()
    experts: Ints | None = None
    prompt_experts: Ints | None = None
    kept: tuple[tuple[int, ...] | None, ...] | None = None
    counted_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Its tokens, by their ids or by a server's count; 0 where there is neither."""
        return len(self.token_ids) or self.counted_tokens or 0


def to_json(record: Any) -> str:
    """One line of JSON with sorted keys; the same record gives the same bytes."""
    body = {"kind": type(record).__name__, "schema": SCHEMA_VERSION}
    body.update(dataclasses.asdict(record))
    for field in dataclasses.fields(record):
        if field.metadata.get("absent") and body[field.name] is None:
            del body[field.name]
    return json.dumps(body, sort_keys=True, allow_nan=False)


def from_json(kind: type[T], line: str) -> T:
    """The record in `line`; ValueError says what is missing, unknown or of the wrong type."""
    try:
        body = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON object: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"a {kind.__name__} is a JSON object, this is a {type(body).__name__}")
    found = body.pop("kind", kind.__name__)
    if found != kind.__name__:
        raise ValueError(f"this is a {found}, expected a {kind.__name__}")
    schema = body.pop("schema", SCHEMA_VERSION)
    if schema != SCHEMA_VERSION:
        raise ValueError(f"schema {schema} of {found}: this program reads {SCHEMA_VERSION}")
    return _build(kind, body)


@functools.cache
def _fields(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a record's fields, and those that it must have; looked up once a kind."""
    required = frozenset(
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}, required


def _build(kind: type[T], body: Mapping[str, Any]) -> T:
    hints, required = _fields(kind)
    unknown = sorted(set(body) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    missing = sorted(required - set(body))
    if missing:
        raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")
    values = {n: _convert(hints[n], v, f"{kind.__name__}.{n}") for n, v in body.items()}
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not types.NoneType), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, it is {value!r:.80}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ValueError(f"{where} must have {len(kinds)} entries, it is {value!r:.80}")
        return tuple(_convert(k, item, where) for k, item in zip(kinds, value, strict=True))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, it is {value!r:.80}")
        return {str(k): _convert(args[1], v, where) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, it is {value!r:.80}")
        return _build(hint, value)  # pyright: ignore[reportArgumentType] - hint is a class
    return _leaf(hint, value, where)


def _leaf(hint: type, value: Any, where: str) -> Any:
    if issubclass(hint, enum.StrEnum):
        if value not in list(hint):
            raise ValueError(f"{where} must be one of {', '.join(hint)}, it is {value!r:.80}")
        return hint(value)
    good = (int, float) if hint is float else hint
    if not isinstance(value, good) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} must be {hint.__name__}, it is {value!r:.80}")
    if hint is float and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{where} must be finite, it is {value!r:.80}")
    return hint(value)


def to_lines(records: Sequence[Any]) -> bytes:
    """JSON lines, one record a line, each ended by a newline."""
    return "".join(to_json(r) + "\n" for r in records).encode("ascii")
