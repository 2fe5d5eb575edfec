"""What the proof browser shows: every proof of a run with all that was said about it.

A run's records are flat and name each other by ids. Here they become problems, each with its
`Case`s: a proof, its analyses, their meta-analyses, labels, and the proofs that it refines.
Evaluation's answers are found under roles of their own (`held_out.VERIFY`, ...).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from mathv2_jax import records, roles
from mathv2_jax.evaluation import held_out
from mathv2_jax.text import parse

_WRITERS = (roles.GENERATOR, held_out.PROVE)
_VERIFIERS = (roles.VERIFIER, held_out.VERIFY, held_out.JUDGE)
_META_VERIFIERS = (roles.META_VERIFIER, held_out.META)


@dataclasses.dataclass(kw_only=True)
class Remark:
    """An analysis of a proof, or a meta-analysis of an analysis.

    `sample` is the response that it was read from; an analysis of a file has none. `is_vote` says
    that a verifier of the run gave the score.
    """

    id: str
    text: str
    score: float | None
    source: str
    label: records.Label | None = None
    sample: records.Sample | None = None
    is_vote: bool = False
    metas: list["Remark"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True)
class Case:
    """A proof and what was said about it.

    `text` is the proof, or the whole response where no proof could be read from it. `metas` are
    about `self_analysis`. `parents` are the ids of the cases and remarks that it refines.
    """

    id: str
    problem_id: str
    statement: str
    text: str
    source: str
    self_analysis: str = ""
    self_score: float | None = None
    sample: records.Sample | None = None
    parents: tuple[str, ...] = ()
    labels: list[records.Label] = dataclasses.field(default_factory=list)
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    metas: list[Remark] = dataclasses.field(default_factory=list)

    @property
    def content(self) -> str:
        """What names its text: equal for two cases with one proof of one statement."""
        return records.content_id("proof", self.statement, self.text)

    @property
    def votes(self) -> list[float]:
        """The verifiers' parsed scores."""
        found = [r.score for r in self.remarks if r.is_vote and r.score is not None]
        return found or list(self.sample.votes if self.sample else ())

    def label_by(self, people: bool) -> float | None:
        """The last score that auto-labelling gave it; or, from `people`, the last of all others."""
        found = [label.score for label in self.labels if (label.source != "auto") is people]
        return found[-1] if found else None


@dataclasses.dataclass(frozen=True)
class Chapter:
    """A problem with its cases, in the order of their making."""

    problem: records.Problem
    cases: tuple[Case, ...]


def gather(items: Iterable[Any], stages: Sequence[str] = ()) -> list[Chapter]:
    """The problems that have cases, in the records' order; `stages` order a problem's cases."""
    found = _Gathering()
    samples = list[records.Sample]()
    analyses, proofs = dict[str, records.Analysis](), list[records.Proof]()
    for item in items:
        match item:
            case records.Problem():
                found.problems.setdefault(item.id, item)
            case records.Proof():
                proofs.append(item)
            case records.Analysis():
                analyses.setdefault(item.id, item)
            case records.Sample():
                samples.append(item)
    by_role = {group: [s for s in samples if s.role in group] for group in _GROUPS}
    for sample in by_role[_WRITERS]:
        found.write(sample)
    for proof in proofs:
        found.label(proof)
    for analysis in analyses.values():
        found.analyse(analysis)
    for sample in by_role[_VERIFIERS]:
        found.verify(sample)
    for sample in by_role[(held_out.AUTOLABEL,)]:
        found.auto_label(sample)
    for sample in by_role[_META_VERIFIERS]:
        found.meta_verify(sample)
    return found.chapters(stages)


_GROUPS = (_WRITERS, _VERIFIERS, _META_VERIFIERS, (held_out.AUTOLABEL,))


class _Gathering:
    """Cases and remarks by id, while they are put together."""

    def __init__(self):
        self.problems: dict[str, records.Problem] = {}
        self._cases: dict[str, Case] = {}
        self._remarks: dict[str, Remark] = {}
        self._known_as: dict[str, list[Case]] = {}  # by the id of a Proof record of their text

    def write(self, sample: records.Sample) -> None:
        """A generator's response."""
        parsed = sample.outcome is records.Outcome.PARSED
        read = parse.parse_generation(sample.text) if parsed else None
        self._cases[sample.id] = Case(
            id=sample.id,
            problem_id=sample.problem_id,
            statement=sample.statement,
            text=sample.text if read is None else read.proof,
            source=sample.stage,
            self_analysis="" if read is None else read.self_analysis,
            self_score=None if read is None else read.self_score,
            sample=sample,
            parents=sample.parents or (),
        )

    def label(self, proof: records.Proof) -> None:
        """A proof of a file or an export: the label of the samples that it was made of, or a case.

        Several records of one proof are one case.
        """
        cases = [self._cases[name] for name in proof.parents if name in self._cases]
        if not cases:
            cases = [self._case(proof.id, proof.problem_id, proof.statement, proof.text)]
            cases[0].source = cases[0].source or proof.source
            cases[0].self_analysis = proof.self_analysis
            cases[0].self_score = proof.self_score
        self._known_as.setdefault(proof.id, cases)
        for case in cases:
            if proof.label is not None and proof.label not in case.labels:
                case.labels.append(proof.label)

    def analyse(self, analysis: records.Analysis) -> None:
        """An analysis of a file."""
        remark = Remark(
            id=analysis.id,
            text=analysis.text,
            score=analysis.score,
            source=analysis.source,
            label=analysis.label,
        )
        self._remarks[analysis.id] = remark
        where = analysis.proof_id, analysis.problem_id, analysis.statement, analysis.proof
        self._of_target(*where)[0].remarks.append(remark)

    def verify(self, sample: records.Sample) -> None:
        """A verifier's response."""
        remark = _remark(sample, is_vote=True)
        self._remarks[sample.id] = remark
        target = sample.target
        if sample.role == held_out.JUDGE:  # there the target is the problem
            target = f"{sample.stage}/{held_out.PROVE}/{sample.target}"
        for case in self._of_target(target, sample.problem_id, sample.statement, sample.proof):
            case.remarks.append(remark)

    def auto_label(self, sample: records.Sample) -> None:
        """What auto-labelling would have said of a proof of a test set."""
        if sample.label is None:
            return
        label = records.Label(
            score=sample.label, source="auto", scale="auto", rater=sample.stage, votes=sample.votes
        )
        where = sample.target, sample.problem_id, sample.statement, sample.proof
        for case in self._of_target(*where):
            case.labels.append(label)

    def meta_verify(self, sample: records.Sample) -> None:
        """A meta-verifier's response, about a remark or a case's self-analysis."""
        made = _remark(sample)
        about: Remark | Case | None = self._remarks.get(sample.target)
        if about is None:
            about = self._cases.get(sample.target)
        if about is None:  # about an analysis that is not among the records
            name = records.content_id("proof", sample.statement, sample.proof)
            about = Remark(id=sample.target, text=sample.analysis, score=None, source="")
            self._remarks[sample.target] = about
            where = name, sample.problem_id, sample.statement, sample.proof
            self._of_target(*where)[0].remarks.append(about)
        about.metas.append(made)

    def chapters(self, stages: Sequence[str]) -> list[Chapter]:
        """The problems that have cases."""
        order = {stage: place for place, stage in enumerate(stages)}
        by_problem: dict[str, list[Case]] = {name: [] for name in self.problems}
        for case in self._cases.values():
            by_problem.setdefault(case.problem_id, []).append(case)

        def place(case: Case) -> tuple[Any, ...]:
            if case.sample is None:
                return (-1, "", 0, 0, case.id)
            sample = case.sample
            at = order.get(sample.stage, len(order))
            return (at, sample.stage, sample.step, sample.index, sample.id)

        return [
            Chapter(self.problems.get(name) or _unlisted(cases[0]), tuple(sorted(cases, key=place)))
            for name, cases in by_problem.items()
            if cases
        ]

    def _case(self, name: str, problem_id: str, statement: str, text: str) -> Case:
        known = self._cases.get(name)
        if known is None:
            known = Case(id=name, problem_id=problem_id, statement=statement, text=text, source="")
            self._cases[name] = known
        return known

    def _of_target(self, target: str, problem_id: str, statement: str, proof: str) -> list[Case]:
        """The cases that a judge's target is; one of the judge's own prompt where there is none."""
        known = self._known_as.get(target)
        return known or [self._case(target, problem_id, statement, proof)]


def _remark(sample: records.Sample, is_vote: bool = False) -> Remark:
    return Remark(
        id=sample.id,
        text=sample.text,
        score=sample.score,
        source=sample.stage,
        sample=sample,
        is_vote=is_vote,
    )


def _unlisted(case: Case) -> records.Problem:
    """The problem of a case, where no record of it is there."""
    return records.Problem(
        id=case.problem_id, statement=case.statement, source=case.source, cluster=""
    )
