"""What a search says of itself, against a judge, by hand."""

import dataclasses

import pytest

from mathv2_jax import records
from mathv2_jax.evaluation import agreement, honesty
from mathv2_jax.search import candidates
from tests import by_hand

PROBLEMS = [
    records.Problem(id=name, statement=f"Show {name}.", source=source, cluster=name)
    for name, source in [("a", "imo"), ("b", "imo"), ("c", "putnam")]
]


def candidate(proof, self_score, *votes):
    cast = [candidates.Cast(f"v{n}", vote, "") for n, vote in enumerate(votes)]
    return candidates.Candidate(
        id=proof, place=0, round=0, proof=proof, self_analysis="", self_score=self_score, cast=cast
    )


def pool(problem, *proofs):
    made = candidates.Pool(problem)
    made.candidates = list(proofs)
    made.attempts = [
        candidates.Attempt(c.id, 0, n, c, "", c.self_score) for n, c in enumerate(proofs)
    ]
    return made


def right(problem, found):
    """Knows proofs that begin with `right` and `wrong`, no others."""
    return {"right": 1.0, "wrong": 0.0}.get(found.proof.split()[0])


POOLS = [
    pool(PROBLEMS[0], candidate("right 1", 1.0, 1.0, 0.0, 0.0), candidate("wrong 2", 1.0)),
    pool(PROBLEMS[1], candidate("odd", 1.0, 1.0), candidate("right 3", 0.5, 1.0, None)),
    pool(PROBLEMS[2]),
]


def test_self_scores_and_votes_are_those_of_proofs_that_the_judge_knows():
    said = honesty.self_scores(POOLS, right)
    assert [(r.score, r.rating) for r in said] == [(1.0, 1.0), (0.0, 1.0), (1.0, 0.5)]
    measured = agreement.measure(said, rounds=20)
    assert measured["too_high"]["value"] == measured["too_low"]["value"] == pytest.approx(1 / 3)
    voted = honesty.votes(POOLS, right)
    found = [(r.score, r.rating, r.verdict) for r in voted]
    assert found == [(1.0, pytest.approx(1 / 3), 0.0), (1.0, 1.0, 1.0)]


def test_answers_are_counted_by_source_and_those_that_nobody_judged_are_named():
    best = [(p, p.candidates[0] if p.candidates else None) for p in POOLS]
    found = honesty.answers(best, right, rounds=20)
    assert list(found) == ["all", "source imo", "source putnam"]
    whole, putnam = found["all"], found["source putnam"]
    assert (whole["problems"], whole["unanswered"], whole["unjudged"]) == (3, 1, ["b"])
    assert whole["solved"]["value"] == pytest.approx(1 / 2)  # of a and c
    assert (putnam["unanswered"], putnam["solved"]["value"]) == (1, 0.0)
    body = {"answers": found, "self_scores": agreement.measure(honesty.self_scores(POOLS, right))}
    shown = honesty.table(body)
    assert "| all | 3 | 1 | 1 | 0.500" in shown and "| self-scores | 3 | 0.333" in shown


def graded(text, score):
    return dataclasses.replace(by_hand.proof("p", text=text, score=score), statement="Show a.")


def test_people_judge_proofs_by_their_text_and_must_agree():
    score = honesty.by_people([graded("right 1 ", 0.5), graded("else", 1.0)])
    assert score(PROBLEMS[0], candidate("right 1", 1.0)) == 0.5
    assert score(PROBLEMS[1], candidate("right 1", 1.0)) is None  # of another problem
    with pytest.raises(ValueError, match="scores 0.5 and 1 of one proof of 'Show a.'"):
        honesty.by_people([graded("right 1", 0.5), graded("right 1", 1.0)])
