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


Respondent = roles.Respondent
VERIFY, META, PROVE, JUDGE, AUTOLABEL = "verify", "meta", "prove", "judge", "autolabel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Players:
    """Who answers: engines with their variables loaded, and the roles."""

    roles: roles.Roles
    verifier: Respondent
    generator: Respondent


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
    """A metric as sum(value) / sum(weight) over the same items in the same order.

    Where `strata` names a stratum for each item, it is the mean of the strata's own ratios.
    `constant` is what the best constant answer gets on these items, where such a thing exists.
    """

    items: tuple[str, ...]
    value: np.ndarray
    weight: np.ndarray
    strata: np.ndarray | None = None
    constant: float | None = None

    def _counting(self) -> list[np.ndarray]:
        """The places of each stratum in which anything counts."""
        strata = np.zeros(len(self.items)) if self.strata is None else self.strata
        found = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
        return [places for places in found if self.weight[places].sum()]

    @property
    def mean(self) -> float:
        """nan where nothing counts."""
        ratios = [self.value[at].sum() / self.weight[at].sum() for at in self._counting()]
        return float(np.mean(ratios)) if ratios else math.nan

    @property
    def n(self) -> int:
        """Items that count."""
        return int(np.count_nonzero(self.weight))

    def influence(self) -> np.ndarray:
        """Each item's first-order share in the mean's error (the linearised ratio)."""
        counting = self._counting()
        shares = np.full(len(self.items), 0.0 if counting else math.nan)
        for at in counting:
            value, weight = self.value[at], self.weight[at]
            total = weight.sum()
            shares[at] = (value - value.sum() / total * weight) / total / len(counting)
        return shares

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
    "verifier_balanced_accuracy",
    "verifier_mean_error",
    "analysis_faithfulness",
    "right_for_wrong_reason",
    "meta_accuracy",
    "meta_balanced_accuracy",
    "meta_caught",
    "generator_true_score",
    "overclaim_rate",
    "verifier_minus_true",
    "autolabel_precision",
    "autolabel_coverage",
)


def measure(samples: Sequence[records.Sample], judge: Judge) -> dict[str, Ratio]:
    """Every metric of METRICS by the judge.

    An unreadable analysis counts as wrong with error 1, an unreadable proof scores 0. A balanced
    accuracy is the mean over the true scores of the share answered rightly, so no constant answer
    looks good. `right_for_wrong_reason` is the share of the analyses with the right score that name
    an issue and are not faithful: what a reward for scores alone pays in full. `meta_caught` is the
    share of the analyses with a true ms below 1 whose rating is below 1, and an unreadable rating
    catches nothing.
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
    due = [judge.proof_score(s.statement, s.proof) for s in auto]
    right = [s.label is not None and s.label == t for s, t in zip(auto, due, strict=True)]
    error = [
        1.0 if s.score is None else abs(s.score - t) for s, t in zip(verify, truth, strict=True)
    ]
    exact, rated = [e == 0.0 for e in error], [s.score for s in meta]
    hollow = [e and n and not f for e, n, f in zip(exact, named, faithful, strict=True)]
    hit = [r == q for r, q in zip(rated, quality, strict=True)]
    faulty = [q < 1.0 for q in quality]
    caught = [f and r is not None and r < 1.0 for f, r in zip(faulty, rated, strict=True)]

    def ratio(
        source: Sequence[records.Sample], value: Any, weight: Any = None, **fields: Any
    ) -> Ratio:
        items = tuple(s.target for s in source)
        weights = np.ones(len(items)) if weight is None else np.asarray(weight, float)
        return Ratio(items, np.asarray(value, float), weights, **fields)

    def balanced(source: Sequence[records.Sample], value: Any, classes: Sequence[float]) -> Ratio:
        constant = 1.0 / len(set(classes)) if classes else math.nan
        return ratio(source, value, strata=np.asarray(classes, float), constant=constant)

    return {
        "verifier_accuracy": ratio(verify, exact, constant=_best_accuracy(truth)),
        "verifier_balanced_accuracy": balanced(verify, exact, truth),
        "verifier_mean_error": ratio(verify, error, constant=least_error(truth)),
        "analysis_faithfulness": ratio(verify, faithful, named),
        "right_for_wrong_reason": ratio(verify, hollow, exact),
        "meta_accuracy": ratio(meta, hit, constant=_best_accuracy(quality)),
        "meta_balanced_accuracy": balanced(meta, hit, quality),
        "meta_caught": ratio(meta, caught, faulty),
        "generator_true_score": ratio(prove, reached),
        "overclaim_rate": ratio(
            prove, [s.score == 1.0 and t < 1.0 for s, t in zip(prove, reached, strict=True)]
        ),
        "verifier_minus_true": ratio(prove, gap, counted),
        "autolabel_precision": ratio(
            auto,
            right,
            labelled,
            constant=_best_accuracy([t for t, known in zip(due, labelled, strict=True) if known]),
        ),
        "autolabel_coverage": ratio(auto, labelled),
    }


def labels_given(proofs: Sequence[records.Proof], judge: Judge) -> dict[str, float | int | None]:
    """JSON-able: the share of labelled proofs whose label is the true score, with its standard
    error, n, and what the best constant label would get on them."""
    truth = [judge.proof_score(p.statement, p.text) for p in proofs]
    right = [p.label is not None and p.label.score == t for p, t in zip(proofs, truth, strict=True)]
    found = Ratio(tuple(p.id for p in proofs), np.asarray(right, float), np.ones(len(proofs)))
    constant = _figure(_best_accuracy(truth))
    return {
        "mean": _figure(found.mean),
        "se": _figure(found.se),
        "n": found.n,
        "constant": constant,
    }


def _best_accuracy(truth: Sequence[float]) -> float:
    """The accuracy of the best constant answer; nan without items."""
    return max(truth.count(s) for s in set(truth)) / len(truth) if truth else math.nan


def least_error(truth: Sequence[float]) -> float:
    """The mean absolute error of the best constant answer; nan without items."""
    return float(np.mean(np.abs(np.asarray(truth) - np.median(truth)))) if truth else math.nan


def compare(before: Mapping[str, Ratio], after: Mapping[str, Ratio]) -> dict[str, Any]:
    """JSON-able: each metric's mean, se and n before and after, and the paired difference.

    A metric without items has mean and se None.
    """

    def side(ratio: Ratio) -> dict[str, float | int | None]:
        return {"mean": _figure(ratio.mean), "se": _figure(ratio.se), "n": ratio.n}

    return {
        name: {
            "before": side(before[name]),
            "after": side(after[name]),
            "difference": {
                "mean": _figure(after[name].mean - before[name].mean),
                "se": _figure(difference_se(before[name], after[name])),
            },
        }
        for name in METRICS
    }


def constants(
    before: Mapping[str, Ratio], after: Mapping[str, Ratio]
) -> dict[str, dict[str, float | None]]:
    """JSON-able: what the best constant answer gets, by metric that has one, `before` and `after`.

    Both are the same but for the auto-labels, which are judged where there is one.
    """
    return {
        name: {"before": _figure(was), "after": _figure(now)}
        for name in METRICS
        for was, now in [(before[name].constant, after[name].constant)]
        if was is not None and now is not None
    }


def _figure(x: float) -> float | None:
    return None if math.isnan(x) else round(x, 6)


def pooled(means: Sequence[float], errors: Sequence[float]) -> dict[str, float | None]:
    """Over k runs, JSON-able: the mean of their means, with standard error sqrt(sum se^2) / k.

    It speaks about these runs: what differs between them is no part of the error. None without
    runs, and where one of them has no figure.
    """
    if not means or any(math.isnan(x) for x in (*means, *errors)):
        return {"mean": None, "se": None}
    count = len(means)
    return {"mean": sum(means) / count, "se": math.sqrt(sum(e * e for e in errors)) / count}
