"""What a search said of its own proofs against what a judge says: self-scores, votes, the answer.

A generator that writes and grades in one go tends to claim correctness (arXiv 2511.22570, section
2.3); how far it does is the share of its self-scores that lie too high.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from mathv2_jax import records
from mathv2_jax.evaluation import agreement, curves, intervals
from mathv2_jax.search import candidates as candidates_lib
from mathv2_jax.search import problems

Pool = candidates_lib.Pool
Candidate = candidates_lib.Candidate


def self_scores(pools: Sequence[Pool], score: curves.Score) -> list[agreement.Rated]:
    """Every attempt that can be read and judged, under what it says of itself."""
    return [
        _rated(pool, attempt.id, attempt.candidate, true, attempt.self_score, attempt.self_score)
        for pool in pools
        for attempt in pool.attempts
        if (true := score(pool.problem, attempt.candidate)) is not None
    ]


def votes(pools: Sequence[Pool], score: curves.Score) -> list[agreement.Rated]:
    """Every proof that can be judged, under the mean and the majority of its votes."""
    return [
        _rated(pool, candidate.id, candidate, true, candidate.mean, candidate.majority)
        for pool in pools
        for candidate in pool.candidates
        if candidate.cast and (true := score(pool.problem, candidate)) is not None
    ]


def _rated(  # noqa: PLR0913, PLR0917 - what is measured of a proof
    pool: Pool,
    name: str,
    candidate: Candidate,
    true: float,
    rating: float | None,
    verdict: float | None,
) -> agreement.Rated:
    return agreement.Rated(
        id=name,
        problem_id=pool.problem.id,
        source=pool.problem.source,
        scale="",
        score=true,
        rating=rating,
        verdict=verdict,
        length=len(candidate.proof),
        place=candidate.round,
    )


Answers = Sequence[tuple[Pool, Candidate | None]]


def answers(found: Answers, score: curves.Score, **draws: int) -> dict[str, dict[str, Any]]:
    """JSON-able: what each problem's answer scores, of all and of each source where there are
    several. A problem without an answer scores 0; one whose answer nobody judged is named, and
    counts for nothing."""
    sources = sorted({pool.problem.source for pool, _ in found})
    groups = {"all": found}
    for source in sources if len(sources) > 1 else ():
        groups[f"source {source}"] = [x for x in found if x[0].problem.source == source]
    return {name: _answers(own, score, draws) for name, own in groups.items()}


def _answers(found: Answers, score: curves.Score, draws: dict[str, int]) -> dict[str, Any]:
    judged, unjudged = [], []
    for pool, candidate in found:
        true = 0.0 if candidate is None else score(pool.problem, candidate)
        if true is None:
            unjudged.append(problems.name(pool.problem))
        else:
            judged.append((pool.problem.id, true))
    names = [name for name, _ in judged]
    figures = {
        "score": intervals.mean(names, [true for _, true in judged], **draws),
        "solved": intervals.mean(names, [float(true == 1.0) for _, true in judged], **draws),
    }
    return {
        "problems": len(found),
        "unanswered": sum(candidate is None for _, candidate in found),
        "unjudged": unjudged,
        **{name: dataclasses.asdict(figure) for name, figure in figures.items()},
    }


def by_people(graded: Sequence[records.Proof]) -> curves.Score:
    """A judge by people's labels: of a proof with the same statement and text, None without one.

    ValueError where two labels of one proof differ.
    """
    known: dict[tuple[str, str], float] = {}
    for proof in graded:
        if proof.label is None:
            continue
        key, score = (proof.statement.strip(), proof.text.strip()), proof.label.score
        if known.setdefault(key, score) != score:
            raise ValueError(
                f"--graded holds scores {known[key]:g} and {score:g} of one proof of "
                f"{proof.statement!r:.80}: settle them first (mathv2-records --adjudicate)"
            )
    return lambda problem, candidate: known.get(
        (problem.statement.strip(), candidate.proof.strip())
    )


def table(body: dict[str, Any]) -> str:
    """Markdown: the answers, and how far self-scores and votes agree with the judge."""
    return "\n".join(_lines(body)) + "\n"


def _lines(body: dict[str, Any]) -> Iterator[str]:
    yield "| answers | problems | without one | not judged | mean score | share solved |"
    yield "|---|--:|--:|--:|---|---|"
    for name, own in body["answers"].items():
        score, solved = (intervals.Figure(**own[key]) for key in ("score", "solved"))
        yield (
            f"| {name} | {own['problems']} | {own['unanswered']} | {len(own['unjudged'])} | "
            f"{score} | {solved} |"
        )
    keys = ("exact", "too_high", "too_low", "mean_error", "auc")
    names = {"self_scores": "self-scores", "votes": "votes"}
    rows = [(names[key], body[key]) for key in names if key in body]
    if rows:
        yield ""
        yield "| said of the proofs | n | as the judge | too high | too low | mean error | AUC |"
        yield "|---|--:|---|---|---|---|---|"
    for name, own in rows:
        shown = [str(intervals.Figure(**own[key])) for key in keys]
        yield f"| {name} | {own['items']} | {' | '.join(shown)} |"
