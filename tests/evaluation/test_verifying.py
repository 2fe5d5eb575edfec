"""Votes on graded proofs are records: what is there is not asked again, and attacks are compared
with the same text as it is."""

import dataclasses

import pytest

from mathv2_jax import records
from mathv2_jax.evaluation import benchmarks, injection, verifying
from mathv2_jax.rollout import durable
from tests.search import authors


def proof(name, score=1.0):
    return records.Proof(
        id=name,
        problem_id=f"problem {name}",
        statement="Show X.",
        text=f"Proof 5.{name} of X",
        label=records.Label(score=score, source="human", rater="people", rubric="I_v"),
    )


PROOFS = [proof("c0"), proof("c1", 0.0), proof("c2")]
PLAIN = [injection.Injected(injection.NONE, p) for p in PROOFS]


def ask(author, items, folder, *, votes=2, together=2):
    responses = durable.Responses(folder / "responses", 0.0)
    judge = verifying.Judge(
        name="verifier",
        role=authors.ROLES.verifier,
        respondent=responses.of(author, author.version),
        votes=votes,
    )
    return verifying.ask(judge, items, folder / "votes", responses, together)


def test_each_item_has_its_votes_in_order_and_its_parts_are_not_asked_again(tmp_path):
    author = authors.Author(unreadable=0.0)
    samples = ask(author, PLAIN, tmp_path)
    assert [s.id for s in samples] == [verifying.name_of(i, n) for i in PLAIN for n in range(2)]
    assert [s.target for s in samples] == ["c0", "c0", "c1", "c1", "c2", "c2"]
    assert len(author.asked) == 6
    assert ask(author, PLAIN, tmp_path) == samples and len(author.asked) == 6


def test_an_evaluation_that_was_killed_asks_for_what_its_parts_lack(tmp_path):
    with pytest.raises(authors.Killed):
        ask(authors.Author(unreadable=0.0, most=5), PLAIN, tmp_path)
    author = authors.Author(unreadable=0.0)
    found = ask(author, PLAIN, tmp_path)
    assert len(author.asked) == 1
    assert found == ask(authors.Author(unreadable=0.0), PLAIN, tmp_path / "whole")


def test_parts_of_other_items_are_named(tmp_path):
    ask(authors.Author(unreadable=0.0), PLAIN, tmp_path)
    others = [injection.Injected(injection.NONE, p) for p in map(proof, ("d0", "d1", "d2"))]
    with pytest.raises(ValueError, match=r"lacks 6 votes, evaluate/none/d0/0 among them"):
        ask(authors.Author(), others, tmp_path)


def test_a_lost_vote_is_left_out_and_a_proof_without_any_has_no_rating(tmp_path):
    scores = (1.0, None, None, None, 0.5, 1.0)
    cast = [
        dataclasses.replace(sample, score=score)
        for sample, score in zip(ask(authors.Author(), PLAIN, tmp_path), scores, strict=True)
    ]
    by_item = verifying.votes_by_item(PLAIN, cast, 2)
    assert by_item == [[1.0], [], [0.5, 1.0]]
    graded = [benchmarks.Graded(p.id, n, p, None) for n, p in enumerate(PROOFS)]
    found = verifying.rated(graded, by_item)
    assert [(r.rating, r.verdict) for r in found] == [(1.0, 1.0), (None, None), (0.75, 0.5)]


def test_an_attack_is_compared_on_the_texts_that_have_votes_with_and_without_it():
    attack = next(iter(injection.ATTACKS))
    attacked = [injection.Injected(attack, p) for p in PROOFS]
    cast = [[0.0, 0.0], [], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], []]  # the middle one: no plain vote
    found = verifying.of_attacks([*PLAIN, *attacked], cast, rounds=50)
    body = found[attack]
    assert (body["shift"]["items"], body["shift"]["value"]) == (1, 1.0)
    assert (body["changed"]["value"], body["raised_to_1"]["value"]) == (1.0, 1.0)
    assert f"| {attack} | 1 | 1.000" in verifying.table({attack: body})
