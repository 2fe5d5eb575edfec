"""Curves of searches against what is worked out by hand, and against searches with lower limits."""

import dataclasses
import itertools

import pytest

from mathv2_jax.evaluation import curves
from mathv2_jax.search import candidates, pool, refine
from tests.search import authors
from tests.search.test_run import samples, searched

CONFIG = refine.RefineConfig(threads=4, attempts=3, verifications=0)


def level(problem, candidate):
    """The author's own: a level of 3 and more is right."""
    return 1.0 if int(candidate.proof[6]) >= 3 else 0.0


def refined(tmp_path, attempts=3):
    config = dataclasses.replace(CONFIG, attempts=attempts)
    return searched(tmp_path, refine.Refinement(config, 1)).pools


def test_one_run_has_the_results_of_every_lower_limit(tmp_path):
    whole = curves.of_refinement(refined(tmp_path / "3"), CONFIG, level, rounds=20)
    for limit in (1, 2):
        config = dataclasses.replace(CONFIG, attempts=limit)
        lower = curves.of_refinement(
            refined(tmp_path / str(limit), limit), config, level, rounds=20
        )
        for name in ("pass_at_1", "best_at_n"):
            assert getattr(whole, name)[limit - 1] == getattr(lower, name)[-1]


def test_pass_at_1_is_the_mean_of_threads_and_best_averages_the_ties(tmp_path):
    pools = refined(tmp_path)[:1]
    found = curves.of_refinement(pools, CONFIG, level, rounds=20)
    for limit, (first, best) in enumerate(zip(found.pass_at_1, found.best_at_n, strict=True), 1):
        answers = refine.answers(pools[0], 4, limit)
        scores = [0.0 if a is None else level(None, a.candidate) for a in answers]
        assert first.score.value == pytest.approx(sum(scores) / 4)
        top = max(a.self_score for a in answers if a is not None)
        picked = [s for a, s in zip(answers, scores, strict=True) if a and a.self_score == top]
        assert best.score.value == pytest.approx(sum(picked) / len(picked))
    assert found.pass_at_1[0].tokens < found.pass_at_1[2].tokens


def test_the_chance_to_be_the_best_of_those_that_are_drawn():
    # Of two of four: a pair without the 1.0 is one of three out of six, and its best is the 0.5
    # where that is in it (two pairs), else one of the lowest.
    assert curves.chances([0.0, 0.5, None, 1.0], 2) == pytest.approx([1 / 6, 2 / 6, 0.0, 3 / 6])
    assert curves.chances([1.0, 0.0, 1.0], 1) == pytest.approx([1 / 3] * 3)
    assert curves.chances([1.0, 0.0, 1.0], 3) == pytest.approx([0.5, 0.0, 0.5])


def test_the_best_of_n_is_what_all_ways_to_draw_n_come_to_in_the_mean(tmp_path):
    refined(tmp_path)
    made = samples(tmp_path)
    (problem,) = {s.problem_id for s in made[:1]}
    own = [s for s in made if s.problem_id == problem]
    one = [(dataclasses.replace(authors.problem(), id=problem), own)]
    found = curves.best_of_first(one, level, [1, 2, 4, 8], rounds=20)
    assert [p.limit for p in found] == [1, 2, 4]  # there are four
    whole = candidates.Pool(one[0][0])
    whole.absorb(s for s in own if s.step == 0)
    attempts = {a.index: a for a in whole.attempts}
    for point in found:
        drawn = []
        for chosen in itertools.combinations(range(4), point.limit):
            said = [attempts[i].self_score if i in attempts else -1.0 for i in chosen]
            top = [i for i, s in zip(chosen, said, strict=True) if s == max(said)]
            true = [level(None, attempts[i].candidate) if i in attempts else 0.0 for i in top]
            drawn.append(sum(true) / len(true))
        assert point.score.value == pytest.approx(sum(drawn) / len(drawn))


POOL = pool.PoolConfig(proofs=6, verifications=3, best=3, analyses=2, rounds=2)


def written(tmp_path, config):
    method = pool.PoolSearch(config, 3)
    made = searched(tmp_path, method)
    found = samples(tmp_path)
    own = [(p.problem, [s for s in found if s.problem_id == p.problem.id]) for p in made.pools]
    return method, made, own


def test_rounds_end_with_what_the_search_chose_and_all_its_tokens(tmp_path):
    method, made, own = written(tmp_path, POOL)
    points = curves.of_rounds(own, method, level, rounds=20)
    assert [p.limit for p in points] == [0, 1, 2]
    chosen = [level(None, method.best(p)) for p in made.pools]
    assert points[-1].score.value == pytest.approx(sum(chosen) / len(chosen))
    assert points[-1].tokens * len(own) == made.meter.spent.tokens


def test_the_best_of_n_takes_the_first_n_proofs_and_their_votes_alone(tmp_path):
    one_shot = dataclasses.replace(POOL, rounds=0)
    method, made, own = written(tmp_path / "6", one_shot)
    points = curves.of_one_shot(own, method, level, [2, 6], rounds=20)
    _, less, _ = written(tmp_path / "2", dataclasses.replace(one_shot, proofs=2))
    assert points[1].tokens * len(own) == made.meter.spent.tokens
    assert points[0].tokens * len(own) == less.meter.spent.tokens


def test_a_majority_of_no_votes_is_no_score(tmp_path):
    pools = refined(tmp_path)[:1]
    candidate = pools[0].candidates[0]
    assert curves.by_majority(authors.problem(), candidate) is None
    found = curves.of_refinement(pools, CONFIG, curves.by_majority, rounds=20)
    assert found.pass_at_1[0].score.value is None
    assert found.pass_at_1[0].by_problem == (None,)


def test_a_proof_without_a_score_leaves_the_mean_and_one_that_cannot_be_read_is_a_0(tmp_path):
    pools = refined(tmp_path)

    def fussy(problem, candidate):
        return None if candidate.proof[6] == "0" else level(problem, candidate)

    found = curves.of_refinement(pools, CONFIG, fussy, rounds=20).pass_at_1[0]
    for pool_, value in zip(pools, found.by_problem, strict=True):
        answers = refine.answers(pool_, 4, 1)
        scores = [0.0 if a is None else fussy(None, a.candidate) for a in answers]
        known = [s for s in scores if s is not None]
        assert value == (pytest.approx(sum(known) / len(known)) if known else None)
    assert None in [s for p in pools for s in [fussy(None, a.candidate) for a in p.attempts]]


def test_differences_are_paired_and_made_at_no_fewer_tokens(tmp_path):
    pools = refined(tmp_path)
    made = curves.of_refinement(pools, CONFIG, level, rounds=20).pass_at_1
    found = curves.difference(made[0], made[-1], rounds=50)
    assert found.value == pytest.approx(made[-1].score.value - made[0].score.value)
    assert curves.difference(made[0], made[0], rounds=50).high == 0.0
    for most in (1, 2, 3):
        for tokens in (0.0, *(p.tokens + d for p in made for d in (-1.0, 0.0, 1.0))):
            enough = [p for p in made[:most] if p.tokens >= tokens]
            found_ = curves.no_cheaper(lambda limit: made[limit - 1], most, tokens)
            assert found_ == (enough[0] if enough else None)
    gone = dataclasses.replace(made[0], by_problem=(None, *made[0].by_problem[1:]))
    assert curves.difference(gone, made[-1], rounds=50).items == len(pools) - 1
