import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.rollout import sampling

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.2, 0.3, 0.03])
LOGITS_V = np.log(PROBABILITIES) + 3.0
CHI_SQUARE_5 = 20.5  # exceeded with probability 0.001 by five degrees of freedom

_sample = jax.jit(sampling.sample)


def sample(uniform_B, temperature=1.0, top_p=1.0, logits_V=LOGITS_V, truncate=None):
    """A token and log-probability for each uniform number, at settings that may differ by row."""
    rows = len(uniform_B)
    settings = [np.broadcast_to(np.float32(x), (rows,)) for x in (temperature, top_p)]
    logits_BV = np.broadcast_to(np.float32(logits_V), (rows, len(logits_V)))
    if truncate is None:
        truncate = bool(np.min(settings[1]) < 1.0)
    rules = sampling.Truncation(settings[1], np.zeros(rows, np.int32), np.zeros(rows, np.float32))
    found = _sample(logits_BV, np.float32(uniform_B), settings[0], rules if truncate else None)
    return np.asarray(found.token_B), np.asarray(found.logprob_B)


def _none(rows):
    return np.zeros(rows, np.int32), np.zeros(rows, np.float32)


def kept_by(top_p=1.0, top_k=0, min_p=0.0):
    rules = sampling.Truncation(jnp.float32([top_p]), jnp.int32([top_k]), jnp.float32([min_p]))
    return set(np.flatnonzero(sampling.kept(jnp.float32(LOGITS_V)[None], rules)[0]))


def tempered(temperature):
    powers = PROBABILITIES ** (1.0 / temperature)
    return powers / powers.sum()


GRID = (np.arange(1000) + 0.5) / 1000


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_a_grid_of_uniform_numbers_gives_each_token_its_softmax_share(temperature):
    tokens_B, _ = sample(GRID, temperature)
    counts_V = np.bincount(tokens_B, minlength=6)
    np.testing.assert_allclose(counts_V, 1000 * tempered(temperature), atol=1.01)


def test_frequencies_under_random_keys_match_the_softmax():
    keys = jax.random.split(jax.random.key(11), 1000)
    tokens_B, _ = sample(jax.vmap(jax.random.uniform)(keys), 0.7)
    expected_V = 1000 * tempered(0.7)
    counts_V = np.bincount(tokens_B, minlength=6)
    assert np.sum((counts_V - expected_V) ** 2 / expected_V) < CHI_SQUARE_5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_log_probabilities_are_those_of_the_tempered_distribution(temperature):
    tokens_B, logprob_B = sample(GRID, temperature)
    np.testing.assert_allclose(logprob_B, np.log(tempered(temperature))[tokens_B], atol=1e-5)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {1}),
        (0.39, {1}),
        (0.41, {1, 4}),
        (0.69, {1, 4}),
        (0.71, {1, 4, 3}),
        (0.96, {1, 4, 3, 0, 5}),
        (1.0, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_its_mass(top_p, kept):
    assert kept_by(top_p=top_p) == kept


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (dict(top_k=2), {1, 4}),
        (dict(top_k=9), {0, 1, 2, 3, 4, 5}),
        (dict(min_p=0.5), {1, 3, 4}),
        (dict(min_p=0.51), {1, 4}),
        (dict(min_p=1.0), {1}),
        (dict(top_p=0.71, top_k=2), {1, 4}),
        (dict(top_p=0.41, top_k=3, min_p=0.1), {1, 4}),
        (dict(), {0, 1, 2, 3, 4, 5}),
    ],
    ids=str,
)
def test_what_is_kept_passes_every_rule_on_the_whole_distribution(rules, kept):
    assert kept_by(**rules) == kept


def test_log_probabilities_of_the_policy_are_those_without_truncation():
    rows = len(GRID)
    rules = sampling.Truncation(np.full(rows, 0.71, np.float32), *_none(rows))
    logits_BV = np.broadcast_to(np.float32(LOGITS_V), (rows, 6))
    found = _sample(logits_BV, np.float32(GRID), np.ones(rows, np.float32), rules)
    np.testing.assert_allclose(
        found.policy_logprob_B, np.log(PROBABILITIES)[np.asarray(found.token_B)], atol=1e-5
    )
    np.testing.assert_allclose(
        found.logprob_B - found.policy_logprob_B, -np.log(0.9), atol=1e-5
    )  # of the kept mass


def test_kept_ids_are_listed_in_order_up_to_the_most_and_counted_beyond():
    kept_BV = np.array([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]], bool)
    ids_BY, number_B = sampling.kept_ids(jnp.asarray(kept_BV), 3)
    assert ids_BY.tolist() == [[1, 3, 4], [5, -1, -1], [0, 1, 2]]
    assert number_B.tolist() == [3, 1, 6]


@pytest.mark.parametrize("top_p", [0.69, 0.85])
def test_truncated_sampling_draws_and_scores_under_the_renormalised_kept_set(top_p):
    kept = np.isin(np.arange(6), [1, 4] if top_p == 0.69 else [1, 4, 3])
    expected_V = np.where(kept, PROBABILITIES, 0.0) / PROBABILITIES[kept].sum()
    tokens_B, logprob_B = sample(GRID, top_p=top_p)
    np.testing.assert_allclose(np.bincount(tokens_B, minlength=6), 1000 * expected_V, atol=1.01)
    np.testing.assert_allclose(logprob_B, np.log(expected_V[tokens_B]), atol=1e-5)


def test_the_kept_set_is_chosen_after_the_temperature():
    """The two likeliest tokens hold 0.7 at temperature 1, and 0.54 at temperature 2."""
    assert set(sample(GRID, top_p=0.6)[0]) == {1, 4}
    assert set(sample(GRID, 2.0, top_p=0.6)[0]) == {1, 4, 3}


def test_the_ends_of_the_uniform_range_stay_inside_the_kept_set():
    almost_one = np.nextafter(np.float32(1.0), np.float32(0.0))
    tokens_B, logprob_B = sample([0.0, almost_one], top_p=0.69)
    assert tokens_B.tolist() == [1, 4]
    assert np.isfinite(logprob_B).all()


@pytest.mark.parametrize("truncate", [False, True])
def test_temperature_zero_takes_the_likeliest_and_scores_it_at_temperature_one(truncate):
    tokens_B, logprob_B = sample(GRID, 0.0, top_p=0.01 if truncate else 1.0)
    assert set(tokens_B) == {1}
    np.testing.assert_allclose(logprob_B, np.log(0.4), atol=1e-5)


def test_a_rows_settings_are_its_own():
    """The same numbers at four settings side by side are as at each setting alone."""
    settings = [(1.0, 1.0), (0.0, 1.0), (0.5, 0.69), (2.0, 0.3)]
    rows = [settings[i % 4] for i in range(1000)]
    tokens_B, logprob_B = sample(GRID, [t for t, _ in rows], [p for _, p in rows])
    for place, (temperature, top_p) in enumerate(settings):
        expected_B, expected_logprob_B = sample(GRID, temperature, top_p, truncate=True)
        np.testing.assert_array_equal(tokens_B[place::4], expected_B[place::4])
        np.testing.assert_allclose(logprob_B[place::4], expected_logprob_B[place::4], atol=1e-6)


def test_a_distribution_on_one_token_is_certain():
    logits_V = np.where(np.arange(6) == 4, 80.0, -80.0)
    tokens_B, logprob_B = sample(GRID, logits_V=logits_V)
    assert set(tokens_B) == {4}
    np.testing.assert_array_equal(logprob_B, 0.0)
