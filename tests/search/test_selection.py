"""The rules of selection against cases worked by hand, ties included."""

import dataclasses
import itertools

import numpy as np
import pytest

from mathv2_jax.search import candidates, selection

VOTING = selection.Voting(verifications=4)


def candidate(votes, self_score=0.5, place=0, **fields):
    """Lost votes are None."""
    made = candidates.Candidate(
        id=f"c{place}",
        place=place,
        proof=f"proof {place}",
        self_analysis="",
        self_score=self_score,
        **{"round": 0, **fields},
    )
    made.cast = [
        candidates.Cast(f"c{place}/{at}", score, f"analysis {place}/{at}: {score}")
        for at, score in enumerate(votes)
    ]
    return made


def pool(*rows):
    return [candidate(*row, place=place) for place, row in enumerate(rows)]


def places(found):
    return [c.place for c in found]


def test_of_equal_proofs_that_of_the_newest_round_is_first_then_the_first_of_its_round():
    votes = [1.0, 0.5]
    made = [candidate(votes, place=n, round=r) for n, r in enumerate((0, 0, 1, 2, 2))]
    made.append(candidate(votes, 0.0, place=5, round=3))  # thinks less of itself
    made.append(candidate([1.0], place=6, round=0))
    assert places(selection.ranked(made, VOTING)) == [6, 3, 4, 2, 0, 1, 5]


def test_proofs_are_ranked_by_mean_then_self_score_then_age():
    made = pool(
        ([1.0, 0.5], 0.0),  # 0: 0.75
        ([1.0, 1.0, 0.0, 1.0], 0.5),  # 1: 0.75, thinks better of itself
        ([1.0], 0.0),  # 2: 1.0 of one vote
        ([0.5, 1.0], 0.5),  # 3: 0.75, as 1, but younger
        ([], 1.0),  # 4: no vote
        ([None, None], 1.0),  # 5: all lost
        ([0.0, None], 1.0),  # 6: 0.0, a lost vote is no 0 and no vote
    )
    assert places(selection.ranked(made, VOTING)) == [2, 1, 3, 0, 6]
    strict = dataclasses.replace(VOTING, min_votes=2)
    assert places(selection.ranked(made, strict)) == [1, 3, 0]


@pytest.mark.parametrize(
    ("votes", "max_lost", "passes", "may_pass"),
    [
        ([1.0] * 4, 0, True, False),
        ([1.0] * 3, 0, False, True),
        ([1.0] * 3 + [0.5], 0, False, False),
        ([1.0, 0.5], 0, False, False),
        ([1.0] * 3 + [None], 0, False, False),
        ([1.0] * 3 + [None], 1, True, False),
        ([None, 1.0], 0, False, False),
        ([None, 1.0], 1, False, True),
        ([], 0, False, True),
        ([None] * 4, 3, False, False),
    ],
)
def test_a_proof_passes_only_with_all_votes_cast_and_none_below_1(
    votes, max_lost, passes, may_pass
):
    voting = dataclasses.replace(VOTING, max_lost=max_lost)
    made = candidate(votes)
    assert (voting.passes(made), voting.may_pass(made)) == (passes, may_pass)


@pytest.mark.parametrize(
    ("votes", "min_votes", "bounds"),
    [
        ([], 1, (-1.0, 1.0)),  # all four may be lost
        ([1.0, 0.5], 1, (1.5 / 4, 3.5 / 4)),
        ([1.0, None], 1, (1.0 / 3, 1.0)),
        ([1.0, 0.5, 0.0, 0.5], 1, (0.5, 0.5)),
        ([1.0, None], 2, (-1.0, 1.0)),
        ([1.0, None, None, None], 2, (-1.0, -1.0)),
    ],
)
def test_the_means_that_the_votes_left_can_lead_to(votes, min_votes, bounds):
    voting = dataclasses.replace(VOTING, min_votes=min_votes)
    assert voting.bounds(candidate(votes)) == bounds


def test_what_no_vote_can_change_is_decided():
    made = pool(
        ([1.0, 1.0, 1.0, 0.5],),  # 0: 0.875, for certain
        ([0.0, 0.0, 1.0],),  # 1: at most 0.5
        ([1.0, 0.5, 1.0],),  # 2: 0.625 to 0.875: surely above 1 and 3
        ([0.0, 0.0],),  # 3: at most 0.5
        ([1.0, 1.0],),  # 4: may pass, so it is always open
    )
    assert places(selection.undecided(made, 2, VOTING)) == [2, 4]
    # 4 may end at 0.5, where 1 and 3 may end too: they are older, and would be third.
    assert places(selection.undecided(made, 3, VOTING)) == [1, 3, 4]
    assert places(selection.undecided(made[:4], 2, VOTING)) == []
    # The third place: 1 and 3 may end anywhere from 0 to 0.5.
    assert places(selection.undecided(made[:4], 3, VOTING)) == [1, 3]


def brute_force(made, best, voting):
    """Who can be in and out of the best, over all votes that can still come."""
    options = [(0.0, 0.5, 1.0, None)] * sum(voting.left(c) for c in made)
    seen = {c.place: set() for c in made}
    for drawn in itertools.product(*options):
        rest = iter(drawn)
        ended = [
            candidate(
                [x.score for x in c.cast] + [next(rest) for _ in range(voting.left(c))],
                c.self_score,
                place=c.place,
                round=c.round,
            )
            for c in made
        ]
        inside = places(selection.ranked(ended, voting)[:best])
        for c in made:
            seen[c.place].add(c.place in inside)
    return [place for place, found in seen.items() if len(found) == 2]


@pytest.mark.parametrize("seed", range(12))
def test_every_proof_whose_fate_is_open_is_asked_about(seed):
    rng = np.random.default_rng(seed)
    voting = selection.Voting(verifications=2)
    made = []
    for place in range(5):
        cast = rng.integers(1, 3) if place < 3 else 2
        votes = [[0.0, 0.5, 1.0, None][rng.integers(4)] for _ in range(cast)]
        self_score = float(rng.choice([0.0, 0.5, 1.0]))
        made.append(candidate(votes, self_score, place=place, round=place // 2))
    for best in (1, 2, 4):
        open_ones = set(brute_force(made, best, voting)) & {c.place for c in made if voting.left(c)}
        assert open_ones <= set(places(selection.undecided(made, best, voting)))


def test_a_pair_takes_analyses_that_report_issues_first_and_each_text_once():
    made = candidate([1.0, 0.5, None, 1.0, 0.0, 0.5])
    made.cast[5] = dataclasses.replace(made.cast[5], text=made.cast[1].text)
    for seed in range(20):
        found = selection.chosen_analyses(made, 3, seed)
        assert {c.id for c in found[:2]} == {"c0/1", "c0/4"}
        assert found[2].id in ("c0/0", "c0/3")
    assert len(selection.chosen_analyses(made, 8, 0)) == 4
    first = {selection.chosen_analyses(made, 1, seed)[0].id for seed in range(20)}
    assert first == {"c0/1", "c0/4"}  # at random among those that report
    assert selection.chosen_analyses(made, 3, 7) == selection.chosen_analyses(made, 3, 7)


def test_each_of_the_best_is_paired_with_each_of_its_analyses():
    best = pool(([0.5, 0.5],), ([None],), ([0.0],))
    found = selection.pairs(best, 2, 1, "seed")
    assert [[(c.place, cast.id) for c, cast in pair] for pair in found] in (
        [[(0, "c0/0")], [(0, "c0/1")], [(2, "c2/0")]],
        [[(0, "c0/1")], [(0, "c0/0")], [(2, "c2/0")]],
    )


def test_several_proofs_stand_together_in_the_order_of_their_rank():
    best = pool(([0.5],), ([0.5],), ([0.0],))
    found = selection.pairs(best, 2, 2, "seed")
    assert [[c.place for c, _ in pair] for pair in found] == [[0, 1], [1, 2], [2, 0]]
    assert [len(pair) for pair in selection.pairs(best[:1], 2, 3, "seed")] == [1]
