"""Held-out measurement: models answer a fixed test set, a judge measures the written answers.

The answers are records made by a stage's variables; `measure` is a function of those records and of
a judge that is handed in (the proof world's exact one). Nothing flows back into training.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mathv2_jax import records, reward, roles
from mathv2_jax.rollout import engine as engine_lib


@runtime_checkable
class Judge(Protocol):
    """Knows the truth about proofs and analyses."""

    def proof_score(self, statement: str, proof: str) -> float:
        """The true score of a proof."""
        ...

    def analysis_quality(self, statement: str, proof: str, analysis: str) -> float:
        """The true ms of an analysis in the verifier's format."""
        ...

    def names_issue(self, analysis: str) -> bool:
        """Whether an analysis in the verifier's format names any issue."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestSet:
    """Held-out items. Their labels, where there are any, are never looked at."""

    __test__ = False  # no pytest class

    problems: Sequence[records.Problem]
    proofs: Sequence[records.Proof]
    analyses: Sequence[records.Analysis]
    num_autolabel: int
    rule: reward.AutoLabelRule


VERIFY, META, PROVE, JUDGE, AUTOLABEL = "verify", "meta", "prove", "judge", "autolabel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Players:
    """Who answers: engines with their variables loaded, and the roles."""

    roles: roles.Roles
    verifier: engine_lib.Engine
    generator: engine_lib.Engine


def answers(
    players: Players, test: TestSet, stage: str, seed: int, chunk: int = 128
) -> Iterator[Callable[[], list[records.Sample]]]:
    """The test set's answers in parts: each call yields one part's samples.

    A part is a function of (seed, its place), so parts may be made in any order or skipped.
    """

    def part(make: Callable[..., list[records.Sample]], items: Sequence[Any], at: int) -> Any:
        return lambda: make(players, items[at : at + chunk], stage, (seed, at), test)

    for make, items in (
        (_verify, test.proofs),
        (_meta, test.analyses),
        (_prove, test.problems),
        (_autolabel, test.proofs[: test.num_autolabel]),
    ):
        for at in range(0, len(items), chunk):
            yield part(make, items, at)


def _sample(opinion: roles.Opinion, stage: str, test: str, item: str, **fields: Any) -> Any:
    defaults = {"proof": "", "analysis": "", "step": 0, "index": 0, "role": test}
    return roles.make_sample(
        opinion, id=f"{stage}/{test}/{item}", stage=stage, target=item, **{**defaults, **fields}
    )


def _verify(
    players: Players, proofs: Sequence[records.Proof], stage: str, seed: Any, _: TestSet
) -> list[records.Sample]:
    fields = [{"statement": p.statement, "proof": p.text} for p in proofs]
    found = roles.ask(players.verifier, players.roles.verifier, fields, 1, seed)
    return [
        _sample(o, stage, VERIFY, p.id, problem_id=p.problem_id, **f)
        for p, f, (o,) in zip(proofs, fields, found, strict=True)
    ]


def _meta(
    players: Players, analyses: Sequence[records.Analysis], stage: str, seed: Any, _: TestSet
) -> list[records.Sample]:
    fields = [{"statement": a.statement, "proof": a.proof, "analysis": a.text} for a in analyses]
    found = roles.ask(players.verifier, players.roles.meta_verifier, fields, 1, seed)
    return [
        _sample(o, stage, META, a.id, problem_id=a.problem_id, **f)
        for a, f, (o,) in zip(analyses, fields, found, strict=True)
    ]


def _prove(
    players: Players, problems: Sequence[records.Problem], stage: str, seed: Any, _: TestSet
) -> list[records.Sample]:
    """One proof a problem, and the verifier's analysis of each that parses."""
    fields = [{"statement": p.statement} for p in problems]
    found = roles.ask(players.generator, players.roles.generator, fields, 1, (*seed, PROVE))
    proved = [
        (p, o, o.written) for p, (o,) in zip(problems, found, strict=True) if o.written is not None
    ]
    asked = [{"statement": p.statement, "proof": w.body} for p, _, w in proved]
    judged = roles.ask(players.verifier, players.roles.verifier, asked, 1, (*seed, JUDGE))
    votes = {p.id: roles.votes(o) for (p, _, _), o in zip(proved, judged, strict=True)}
    proofs = {p.id: w.body for p, _, w in proved}
    samples = [
        dataclasses.replace(
            _sample(o, stage, PROVE, p.id, problem_id=p.id, statement=p.statement),
            proof=proofs.get(p.id, ""),
            votes=tuple(votes.get(p.id, ())),
        )
        for p, (o,) in zip(problems, found, strict=True)
    ]
    return samples + [
        _sample(o, stage, JUDGE, p.id, problem_id=p.id, **f)
        for (p, _, _), f, (o,) in zip(proved, asked, judged, strict=True)
    ]


def _autolabel(
    players: Players, proofs: Sequence[records.Proof], stage: str, seed: Any, test: TestSet
) -> list[records.Sample]:
    """A proof's row holds the label (or none) that auto-labelling would give, the votes, and the
    first analysis; after it come all analyses and their meta-analyses, in rows of their roles."""
    found = roles.auto_label(players.verifier, players.roles, proofs, test.rule, (*seed, AUTOLABEL))
    samples = []
    for p, v in zip(proofs, found, strict=True):
        fields = {"problem_id": p.problem_id, "statement": p.statement, "proof": p.text}
        row = _sample(v.analyses[0], stage, AUTOLABEL, p.id, **fields)
        samples.append(dataclasses.replace(row, label=v.label, votes=tuple(v.votes)))
        samples += roles.auto_label_samples(v, row.id, stage=stage, step=0, target=p.id, **fields)
    return samples


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A metric as sum(value) / sum(weight) over the same items in the same order."""

    items: tuple[str, ...]
    value: np.ndarray
    weight: np.ndarray

    @property
    def mean(self) -> float:
        """nan where nothing counts."""
        total = self.weight.sum()
        return float(self.value.sum() / total) if total else math.nan

    @property
    def n(self) -> int:
        """Items that count."""
        return int(np.count_nonzero(self.weight))

    def influence(self) -> np.ndarray:
        """Each item's first-order share in the mean's error (the linearised ratio)."""
        total = self.weight.sum()
        if not total:
            return np.full(len(self.items), math.nan)
        return (self.value - self.mean * self.weight) / total

    @property
    def se(self) -> float:
        """Standard error of the mean over items."""
        return _spread(self.influence())


def _spread(influence: np.ndarray) -> float:
    n = len(influence)
    return float(np.sqrt(n / max(n - 1, 1) * np.sum(influence**2))) if n > 1 else math.nan


def difference_se(before: Ratio, after: Ratio) -> float:
    """Paired standard error of after.mean - before.mean; ValueError where the items differ."""
    if before.items != after.items:
        raise ValueError("the items measured before and after are not the same")
    return _spread(after.influence() - before.influence())


METRICS = (
    "verifier_accuracy",
    "verifier_mean_error",
    "analysis_faithfulness",
    "meta_accuracy",
    "generator_true_score",
    "overclaim_rate",
    "verifier_minus_true",
    "autolabel_precision",
    "autolabel_coverage",
)


def measure(samples: Sequence[records.Sample], judge: Judge) -> dict[str, Ratio]:
    """Every metric of METRICS by the judge.

    An unreadable analysis counts as wrong with error 1, an unreadable proof scores 0.
    """
    by_test: dict[str, list[records.Sample]] = {}
    for sample in samples:
        by_test.setdefault(sample.role, []).append(sample)
    verify, meta = by_test.get(VERIFY, []), by_test.get(META, [])
    prove, auto = by_test.get(PROVE, []), by_test.get(AUTOLABEL, [])
    truth = [judge.proof_score(s.statement, s.proof) for s in verify]
    named = [s.score is not None and judge.names_issue(s.text) for s in verify]
    faithful = [
        n and judge.analysis_quality(s.statement, s.proof, s.text) == 1.0
        for s, n in zip(verify, named, strict=True)
    ]
    quality = [judge.analysis_quality(s.statement, s.proof, s.analysis) for s in meta]
    reached = [judge.proof_score(s.statement, s.proof) if s.proof else 0.0 for s in prove]
    counted = [bool(s.votes) for s in prove]
    gap = [
        reward.mean(s.votes) - true if s.votes else 0.0
        for s, true in zip(prove, reached, strict=True)
    ]
    labelled = [s.label is not None for s in auto]
    right = [
        s.label is not None and s.label == judge.proof_score(s.statement, s.proof) for s in auto
    ]
    error = [
        1.0 if s.score is None else abs(s.score - t) for s, t in zip(verify, truth, strict=True)
    ]

    def ratio(source: Sequence[records.Sample], value: Any, weight: Any = None) -> Ratio:
        items = tuple(s.target for s in source)
        weights = np.ones(len(items)) if weight is None else np.asarray(weight, float)
        return Ratio(items, np.asarray(value, float), weights)

    return {
        "verifier_accuracy": ratio(verify, [e == 0.0 for e in error]),
        "verifier_mean_error": ratio(verify, error),
        "analysis_faithfulness": ratio(verify, faithful, named),
        "meta_accuracy": ratio(meta, [s.score == q for s, q in zip(meta, quality, strict=True)]),
        "generator_true_score": ratio(prove, reached),
        "overclaim_rate": ratio(
            prove, [s.score == 1.0 and t < 1.0 for s, t in zip(prove, reached, strict=True)]
        ),
        "verifier_minus_true": ratio(prove, gap, counted),
        "autolabel_precision": ratio(auto, right, labelled),
        "autolabel_coverage": ratio(auto, labelled),
    }


def compare(before: Mapping[str, Ratio], after: Mapping[str, Ratio]) -> dict[str, Any]:
    """JSON-able: each metric's mean, se and n before and after, and the paired difference.

    A metric without items has mean and se None.
    """

    def figure(x: float) -> float | None:
        return None if math.isnan(x) else round(x, 6)

    def side(ratio: Ratio) -> dict[str, float | int | None]:
        return {"mean": figure(ratio.mean), "se": figure(ratio.se), "n": ratio.n}

    return {
        name: {
            "before": side(before[name]),
            "after": side(after[name]),
            "difference": {
                "mean": figure(after[name].mean - before[name].mean),
                "se": figure(difference_se(before[name], after[name])),
            },
        }
        for name in METRICS
    }


def pooled(means: Sequence[float], errors: Sequence[float]) -> dict[str, float | None]:
    """Over k runs, JSON-able: the mean of their means, with standard error sqrt(sum se^2) / k.

    It speaks about these runs: what differs between them is no part of the error. None without
    runs, and where one of them has no figure.
    """
    if not means or any(math.isnan(x) for x in (*means, *errors)):
        return {"mean": None, "se": None}
    count = len(means)
    return {"mean": sum(means) / count, "se": math.sqrt(sum(e * e for e in errors)) / count}
