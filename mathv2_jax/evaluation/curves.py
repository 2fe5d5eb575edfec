"""What a search has solved, as a function of what it was allowed: attempts, rounds, tokens, proofs.

A proof's score is given by whoever judges it: the proof world's exact judge, people, or a majority
of votes. Every curve is a mean over problems, with an interval.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mathv2_jax import records
from mathv2_jax.evaluation import intervals
from mathv2_jax.search import candidates as candidates_lib
from mathv2_jax.search import pool as pool_lib
from mathv2_jax.search import refine

Pool = candidates_lib.Pool
Candidate = candidates_lib.Candidate
Score = Callable[[records.Problem, Candidate], float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A place on a curve: the limit, the mean score there, the share of problems with score 1, and
    the mean number of generated tokens of a problem up to there. `by_problem` are the scores, None
    of a problem none of whose proofs there has one: it counts for nothing, not as a 0."""

    limit: int
    score: intervals.Figure
    solved: intervals.Figure
    tokens: float
    by_problem: tuple[float | None, ...]


def by_majority(problem: records.Problem, candidate: Candidate) -> float | None:
    """The score that most of the candidate's own votes give; None without any."""
    return candidate.majority


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Limited:
    """What each problem comes to under one limit: the mean of its `groups`' scores, weighted, of
    those that have one."""

    limit: int
    problems: Sequence[str]
    groups: Sequence[Sequence[float | None]]
    tokens: Sequence[float]
    weights: Sequence[Sequence[float]] | None = None  # alike where there are none

    def point(self, draws: Mapping[str, int]) -> Point:
        solved = [[None if x is None else float(x == 1.0) for x in own] for own in self.groups]
        values = self._means(self.groups)
        return Point(
            limit=self.limit,
            score=self._figure(values, draws),
            solved=self._figure(self._means(solved), draws),
            tokens=sum(self.tokens) / max(1, len(self.tokens)),
            by_problem=tuple(values),
        )

    def _figure(self, values: Sequence[float | None], draws: Mapping[str, int]) -> intervals.Figure:
        known = [(n, x) for n, x in zip(self.problems, values, strict=True) if x is not None]
        return intervals.mean([n for n, _ in known], [x for _, x in known], **draws)

    def _means(self, groups: Sequence[Sequence[float | None]]) -> list[float | None]:
        weights = self.weights or [[1.0] * len(group) for group in groups]
        found: list[float | None] = []
        for group, own in zip(groups, weights, strict=True):
            known = [(x, w) for x, w in zip(group, own, strict=True) if x is not None]
            whole = sum(w for _, w in known)
            found.append(sum(x * w for x, w in known) / whole if whole else None)
        return found


def difference(before: Point, after: Point, **draws: int) -> intervals.Figure:
    """The paired difference of two points' scores over the problems that have both."""
    pairs = zip(before.by_problem, after.by_problem, strict=True)
    gaps = [b - a for a, b in pairs if a is not None and b is not None]
    return intervals.mean(range(len(gaps)), gaps, **draws)


def no_cheaper(at: Callable[[int], Point], most: int, tokens: float) -> Point | None:
    """The point of the lowest limit up to `most` that took so many tokens; None where none did.

    A higher limit takes no fewer tokens.
    """
    if at(most).tokens < tokens:
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).tokens >= tokens else (middle + 1, high)
    return at(low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinement:
    """Pass@1 (the mean over threads) and Best@N (picked by self-score, ties averaged) of sequential
    refinement, for each limit of attempts."""

    pass_at_1: list[Point]
    best_at_n: list[Point]


def of_refinement(
    pools: Sequence[Pool], config: refine.RefineConfig, score: Score, **draws: int
) -> Refinement:
    """The curves of one run; a thread without a readable proof scores 0.

    `draws` are the bootstrap's `rounds` and `seed`, here and below.
    """
    names = [pool.problem.id for pool in pools]
    first, best = [], []
    for limit in range(1, config.attempts + 1):
        every, picked, tokens = [], [], []
        for pool in pools:
            found = refine.answers(pool, config.threads, limit)
            scores = [_score(pool, a and a.candidate, score) for a in found]
            top = max((a.self_score for a in found if a is not None), default=None)
            own = [s for a, s in zip(found, scores, strict=True) if a and a.self_score == top]
            every.append(scores)
            picked.append(own if top is not None else [0.0])
            tokens.append(sum(s.num_tokens for s in pool.written if s.step < limit))
        for points, groups in ((first, every), (best, picked)):
            made = _Limited(limit=limit, problems=names, groups=groups, tokens=tokens)
            points.append(made.point(draws))
    return Refinement(pass_at_1=first, best_at_n=best)


def chances(self_scores: Sequence[float | None], number: int) -> list[float]:
    """How likely each proof is to be the best by self-score of `number` that are drawn, ties at
    random; proofs without a self-score come last."""
    order = [-1.0 if s is None else s for s in self_scores]
    whole, found = math.comb(len(order), number), [0.0] * len(order)
    below = 0
    for value in sorted(set(order)):
        alike = [place for place, own in enumerate(order) if own == value]
        upto = below + len(alike)
        is_top = (math.comb(upto, number) - math.comb(below, number)) / whole
        for place in alike:
            found[place] = is_top / len(alike)
        below = upto
    return found


def best_of_first(
    written: "Written", score: Score, limits: Sequence[int], **draws: int
) -> list[Point]:
    """What the best by self-score of so many first proofs comes to, in the mean of all ways to draw
    them: of one proof it is Pass@1. A proof that cannot be read scores 0."""
    names, groups, selves, tokens = [], [], [], []
    for problem, samples in written:
        pool = Pool(problem)
        pool.absorb(s for s in samples if s.step == 0)
        read = {attempt.id: attempt for attempt in pool.attempts}
        found = [read.get(sample.id) for sample in pool.written]
        names.append(problem.id)
        groups.append([_score(pool, a and a.candidate, score) for a in found])
        selves.append([a and a.self_score for a in found])
        tokens.append(sum(s.num_tokens for s in pool.written) / max(1, len(found)))
    fewest = min((len(group) for group in groups), default=0)
    return [
        _Limited(
            limit=limit,
            problems=names,
            groups=groups,
            tokens=[own * limit for own in tokens],
            weights=[chances(own, limit) for own in selves],
        ).point(draws)
        for limit in limits
        if limit <= fewest
    ]


def _score(pool: Pool, candidate: Candidate | None, score: Score) -> float | None:
    """0 where there is no readable proof, None of one that has no score."""
    return 0.0 if candidate is None else score(pool.problem, candidate)


Written = Sequence[tuple[records.Problem, Sequence[records.Sample]]]  # each problem's records


def of_rounds(
    written: Written, search: pool_lib.PoolSearch, score: Score, **draws: int
) -> list[Point]:
    """The best proof after each round of a pool search: by its votes, judged by `score`.

    A search that ended before keeps what it had.
    """
    pools = [(Pool(problem), samples) for problem, samples in written]
    names, spent = [problem.id for problem, _ in written], [0] * len(written)
    points = []
    for limit in range(search.config.rounds + 1):
        for place, (pool, samples) in enumerate(pools):
            new = [s for s in samples if s.step == limit]
            if new:
                pool.end_round(new)
                spent[place] += sum(s.num_tokens for s in new)
        best = [[_score(pool, search.best(pool), score)] for pool, _ in pools]
        made = _Limited(limit=limit, problems=names, groups=best, tokens=tuple(spent))
        points.append(made.point(draws))
    return points


def of_one_shot(
    written: Written,
    search: pool_lib.PoolSearch,
    score: Score,
    limits: Sequence[int],
    **draws: int,
) -> list[Point]:
    """The best of the first so many proofs that were written without refinement, by their votes."""
    names, points = [problem.id for problem, _ in written], []
    for limit in limits:
        tokens, best = [], []
        for problem, samples in written:
            ids = {s.id for s in samples if s.target == problem.id and s.index < limit}
            used = [s for s in samples if s.id in ids or s.target in ids]
            pool = Pool(problem)
            pool.absorb(used)
            tokens.append(sum(s.num_tokens for s in used))
            best.append([_score(pool, search.best(pool), score)])
        made = _Limited(limit=limit, problems=names, groups=best, tokens=tokens)
        points.append(made.point(draws))
    return points


_DIFFERENCES = {
    "rise_of_pass_at_1": ("Pass@1 with all attempts", "above that of the first"),
    "best_above_pass_at_1": ("best by self-score, one attempt", "above Pass@1"),
    "best_above_last_pass_at_1": ("best by self-score, all attempts", "above Pass@1 there"),
    "rise_of_pool": ("pool search", "above its first proofs, without refinement"),
    "pool_above_one_shot": ("pool search", "above best of N at no fewer tokens"),
}
_TITLES = {
    "pass_at_1": ("Pass@1", "attempts"),
    "best_at_n": ("best by self-score", "attempts"),
    "best_of_first": ("best of N first proofs by self-score", "proofs"),
    "pool": ("pool search", "rounds"),
    "one_shot": ("best of N without refinement", "proofs"),
}


def table(body: Mapping[str, Any]) -> str:
    """Markdown: each curve of an evaluation, given as data."""
    lines = [f"{body['problems']} problems, judged by {body['judge']}", *body["notes"]]
    for name, (title, against) in _DIFFERENCES.items():
        if name in body:
            lines += ["", f"{title}: {intervals.Figure(**body[name])} {against}"]
        if name in body and name in body.get("tokens", {}):
            ours, theirs, number = body["tokens"][name]
            lines[-1] += f" ({ours:,.0f} tokens of a problem beside {theirs:,.0f}, N = {number})"
    for name, (title, limit) in _TITLES.items():
        if name not in body:
            continue
        lines += ["", f"| {title}: {limit} | mean score | share solved | tokens of a problem |"]
        lines.append("|--:|---|---|--:|")
        for point in body[name]:
            score, solved = (intervals.Figure(**point[key]) for key in ("score", "solved"))
            lines.append(f"| {point['limit']} | {score} | {solved} | {point['tokens']:,.0f} |")
    return "\n".join(lines) + "\n"
