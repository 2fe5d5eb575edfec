"""From opinions to rewards, with judges that speak by a script."""

import pytest

from mathv2_jax import reward
from mathv2_jax.records import Finish
from mathv2_jax.stages import scoring
from tests import scripted
from tests.by_hand import GENERATIONS, NOISE, PROOF, RATINGS, STATEMENT, VERDICTS, answer

ROLES = scripted.ROLES
ONE = scoring.JudgeConfig()
SEED = (0, "stage", 0)


def totals(scored):
    return [None if s.components is None else s.components["total"] for s in scored]


# The policy's own failures.


@pytest.mark.parametrize(("mask", "cut"), [(False, 0.0), (True, None)])
def test_a_cut_answer_earns_nothing_or_leaves_its_group_and_a_lost_one_always_leaves(mask, cut):
    answered = [
        answer(ROLES.verifier, VERDICTS[0.5], 1.0),
        answer(ROLES.verifier, VERDICTS[1.0], 1.0, Finish.LENGTH),
        answer(ROLES.verifier, NOISE, 1.0),
        answer(ROLES.verifier, "", 1.0, Finish.LOST),
        answer(ROLES.meta_verifier, RATINGS[0.0], 1.0),
    ]
    scored = scoring.label_scorer(mask_length=mask)(answered, SEED)
    assert totals(scored) == [0.5, cut, 0.0, None, 0.0]
    assert scored[2].components == {"format": 0.0, "total": 0.0}
    assert scored[4].components == {"format": 1.0, "score": 0.0, "total": 0.0}


# R_meta.


def meta(house, script, config=ONE):
    judge = house.engine({scripted.META: script})
    return scoring.meta_scorer(judge, ROLES, config, mask_length=False)


def test_r_meta_multiplies_the_verifiers_rewards_and_no_others(house):
    answered = [
        answer(ROLES.verifier, VERDICTS[0.5], 1.0),
        answer(ROLES.meta_verifier, RATINGS[1.0], 1.0),
        answer(ROLES.verifier, VERDICTS[0.0], 0.0),
        answer(ROLES.verifier, NOISE, 0.0),
    ]
    scored = meta(house, {RATINGS[0.5]: 1.0})(answered, SEED)
    assert totals(scored) == [0.25, 1.0, 0.5, 0.0]
    assert scored[0].components == {"format": 1.0, "score": 0.5, "meta": 0.5, "total": 0.25}
    assert [len(s.meta) for s in scored] == [1, 0, 1, 0]  # only parsed analyses are judged


def test_a_meta_verifier_is_shown_the_policys_analysis(house):
    judge = house.engine({scripted.META: {RATINGS[0.5]: 1.0}})
    score = scoring.meta_scorer(judge, ROLES, ONE, mask_length=False)
    score([answer(ROLES.verifier, VERDICTS[0.5], 1.0), answer(ROLES.verifier, NOISE)], SEED)
    fields = dict(statement=STATEMENT, proof=PROOF, analysis=VERDICTS[0.5])
    assert judge.asked == [scripted.shown(ROLES.meta_verifier, **fields)]


def test_without_enough_meta_votes_an_analysis_leaves_its_group(house):
    answered = [
        answer(ROLES.verifier, VERDICTS[1.0], 1.0),
        answer(ROLES.meta_verifier, RATINGS[1.0], 1.0),
    ]
    for lost in (NOISE, scripted.ENDLESS):
        scored = meta(house, {lost: 1.0})(answered, SEED)
        assert totals(scored) == [None, 1.0]
        assert len(scored[0].meta) == 1  # the lost vote stays on record


def test_lost_meta_votes_are_left_out_of_the_mean(house):
    config = scoring.JudgeConfig(meta_votes=16)
    answered = [answer(ROLES.verifier, VERDICTS[1.0], 1.0)] * 4
    scored = meta(house, {RATINGS[1.0]: 0.5, NOISE: 0.5}, config)(answered, SEED)
    assert totals(scored) == [1.0] * 4
    assert any(o.score is None for s in scored for o in s.meta)


# The generator.


def generation(house, verdicts, ratings, config=ONE, weights=None):
    judge = house.engine({scripted.VERIFY: verdicts, scripted.META: ratings})
    weights = weights or reward.GeneratorWeights()
    return scoring.generator_scorer(judge, ROLES, config, weights, mask_length=False)


def test_a_generator_is_paid_by_the_votes_on_its_proof_and_on_its_own_analysis(house):
    answered = [answer(ROLES.generator, GENERATIONS[score]) for score in (0.0, 0.5, 1.0)]
    answered.append(answer(ROLES.generator, VERDICTS[1.0]))  # not in its format
    score = generation(house, {VERDICTS[0.5]: 1.0}, {RATINGS[0.5]: 1.0})
    scored = score(answered, SEED)
    proof = 0.76 * 0.5
    expected = [proof + 0.24 * 0.5 * 0.5, proof + 0.24 * 1.0 * 0.5, proof + 0.24 * 0.5 * 0.5, 0.0]
    assert totals(scored) == pytest.approx(expected)
    assert [(len(s.verifier), len(s.meta)) for s in scored] == [(1, 1)] * 3 + [(0, 0)]


def test_a_generators_judge_is_shown_its_proof_alone_and_then_its_self_analysis(house):
    judge = house.engine({scripted.VERIFY: {NOISE: 1.0}, scripted.META: {NOISE: 1.0}})
    weights = reward.GeneratorWeights()
    score = scoring.generator_scorer(judge, ROLES, ONE, weights, mask_length=False)
    score([answer(ROLES.generator, GENERATIONS[0.5])], SEED)
    fields = dict(statement=STATEMENT, proof=PROOF)
    assert judge.asked == [
        scripted.shown(ROLES.verifier, **fields),
        scripted.shown(ROLES.meta_verifier, **fields, analysis=VERDICTS[0.5]),
    ]


def test_a_generators_reward_is_over_the_votes_that_are_left(house):
    config = scoring.JudgeConfig(verifier_votes=16, meta_votes=16, min_votes=2)
    score = generation(
        house, {VERDICTS[1.0]: 0.5, NOISE: 0.5}, {RATINGS[1.0]: 0.5, scripted.ENDLESS: 0.5}, config
    )
    assert totals(score([answer(ROLES.generator, GENERATIONS[1.0])] * 2, SEED)) == [1.0, 1.0]


@pytest.mark.parametrize("lost", [scripted.VERIFY, scripted.META])
def test_a_proof_without_a_verdict_or_without_a_rating_leaves_its_group(house, lost):
    said = {scripted.VERIFY: {VERDICTS[1.0]: 1.0}, scripted.META: {RATINGS[1.0]: 1.0}}
    said[lost] = {NOISE: 1.0}
    score = generation(house, said[scripted.VERIFY], said[scripted.META])
    assert totals(score([answer(ROLES.generator, GENERATIONS[1.0])], SEED)) == [None]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(meta_votes=0), "judge.meta_votes = 0"),
        (dict(verifier_votes=3, min_votes=2), "judge.min_votes = 2: more than the votes asked"),
    ],
)
def test_an_impossible_number_of_votes_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        scoring.JudgeConfig(**fields)
