"""Searches as a whole: what they do round by round, and that they may be killed at any moment."""

import collections
import dataclasses
import random

import pytest

from mathv2_jax import records, roles, storage
from mathv2_jax.rollout import answers as answers_lib
from mathv2_jax.rollout import durable
from mathv2_jax.search import asking, outcome, pool, refine, rounds, run, selection
from tests.search import authors

POOL = pool.PoolConfig(
    proofs=6, verifications=6, best=4, analyses=2, rounds=3, wave=2, max_lost=5, min_votes=1
)
PROBLEMS = [authors.problem(name) for name in "abcde"]


def opened(tmp_path, method, author, *, every=600.0, at_once=2, problems=PROBLEMS, **budget):
    """A search that goes on in a folder, and its players."""
    meter = asking.Meter(asking.Budget(**budget))
    folders = run.Folders(samples=tmp_path / "search", responses=tmp_path / "responses")
    responses = durable.Responses(folders.responses, every)
    made = run.Search(method, problems, folders, responses, meter, at_once)
    asked = asking.Counted(responses.of(author, author.version), meter, 16)
    players = rounds.Players(roles=authors.ROLES, generator=asked, verifier=asked, call=16)
    return made, players


def samples(tmp_path):
    lines = storage.Parts(tmp_path / "search").read()
    return [records.from_json(records.Sample, line) for line in lines]


def pools(search):
    """All that is known of each problem's proofs, as plain data."""
    return [
        (p.rounds, [dataclasses.asdict(c) for c in p.candidates], p.written) for p in search.pools
    ]


def searched(tmp_path, method, author=None, **settings):
    search, players = opened(tmp_path, method, author or authors.Author(), **settings)
    assert search.run(players) == ""
    return search


def test_a_round_refines_the_best_proofs_with_their_analyses(tmp_path):
    method = pool.PoolSearch(POOL, seed=1)
    search = searched(tmp_path, method, problems=PROBLEMS[:1])
    found = samples(tmp_path)
    by_id = {s.id: s for s in found}
    assert search.pools[0].rounds >= 3
    for step in range(1, search.pools[0].rounds):
        grown = pool.Pool(PROBLEMS[0])
        for earlier in range(step):
            grown.absorb(s for s in found if s.step == earlier)
        best = selection.ranked(grown.candidates, POOL.voting)[: POOL.best]
        written = [s for s in found if s.step == step and s.role == roles.GENERATOR]
        shown = collections.Counter(s.parents[0] for s in written)
        assert shown == {c.id: 2 for c in best}
        for sample in written:
            proof, analysis = (by_id[name] for name in sample.parents)
            assert analysis.target == proof.id
            assert sample.analysis == analysis.text
            assert sample.proof in proof.text and sample.proof


def test_every_new_proof_is_verified_once_and_duplicates_never(tmp_path):
    class Repeating(authors.Author):
        def _proof(self, request, index, level):
            return super()._proof(request, index, level).replace(str(level), "5", 1)

        def _draw(self, request, index, *purpose):
            chance = super()._draw(request, index, *purpose)
            return round(chance, 1) if purpose == ("mark",) else chance

    method = pool.PoolSearch(POOL, seed=1)
    search = searched(tmp_path, method, Repeating(), problems=PROBLEMS[:1])
    (made,) = search.pools
    readable = [s for s in made.written if s.outcome is records.Outcome.PARSED]
    assert len(made.candidates) < len(readable)
    assert len({c.proof for c in made.candidates}) == len(made.candidates)
    assert all(len(c.cast) == POOL.verifications for c in made.candidates)


def test_a_search_ends_with_a_proof_that_passes(tmp_path):
    method = pool.PoolSearch(dataclasses.replace(POOL, rounds=12), seed=2)
    search = searched(tmp_path, method)
    passed = [p for p in search.pools if method.passed(p) is not None]
    assert passed
    for each in passed:
        best = method.best(each)
        assert best is not None and set(best.votes) == {1.0}
        # In the round before nothing had passed: the search has not gone on.
        earlier = [c for c in each.candidates if c.round < each.rounds - 1]
        assert not any(POOL.voting.passes(c) for c in earlier)


def test_one_shot_is_a_pool_without_rounds(tmp_path):
    method = pool.PoolSearch(dataclasses.replace(POOL, rounds=0), seed=2)
    search = searched(tmp_path, method)
    assert {s.step for s in samples(tmp_path)} == {0}
    assert all(len(p.written) == POOL.proofs for p in search.pools)


def test_adaptive_votes_choose_the_same_best_and_ask_for_fewer(tmp_path):
    """One round: the votes that are cast are the same ones, only fewer."""
    one = dataclasses.replace(POOL, proofs=24, rounds=0, wave=1, verifications=12)
    full, less = (
        searched(
            tmp_path / str(adaptive),
            pool.PoolSearch(dataclasses.replace(one, adaptive=adaptive), 3),
            authors.Author(levels=10),
        )
        for adaptive in (False, True)
    )
    cast = [sum(len(c.cast) for p in s.pools for c in p.candidates) for s in (full, less)]
    assert cast[1] < 0.9 * cast[0]
    for whole, part in zip(full.pools, less.pools, strict=True):
        best = [selection.ranked(p.candidates, one.voting)[: one.best] for p in (whole, part)]
        assert {c.id for c in best[0]} == {c.id for c in best[1]}
        passing = [[c.id for c in p.candidates if one.voting.passes(c)] for p in (whole, part)]
        assert passing[0] == passing[1]
        for a, b in zip(whole.candidates, part.candidates, strict=True):
            assert a.votes[: len(b.votes)] == b.votes or None in [c.score for c in a.cast]


def test_a_thread_goes_on_until_it_is_satisfied(tmp_path):
    method = refine.Refinement(refine.RefineConfig(threads=6, attempts=4, verifications=2), 1)
    search = searched(tmp_path, method, authors.Author(unreadable=0.3), problems=PROBLEMS[:2])
    for made in search.pools:
        by_thread = collections.defaultdict(list)
        for sample in made.written:
            by_thread[sample.index].append(sample)
        assert sorted(by_thread) == list(range(6))
        lengths = set()
        for attempts in by_thread.values():
            assert [s.step for s in attempts] == list(range(len(attempts)))
            lengths.add(len(attempts))
            read = [s for s in attempts if s.outcome is records.Outcome.PARSED]
            assert len(attempts) == 4 or read[-1].score == 1.0
            assert all(s.score != 1.0 for s in read[:-1])
            for before, after in zip(attempts, attempts[1:], strict=False):
                last = [s for s in read if s.step <= before.step][-1:]
                assert after.parents == (tuple(s.id for s in last) or None)
                if last:
                    assert after.proof in last[0].text and after.analysis in last[0].text
        assert len(lengths) > 1


def test_results_of_lower_limits_are_those_of_a_run_with_that_limit(tmp_path):
    config = refine.RefineConfig(threads=6, attempts=4, verifications=0)
    (whole,) = searched(
        tmp_path / "whole", refine.Refinement(config, 1), problems=PROBLEMS[:1]
    ).pools
    for limit in (1, 2, 3):
        lower = dataclasses.replace(config, attempts=limit)
        name = f"limit-{limit}"
        (own,) = searched(tmp_path / name, refine.Refinement(lower, 1), problems=PROBLEMS[:1]).pools
        expected = [a and a.id for a in refine.answers(own, 6, limit)]
        assert [a and a.id for a in refine.answers(whole, 6, limit)] == expected
        assert any(expected)


KILLED = PROBLEMS[:3]  # of which two go on together
METHODS = {
    "pool": pool.PoolSearch(POOL, 4),
    "adaptive": pool.PoolSearch(dataclasses.replace(POOL, adaptive=True), 4),
    "together": pool.PoolSearch(dataclasses.replace(POOL, together=2), 4),
    "refine": refine.Refinement(refine.RefineConfig(threads=5, attempts=3, verifications=4), 4),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_search_killed_at_any_moment_has_the_pools_of_one_that_never_was(tmp_path, name):
    method = METHODS[name]
    expected = searched(tmp_path / "whole", method, problems=KILLED)
    total = expected.meter.spent.answers
    chance = random.Random(f"kills-{name}")
    kills = sorted(chance.sample(range(1, total), 20))
    asked = []
    for most, before in zip(kills, [0, *kills], strict=False):
        author = authors.Author(most=most - before)
        search, players = opened(tmp_path / "killed", method, author, every=0.0, problems=KILLED)
        with pytest.raises(authors.Killed):
            search.run(players)
        asked += author.asked
    author = authors.Author()
    search = searched(tmp_path / "killed", method, author, problems=KILLED)
    asked += author.asked
    assert pools(search) == pools(expected)
    assert samples(tmp_path / "killed") == samples(tmp_path / "whole")
    assert len(asked) == len(set(asked)) == total  # none twice
    again, _ = opened(tmp_path / "killed", method, authors.Author(), problems=KILLED)
    assert pools(again) == pools(expected) and not again.at_work()


@pytest.mark.parametrize("name", METHODS)
def test_without_seeds_too_no_answer_is_lost_or_doubled(tmp_path, name):
    method, chance = METHODS[name], random.Random(f"moody-{name}")
    asked = []
    for _ in range(20):
        author = authors.Author(moody=True, most=chance.randrange(1, 12))
        search, players = opened(tmp_path, method, author, every=0.0)
        with pytest.raises(authors.Killed):
            search.run(players)
        asked += author.asked
    author = authors.Author(moody=True)
    search = searched(tmp_path, method, author)
    asked += author.asked
    assert len(asked) == len(set(asked)) == search.meter.spent.answers
    found = samples(tmp_path)
    assert len({s.id for s in found}) == len(found) == len(asked)


def test_lost_answers_are_no_votes_and_no_proofs(tmp_path):
    author = authors.Author(lost=0.3)
    search = searched(tmp_path, pool.PoolSearch(POOL, 5), author, problems=PROBLEMS[:2])
    found = samples(tmp_path)
    lost = [s for s in found if s.outcome is records.Outcome.LOST]
    assert {s.role for s in lost} == {roles.GENERATOR, roles.VERIFIER}
    assert search.meter.spent.lost == len(lost)
    for made in search.pools:
        for c in made.candidates:
            assert len(c.cast) == POOL.verifications
            assert len(c.votes) == sum(x.score is not None for x in c.cast)


@pytest.mark.parametrize("answers", [3, 30, 120])
def test_a_spent_budget_leaves_the_best_so_far_and_more_of_it_goes_on(tmp_path, answers):
    method = pool.PoolSearch(POOL, 4)
    expected = searched(tmp_path / "whole", method)
    first = authors.Author()
    search, players = opened(tmp_path / "less", method, first, answers=answers)
    assert search.run(players) == f"budget.answers = {answers} is spent"
    assert answers <= len(first.asked) < answers + 16 + 6  # one call's more
    if answers > 3:
        assert all(method.best(p) is not None for p in search.pools[:2])
    second = authors.Author()
    again, players = opened(tmp_path / "less", method, second, answers=answers)
    assert again.run(players) != "" and second.asked == []
    third = authors.Author()
    search = searched(tmp_path / "less", method, third)
    assert pools(search) == pools(expected)
    assert len({*first.asked, *third.asked}) == len([*first.asked, *third.asked])


class Leaving(authors.Author):
    """Leaves what is cancelled while it writes."""

    def __init__(self):
        super().__init__()
        self.left = set()

    def cancel(self, request_id):
        self.left.add(request_id)

    def generate(self, requests, on_answer=None, *, answered=()):
        found = []
        for place, request in enumerate(requests):

            def told(_, response, place=place):
                on_answer(place, response)

            number = range(request.num_samples)
            own = {index for at, index in answered if at == place}
            for index in number:
                if index in own:
                    continue
                if request.id in self.left:
                    unasked = answers_lib.unanswered(
                        request, index, records.Finish.CANCELLED, self.version
                    )
                    found.append((place, unasked))
                    continue
                others = {(0, i) for i in number if i != index}
                ((response,),) = super().generate([request], told, answered=others)
                found.append((place, response))
        return [[r for at, r in found if at == place] for place in range(len(requests))]


def test_a_budget_ends_a_call_in_its_middle_and_the_round_is_not_done(tmp_path):
    method = pool.PoolSearch(POOL, 4)
    expected = searched(tmp_path / "whole", method)
    first = Leaving()
    search, players = opened(tmp_path / "less", method, first, answers=9)
    assert search.run(players) == "budget.answers = 9 is spent"
    assert len(first.asked) == 9
    assert [p.rounds for p in search.pools] == [0] * 5
    assert not any(p["done"] for p in outcome.summarise(search)["problems"])
    unfinished = tmp_path / "less" / run.UNFINISHED
    assert len(unfinished.read_text().splitlines()) == 9
    second = Leaving()
    assert pools(searched(tmp_path / "less", method, second)) == pools(expected)
    assert not unfinished.exists() and not {*first.asked} & {*second.asked}


def test_the_last_round_asks_on_until_its_answer_is_settled(tmp_path):
    config = dataclasses.replace(POOL, rounds=0, best=6, adaptive=True, verifications=8)
    whole = pool.PoolSearch(dataclasses.replace(config, adaptive=False), 5)
    adaptive = pool.PoolSearch(config, 5)
    expected = searched(tmp_path / "whole", whole)
    found = searched(tmp_path / "adaptive", adaptive)
    assert [adaptive.best(p).proof for p in found.pools] == [
        whole.best(p).proof for p in expected.pools
    ]
    assert found.meter.spent.answers < expected.meter.spent.answers


def test_tokens_and_hours_are_budgets_too(tmp_path):
    method = pool.PoolSearch(POOL, 4)
    search, players = opened(tmp_path / "tokens", method, authors.Author(), tokens=500)
    assert search.run(players) == "budget.tokens = 500 is spent"
    clock = iter(range(0, 10**9, 360))
    meter = asking.Meter(asking.Budget(hours=0.5), before=600.0, now=lambda: next(clock))
    found = [bool(meter.exceeded()) for _ in range(6)]
    assert found == [False, False, False, True, True, True]


def test_what_stands_in_the_folder_must_be_of_this_search(tmp_path):
    searched(tmp_path, pool.PoolSearch(POOL, 4), problems=PROBLEMS[:2])
    with pytest.raises(ValueError, match="holds samples of problem"):
        opened(tmp_path, pool.PoolSearch(POOL, 4), authors.Author(), problems=PROBLEMS[1:2])


def test_the_tokens_of_problems_add_up_to_what_was_spent(tmp_path):
    method = pool.PoolSearch(POOL, 4)
    search = searched(tmp_path, method)
    assert sum(p.tokens for p in search.pools) == search.meter.spent.tokens > 0
    again, _ = opened(tmp_path, method, authors.Author())
    assert [p.tokens for p in again.pools] == [p.tokens for p in search.pools]
    shown = outcome.line(search, search.pools[0])
    assert f"{search.pools[0].tokens:,} tokens" in shown and shown.startswith("a: round ")
    assert outcome.summarise(again) == outcome.summarise(search)
