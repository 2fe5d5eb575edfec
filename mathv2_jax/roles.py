"""The three roles as values: prompt, parser and sampling; and how to ask them many times.

Training stages, search and evaluation use the same roles, so what is trained is what is asked.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mathv2_jax import records, reward
from mathv2_jax.text import parse, prompts
from mathv2_jax.text import tokenizer as tokenizer_lib

Outcome = records.Outcome


class Respondent(Protocol):
    """Whoever answers requests: an engine, one that keeps its responses, a server."""

    @property
    def tokenizer(self) -> tokenizer_lib.Tokenizer | None:
        """Prompts are in its ids; None where they are messages, in text."""
        ...

    def generate(self, requests: Sequence[records.Request], /) -> list[list[records.Response]]:
        """`num_samples` responses for each request, in the requests' order."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a role is sampled. Limits count generated tokens."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_tokens < 1 or self.temperature < 0 or not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"sampling: max_tokens = {self.max_tokens} must be positive, temperature = "
                f"{self.temperature} not negative, top_p = {self.top_p} in (0, 1]"
            )


@dataclasses.dataclass(frozen=True)
class Written:
    """A role's final response as data: `body` is the analysis, or the proof of a generator.

    `self_analysis` is Z, a generator's only.
    """

    body: str
    score: float
    self_analysis: str = ""


def _read_analysis(text: str) -> Written | None:
    found = parse.parse_analysis(text)
    return None if found is None else Written(found.body, found.score)


def _read_meta(text: str) -> Written | None:
    found = parse.parse_meta_analysis(text)
    return None if found is None else Written(found.body, found.score)


def _read_generation(text: str) -> Written | None:
    found = parse.parse_generation(text)
    if found is None:
        return None
    return Written(found.proof, found.self_score, found.self_analysis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """One thing that a model is asked to do."""

    name: str
    template: prompts.Template
    read: Callable[[str], Written | None]
    sampling: Sampling
    think: bool = False

    def prompt(self, tokenizer: tokenizer_lib.Tokenizer, **fields: str) -> tuple[int, ...]:
        """Token ids of the filled template, the assistant's turn opened."""
        messages = [tokenizer_lib.Message(*pair) for pair in self.messages(**fields)]
        return tuple(tokenizer.encode(messages, think=self.think))

    def messages(self, **fields: str) -> tuple[tuple[str, str], ...]:
        """The filled template as a conversation: pairs of role and text."""
        return (("user", prompts.fill(self.template, **fields)),)


GENERATOR, VERIFIER, META_VERIFIER = "generator", "verifier", "meta_verifier"
REFINER = "refiner"  # a generator that is shown an earlier attempt
NAMES = (GENERATOR, VERIFIER, META_VERIFIER)


def known_as(name: str) -> str:
    """A role's name in settings and records, where a refiner is a generator."""
    return GENERATOR if name == REFINER else name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
    """The three roles of a run, and the generator's with an earlier attempt in its prompt."""

    generator: Role
    verifier: Role
    meta_verifier: Role
    refiner: Role

    def named(self, name: str) -> Role:
        """The role of that name."""
        return getattr(self, name)

    @property
    def sampling(self) -> dict[str, Sampling]:
        """How each role is sampled, by its name."""
        return {name: self.named(name).sampling for name in NAMES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolesConfig:
    """Which templates, whether models think first, and how each role is sampled."""

    templates: str = "olympiad"
    think: bool = False
    generator: Sampling
    verifier: Sampling
    meta_verifier: Sampling

    @property
    def sampling(self) -> dict[str, Sampling]:
        """How each role is sampled, by its name."""
        return {name: getattr(self, name) for name in NAMES}


def make_roles(config: RolesConfig) -> Roles:
    """Roles from the template set that the config names."""
    loaded = prompts.load(config.templates)
    readers = {
        GENERATOR: _read_generation,
        VERIFIER: _read_analysis,
        META_VERIFIER: _read_meta,
    }
    made = {
        name: Role(
            name=name,
            template=getattr(loaded, name),
            read=read,
            sampling=getattr(config, name),
            think=config.think,
        )
        for name, read in readers.items()
    }
    refiner = dataclasses.replace(made[GENERATOR], name=REFINER, template=loaded.refine)
    return Roles(**made, refiner=refiner)


@dataclasses.dataclass(frozen=True)
class Opinion:
    """One response of a role: what it says, or why it says nothing."""

    outcome: records.Outcome
    written: Written | None
    response: records.Response

    @property
    def score(self) -> float | None:
        """The parsed score, None where there is none."""
        return None if self.written is None else self.written.score

    @property
    def text(self) -> str:
        """The final response; what another role may see."""
        return self.response.final_text or ""


def understand(role: Role, response: records.Response) -> Opinion:
    """The outcome of a response; malformed text is data, never an error."""
    if response.finish in (records.Finish.LOST, records.Finish.CANCELLED):
        return Opinion(Outcome.LOST, None, response)
    if response.finish is records.Finish.LENGTH:
        return Opinion(Outcome.LENGTH, None, response)
    final = response.final_text
    written = None if final is None else role.read(final)
    return Opinion(Outcome.UNPARSEABLE if written is None else Outcome.PARSED, written, response)


def seed_for(*parts: object) -> int:
    """A 62-bit seed that is a function of its parts (run seed, stage, step, purpose, ...)."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def ask(
    respondent: Respondent,
    role: Role,
    fields: Sequence[Mapping[str, str]],
    num_samples: int,
    seed: Sequence[Any],
    keys: Sequence[Any] | None = None,
) -> list[list[Opinion]]:
    """`num_samples` opinions on each filled prompt; answer i of item j has its own seed.

    `keys` name the items for their seeds, where those asked together are a part of all.
    """
    tokenizer = respondent.tokenizer
    requests = [
        records.Request(
            id="/".join(map(str, (*seed, role.name, key))),
            prompt=() if tokenizer is None else role.prompt(tokenizer, **values),
            messages=role.messages(**values) if tokenizer is None else (),
            num_samples=num_samples,
            seed=seed_for(*seed, role.name, key),
            max_tokens=role.sampling.max_tokens,
            temperature=role.sampling.temperature,
            top_p=role.sampling.top_p,
        )
        for key, values in zip(keys or range(len(fields)), fields, strict=True)
    ]
    answers = respondent.generate(requests)
    return [[understand(role, response) for response in responses] for responses in answers]


def votes(opinions: Sequence[Opinion]) -> list[float]:
    """The parsed scores; lost, cut and unparseable votes are left out, never counted as 0."""
    return [o.score for o in opinions if o.score is not None]


def make_sample(opinion: Opinion, **fields: Any) -> records.Sample:
    """A sample's record from an opinion and what it was asked."""
    return records.Sample(
        text=opinion.text,
        outcome=opinion.outcome,
        finish=opinion.response.finish,
        num_tokens=opinion.response.num_tokens,
        checkpoint=opinion.response.parameter_version,
        score=opinion.score,
        thinking=opinion.response.thinking_text or None,
        **fields,
    )


@dataclasses.dataclass(frozen=True)
class AutoLabelled:
    """What the procedure said about one proof."""

    label: float | None
    analyses: tuple[Opinion, ...]
    metas: tuple[tuple[Opinion, ...], ...]  # per parsed issue-reporting analysis

    @property
    def votes(self) -> list[float]:
        """The parsed scores."""
        return votes(self.analyses)

    def judged(self) -> Iterator[tuple[Opinion, tuple[Opinion, ...]]]:
        """Each analysis with its meta-analyses; one that reports no issue has none."""
        metas = iter(self.metas)
        for opinion in self.analyses:
            reports = opinion.score is not None and opinion.score < 1.0
            yield opinion, next(metas) if reports else ()


def auto_label_samples(found: AutoLabelled, name: str, **fields: Any) -> list[records.Sample]:
    """Every analysis of one proof, each followed by its meta-analyses, as records.

    `name` begins their ids; the proof's own is `target`.
    """
    samples = []
    for index, (opinion, metas) in enumerate(found.judged()):
        own = {"id": f"{name}/{index}", "role": VERIFIER, "index": index, "analysis": ""}
        samples.append(make_sample(opinion, meta_votes=tuple(votes(metas)), **(fields | own)))
        for number, meta in enumerate(metas):
            about = {"role": META_VERIFIER, "target": own["id"], "analysis": opinion.text}
            about |= {"id": f"{own['id']}/{number}", "index": number}
            samples.append(make_sample(meta, **(fields | about)))
    return samples


def auto_label(
    judge: Respondent,
    roles: Roles,
    proofs: Sequence[records.Proof],
    rule: reward.AutoLabelRule,
    seed: Sequence[Any],
) -> list[AutoLabelled]:
    """n analyses a proof, m meta-analyses for each that reports issues, and the rule's label.

    An issue-reporting analysis whose meta-votes are all lost is left out, as a lost analysis is.
    """
    fields = [{"statement": p.statement, "proof": p.text} for p in proofs]
    analyses = ask(judge, roles.verifier, fields, rule.num_analyses, (*seed, "analyses"))
    reporting = [
        (at, opinion)
        for at, opinions in enumerate(analyses)
        for opinion in opinions
        if opinion.score is not None and opinion.score < 1.0
    ]
    meta_fields = [{**fields[at], "analysis": opinion.text} for at, opinion in reporting]
    metas = ask(judge, roles.meta_verifier, meta_fields, rule.num_meta, (*seed, "meta"))
    heard = {id(o): votes(found) for (_, o), found in zip(reporting, metas, strict=True)}
    labelled = []
    for at, opinions in enumerate(analyses):
        own = tuple(tuple(m) for (place, _), m in zip(reporting, metas, strict=True) if place == at)
        judged = [(o.score, heard.get(id(o), [])) for o in opinions if o.score is not None]
        labelled.append(AutoLabelled(label_of(judged, rule), tuple(opinions), own))
    return labelled


def label_of(
    judged: Sequence[tuple[float, Sequence[float]]], rule: reward.AutoLabelRule
) -> float | None:
    """The rule's label from each parsed analysis's score and the meta-votes on it, or None."""
    kept = [(score, found) for score, found in judged if score == 1.0 or found]
    valid = [bool(found) and reward.is_valid(found, rule) for _, found in kept]
    return reward.auto_label([score for score, _ in kept], valid, rule)
