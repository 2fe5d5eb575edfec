import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax import reward

SCORES = (0.0, 0.5, 1.0)
LISTS = st.lists(st.sampled_from(SCORES), min_size=1, max_size=9)


def paper_generator(self_score, proof, meta):
    """R = 0.76 R_Y + 0.24 (1 - |s' - R_Y|) R_meta(Z), in hundredths of exact integers."""
    doubled_gap = abs(int(2 * self_score) - int(2 * proof))
    return (76 * int(2 * proof) * 2 + 24 * (2 - doubled_gap) * int(2 * meta)) / 400


@pytest.mark.parametrize(("self_score", "proof", "meta"), list(itertools.product(SCORES, repeat=3)))
def test_a_generator_earns_what_the_recipe_says(self_score, proof, meta):
    found = reward.generator(self_score, [proof], [meta], reward.GeneratorWeights())
    assert found["total"] == pytest.approx(paper_generator(self_score, proof, meta), abs=1e-12)
    assert (found["proof"], found["meta"], found["format"]) == (proof, meta, 1.0)
    assert found["self"] == 1.0 - abs(self_score - proof)
    assert found["honesty"] == found["self"] * meta


def test_a_generator_that_admits_a_bad_proof_earns_more_than_one_that_does_not():
    weights = reward.GeneratorWeights()
    admits = reward.generator(0.0, [0.0], [1.0], weights)["total"]
    boasts = reward.generator(1.0, [0.0], [1.0], weights)["total"]
    right = reward.generator(1.0, [1.0], [1.0], weights)["total"]
    assert (admits, boasts, right) == (0.24, 0.0, 1.0)


def test_other_weights_move_the_generators_reward():
    weights = reward.GeneratorWeights(alpha=0.25, beta=0.75)
    assert reward.generator(0.5, [1.0], [0.5], weights)["total"] == 0.25 + 0.75 * 0.5 * 0.5


def test_a_generator_is_rewarded_by_the_mean_of_several_votes():
    found = reward.generator(1.0, [1.0, 0.5], [0.0, 1.0, 0.5], reward.GeneratorWeights())
    assert (found["proof"], found["self"], found["meta"]) == (0.75, 0.75, 0.5)
    assert found["total"] == pytest.approx(0.76 * 0.75 + 0.24 * 0.75 * 0.5)


NINE = [(s, t, {0.0: 1.0, 0.5: 0.5, 1.0: 0.0}[abs(s - t)]) for s in SCORES for t in SCORES]


@pytest.mark.parametrize(("score", "label", "fit"), NINE)
def test_a_judge_earns_by_its_distance_from_the_label(score, label, fit):
    assert reward.verifier(score, label) == {"format": 1.0, "score": fit, "total": fit}
    assert reward.meta_verifier(score, label) == {"format": 1.0, "score": fit, "total": fit}


@pytest.mark.parametrize(("score", "label", "fit"), NINE)
@pytest.mark.parametrize("meta", SCORES)
def test_with_meta_verification_a_verifier_earns_the_product(score, label, fit, meta):
    found = reward.verifier_with_meta(score, label, [meta])
    assert found == {"format": 1.0, "score": fit, "meta": meta, "total": fit * meta}


def test_a_malformed_response_earns_nothing():
    assert reward.malformed() == {"format": 0.0, "total": 0.0}


@given(LISTS)
def test_a_mean_is_over_the_votes_that_are_there(votes):
    assert reward.mean(votes) == pytest.approx(sum(votes) / len(votes))
    assert reward.mean(votes * 3) == pytest.approx(reward.mean(votes))


@pytest.mark.parametrize(
    "judged",
    [
        lambda: reward.mean([]),
        lambda: reward.majority([]),
        lambda: reward.verifier_with_meta(1.0, 1.0, []),
        lambda: reward.generator(1.0, [], [1.0], reward.GeneratorWeights()),
        lambda: reward.generator(1.0, [1.0], [], reward.GeneratorWeights()),
    ],
)
def test_without_a_vote_there_is_no_reward_rather_than_0(judged):
    with pytest.raises(ValueError, match="no vote is left"):
        judged()


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([1.0, 0.0], 0.0),
        ([0.0, 1.0, 1.0], 1.0),
        ([1.0, 0.5, 0.5, 1.0], 0.5),
        ([1.0, 1.0, 0.0, 0.0, 0.5], 0.0),
        ([0.5], 0.5),
    ],
)
def test_the_majority_goes_to_the_lower_score_in_a_tie(votes, winner):
    assert reward.majority(votes) == winner


@given(LISTS)
def test_no_score_has_more_votes_than_the_majority(votes):
    winner = reward.majority(votes)
    for score in SCORES:
        assert votes.count(score) <= votes.count(winner)
        assert score >= winner or votes.count(score) < votes.count(winner)


@pytest.mark.parametrize(
    ("votes", "confirm_at", "valid"),
    [
        ([1.0], 1.0, True),
        ([1.0, 0.0], 1.0, False),
        ([1.0, 1.0, 0.0], 1.0, True),
        ([1.0, 1.0, 0.5, 0.5], 1.0, False),
        ([1.0, 1.0, 0.5, 0.5], 0.5, True),
        ([], 1.0, False),
    ],
)
def test_an_analysis_is_valid_by_a_strict_majority(votes, confirm_at, valid):
    assert reward.is_valid(votes, reward.AutoLabelRule(confirm_at=confirm_at)) is valid


@pytest.mark.parametrize(
    ("scores", "valid", "k", "label"),
    [
        # The lowest score wins with k valid analyses,
        ([0.0, 0.5, 1.0, 0.0], [True, True, False, True], 2, 0.0),
        ([0.5, 1.0, 1.0, 0.5], [True, False, False, True], 2, 0.5),
        ([0.0, 0.5, 0.5, 0.5], [True, True, True, True], 1, 0.0),
        # is undecided with fewer of them, whatever the higher scores say,
        ([0.0, 0.5, 0.5, 0.5], [True, True, True, True], 2, None),
        ([0.0, 0.5, 0.5, 1.0], [False, True, True, False], 2, None),
        ([0.0, 0.0, 1.0, 1.0], [True, False, False, False], 2, None),
        # and 1 stands where nobody's issue was confirmed.
        ([0.0, 0.5, 1.0, 0.0], [False, False, False, False], 2, 1.0),
        ([1.0, 1.0], [False, False], 2, 1.0),
        ([1.0, 1.0], [True, False], 2, 1.0),  # an analysis that names nothing confirms no issue
        # A proof with fewer than k parsed analyses is undecided.
        ([1.0], [False], 2, None),
        ([0.0], [True], 2, None),
        ([], [], 1, None),
    ],
)
def test_the_auto_label_of_votes(scores, valid, k, label):
    assert reward.auto_label(scores, valid, reward.AutoLabelRule(num_valid=k)) == label


@given(st.lists(st.tuples(st.sampled_from(SCORES), st.booleans()), max_size=8), st.integers(1, 4))
def test_an_auto_label_does_not_depend_on_the_order_of_votes(votes, k):
    rule = reward.AutoLabelRule(num_valid=k)
    labels = {
        reward.auto_label([s for s, _ in found], [v for _, v in found], rule)
        for found in (votes, votes[::-1], sorted(votes))
    }
    assert len(labels) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(alpha=0.5), "alpha = 0.5"),
        (dict(alpha=1.5, beta=-0.5), "beta = -0.5"),
        (dict(alpha=-0.1, beta=1.1), "alpha = -0.1"),
    ],
)
def test_weights_that_are_no_shares_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        reward.GeneratorWeights(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(num_analyses=0), "num_analyses = 0"),
        (dict(num_meta=0), "num_meta = 0"),
        (dict(num_valid=0), "num_valid = 0"),
        (dict(num_valid=9), "num_valid = 9"),
        (dict(confirm_at=0.0), "confirm_at = 0.0"),
        (dict(confirm_at=1.5), "confirm_at = 1.5"),
    ],
)
def test_an_impossible_rule_of_auto_labelling_is_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        reward.AutoLabelRule(**fields)
