import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.rl import grpo

PLAIN = grpo.GrpoConfig(kl_coefficient=0.0)


def arrays(rows, length, **given):
    """Arguments of grpo_loss on [rows, length] with nothing in them but what is given."""
    zeros_BT = jnp.zeros((rows, length), jnp.float32)
    names = ("logprob_BT", "entropy_BT", "old_BT", "reference_BT", "advantage_BT")
    made = dict.fromkeys(names, zeros_BT)
    made |= dict(segments_BT=jnp.ones((rows, length), jnp.int32), weight_BT=zeros_BT + 1.0)
    floats = {k: jnp.asarray(v, jnp.float32) for k, v in given.items() if k != "segments_BT"}
    if "segments_BT" in given:
        made["segments_BT"] = jnp.asarray(given["segments_BT"], jnp.int32)
    return made | floats


def loss_of(made, config):
    beside = {name: x for name, x in made.items() if name not in ("reference_BT", "proximal_BT")}
    anchors = grpo.Anchors(made["reference_BT"], made.get("proximal_BT"))
    return grpo.grpo_loss(**beside, anchors=anchors, config=config)


@functools.partial(jax.jit, static_argnames=("config", "wrt"))
def differentiated(config, made, wrt):
    def loss(x_BT):
        return loss_of(made | {wrt: x_BT}, config)

    return jax.value_and_grad(loss, has_aux=True)(made[wrt])


def loss_and_gradient(config, made, wrt="logprob_BT"):
    (loss, _), gradient_BT = differentiated(config, made, wrt)
    return loss, gradient_BT


def figures(config, made):
    return differentiated(config, made, "logprob_BT")[0][1]


def random_batch(rows=4, length=6, seed=0):
    draw = np.random.default_rng(seed)
    shape = (rows, length)
    return arrays(
        rows,
        length,
        logprob_BT=draw.normal(-1.0, 0.3, shape),
        old_BT=draw.normal(-1.0, 0.3, shape),
        reference_BT=draw.normal(-1.0, 0.3, shape),
        proximal_BT=draw.normal(-1.0, 0.3, shape),
        entropy_BT=draw.uniform(0.0, 1.0, shape),
        advantage_BT=np.repeat(draw.normal(size=(rows, 2)), length // 2, axis=1),
        segments_BT=np.repeat([[1, 2]] * rows, length // 2, axis=1),
        weight_BT=draw.uniform(0.1, 1.0, shape) * (draw.uniform(size=shape) < 0.8),
    )


# Advantages and weights.


def test_an_advantage_is_the_reward_minus_the_groups_mean():
    np.testing.assert_allclose(grpo.advantages([1.0, 0.0, 0.5, 0.5], "mean"), [0.5, -0.5, 0.0, 0.0])


def test_mean_std_divides_by_the_groups_standard_deviation():
    np.testing.assert_allclose(grpo.advantages([3.0, 1.0, 1.0, 3.0], "mean_std"), [1, -1, -1, 1])
    np.testing.assert_allclose(
        grpo.advantages([1.0, 0.0, 0.0], "mean_std"), np.array([2, -1, -1]) / np.sqrt(2)
    )


@pytest.mark.parametrize("kind", grpo.ADVANTAGES)
@pytest.mark.parametrize("rewards", [[0.1 + 0.2, 0.3, 0.3], [0.76] * 8, [1.0], []])
def test_equal_rewards_give_no_signal(kind, rewards):
    np.testing.assert_array_equal(grpo.advantages(rewards, kind), np.zeros(len(rewards)))


def test_sequence_weights_are_the_mean_over_tokens_then_over_the_group_then_over_groups():
    weights = grpo.token_weights([[2, 4], [1, 3, 5, 7]], grpo.GrpoConfig(normalisation="sequence"))
    assert weights == [[1 / 8, 1 / 16], [1 / 8, 1 / 24, 1 / 40, 1 / 56]]


def test_token_weights_are_equal_over_all_tokens_of_the_step():
    weights = grpo.token_weights([[2, 4], [], [1, 3]], grpo.GrpoConfig(normalisation="token"))
    assert weights == [[0.1, 0.1], [], [0.1, 0.1]]


def test_constant_weights_divide_by_a_length_that_no_sequence_changes():
    config = grpo.GrpoConfig(normalisation="constant", constant_length=10)
    weights = grpo.token_weights([[2, 4], [1, 3]], config)
    np.testing.assert_allclose(weights, np.full((2, 2), 1 / 40))


@pytest.mark.parametrize("normalisation", ["sequence", "constant"])
def test_groups_without_answers_do_not_dilute_the_others(normalisation):
    config = grpo.GrpoConfig(normalisation=normalisation)
    alone = grpo.token_weights([[3, 5]], config)
    assert grpo.token_weights([[], [3, 5], []], config) == [[], *alone, []]


# The objective.


def test_on_policy_the_gradient_is_the_advantage_times_the_score_by_sequence_then_by_group():
    """On a categorical policy: - 1/groups 1/G sum_i A_i 1/|o_i| sum_t grad log pi(o_it)."""
    draw = np.random.default_rng(1)
    lengths, vocabulary = [[2, 5], [1, 3, 4]], 7
    logits_V = jnp.asarray(draw.normal(size=vocabulary), jnp.float32)
    probability_V = np.asarray(jax.nn.softmax(logits_V))
    weights = grpo.token_weights(lengths, PLAIN)
    weight_BT, advantage_BT = np.zeros((5, 5)), np.zeros((5, 5))
    tokens_BT = draw.integers(0, vocabulary, (5, 5))
    expected_V = np.zeros(vocabulary)
    row = 0
    for group, rewards in enumerate(([1.0, 0.0], [1.0, 0.5, 0.0])):
        advantages = np.asarray(rewards) - np.mean(rewards)
        for i, length in enumerate(lengths[group]):
            weight_BT[row, :length] = weights[group][i]
            advantage_BT[row] = advantages[i]
            scores_TV = np.eye(vocabulary)[tokens_BT[row, :length]] - probability_V
            expected_V -= advantages[i] * scores_TV.mean(axis=0) / len(rewards) / len(lengths)
            row += 1

    made = arrays(5, 5, advantage_BT=advantage_BT, weight_BT=weight_BT)

    def loss(logits_V):
        logprob_BT = jax.nn.log_softmax(logits_V)[tokens_BT]
        own = dict(logprob_BT=logprob_BT, old_BT=jax.lax.stop_gradient(logprob_BT))
        return loss_of(made | own, PLAIN)[0]

    np.testing.assert_allclose(jax.grad(loss)(logits_V), expected_V, atol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "flows"),
    [
        (2.0, 1.5, False),  # already likelier than the upper bound
        (2.0, 1.27, True),
        (2.0, 0.3, True),  # a good token that became rare is pushed back up
        (-2.0, 0.5, False),  # already rarer than the lower bound
        (-2.0, 0.81, True),
        (-2.0, 3.0, True),  # a bad token that became likely is pushed back down
    ],
)
def test_no_gradient_beyond_the_clip(advantage, ratio, flows):
    made = arrays(1, 1, logprob_BT=[[np.log(ratio)]], advantage_BT=[[advantage]])
    value, gradient_BT = loss_and_gradient(PLAIN, made)
    bounded = min(max(ratio, 0.8), 1.28)
    assert float(value) == pytest.approx(-min(ratio * advantage, bounded * advantage), rel=1e-5)
    expected = -ratio * advantage if flows else 0.0
    assert float(gradient_BT[0, 0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("clip_high", "flows"), [(0.28, True), (0.2, False)])
def test_the_upper_clip_is_wider_than_the_lower(clip_high, flows):
    """Ratios 1.25 and 0.75 are equally far off; by default only the lower is out of bounds."""
    config = grpo.GrpoConfig(kl_coefficient=0.0, clip_high=clip_high)
    made = arrays(1, 2, logprob_BT=[np.log([1.25, 0.75])], advantage_BT=[[1.0, -1.0]])
    _, gradient_BT = loss_and_gradient(config, made)
    np.testing.assert_array_equal(gradient_BT != 0.0, [[flows, False]])


def test_the_entropy_bonus_is_weighted_like_the_tokens():
    made = random_batch()
    config = grpo.GrpoConfig(entropy_coefficient=0.3)
    _, gradient_BT = loss_and_gradient(config, made, "entropy_BT")
    np.testing.assert_allclose(gradient_BT, -0.3 * made["weight_BT"], rtol=1e-6)


def test_health_figures_count_what_was_clipped_dropped_and_weighed():
    made = arrays(
        1,
        4,
        logprob_BT=[[np.log(1.5), np.log(0.5), np.log(1.1), np.log(9.0)]],
        weight_BT=[[0.1, 0.2, 0.4, 0.0]],
    )
    aux = figures(PLAIN, made)
    assert float(aux.weight) == pytest.approx(0.7)
    assert float(aux.clipped) == pytest.approx(0.3)
    assert float(aux.ratio) == pytest.approx(0.1 * 1.5 + 0.2 * 0.5 + 0.4 * 1.1, rel=1e-5)
    assert float(aux.dropped) == 0.0


# The KL.


def categorical(seed):
    return jax.nn.log_softmax(jnp.asarray(np.random.default_rng(seed).normal(size=6), jnp.float32))


def test_the_kl_is_never_negative_and_zero_only_at_equality():
    draw = np.random.default_rng(2)
    logprob, old, reference = jnp.asarray(draw.normal(-2.0, 1.0, (3, 500)), jnp.float32)
    assert float(jnp.min(grpo.unbiased_kl(logprob, old, reference))) > 0.0
    np.testing.assert_array_equal(grpo.unbiased_kl(logprob, old, logprob), np.zeros(500))


@pytest.mark.parametrize("sampler", [3, 5], ids=["on_policy", "off_policy"])
def test_the_kls_expectation_and_its_gradient_are_those_of_the_true_kl(sampler):
    logits_V, old_V, reference_V = categorical(3), categorical(sampler), categorical(4)

    def estimated(logits_V):
        each_V = grpo.unbiased_kl(jax.nn.log_softmax(logits_V), old_V, reference_V)
        return jnp.sum(jnp.exp(old_V) * each_V)

    def true(logits_V):
        logprob_V = jax.nn.log_softmax(logits_V)
        return jnp.sum(jnp.exp(logprob_V) * (logprob_V - reference_V))

    (value, gradient_V), (expected, expected_V) = (
        jax.value_and_grad(f)(logits_V) for f in (estimated, true)
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert float(jnp.max(jnp.abs(expected_V))) > 0.05
    np.testing.assert_allclose(gradient_V, expected_V, atol=1e-6)


def test_the_plain_log_ratio_would_regularise_nothing():
    logits_V, reference_V = categorical(3), categorical(4)

    def plain(logits_V):
        ratio_V = jax.nn.log_softmax(logits_V) - reference_V
        return jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(logits_V)) * ratio_V)

    np.testing.assert_allclose(jax.grad(plain)(logits_V), np.zeros(6), atol=1e-6)


def test_the_loss_adds_the_kl_under_the_tokens_weights():
    made = random_batch()
    without, _ = loss_and_gradient(PLAIN, made)
    with_kl, _ = loss_and_gradient(grpo.GrpoConfig(kl_coefficient=0.5), made)
    each_BT = grpo.unbiased_kl(made["logprob_BT"], made["old_BT"], made["reference_BT"])
    expected = 0.5 * jnp.sum(made["weight_BT"] * each_BT)
    assert float(with_kl - without) == pytest.approx(float(expected), rel=1e-5)


# Sequences that have drifted from the sampler.


def drifted():
    """Two rows of two sequences of two tokens: [bad, far] [good, far] / [bad, near] [bad, far].

    Of a far sequence one token is near and of the near one one is far: the mean decides.
    """
    gap_BT = np.array([[0.7, 0.1, 0.7, 0.1], [0.5, -0.1, 0.1, 0.7]])
    return arrays(
        2,
        4,
        logprob_BT=-1.0 - gap_BT,
        old_BT=np.full((2, 4), -1.0),
        reference_BT=np.full((2, 4), -0.5),
        advantage_BT=[[-1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]],
        segments_BT=[[1, 1, 2, 2], [1, 1, 2, 2]],
    )


DROPPED_BT = np.array([[1, 1, 0, 0], [0, 0, 1, 1]])


def test_a_bad_sequence_far_from_the_sampler_leaves_the_clipped_term():
    config = grpo.GrpoConfig(kl_coefficient=0.0, clip_low=0.9, off_policy_delta=0.3)
    _, gradient_BT = loss_and_gradient(config, drifted())
    np.testing.assert_array_equal(np.asarray(gradient_BT) == 0.0, DROPPED_BT == 1)
    assert float(figures(config, drifted()).dropped) == 4.0


def test_a_dropped_sequence_stays_in_the_kl():
    without = grpo.GrpoConfig(kl_coefficient=0.0, clip_low=0.9, off_policy_delta=0.3)
    with_kl = grpo.GrpoConfig(kl_coefficient=1.0, clip_low=0.9, off_policy_delta=0.3)
    made = drifted()
    difference_BT = loss_and_gradient(with_kl, made)[1] - loss_and_gradient(without, made)[1]
    kl_only = arrays(2, 4) | {k: made[k] for k in ("logprob_BT", "old_BT", "reference_BT")}
    _, expected_BT = loss_and_gradient(grpo.GrpoConfig(kl_coefficient=1.0), kl_only)
    np.testing.assert_allclose(difference_BT, expected_BT, rtol=1e-4, atol=1e-6)
    assert float(jnp.min(jnp.abs(expected_BT))) > 0.01


def test_nothing_is_dropped_while_the_mask_is_off():
    config = grpo.GrpoConfig(kl_coefficient=0.0, clip_low=0.9)
    assert bool(jnp.all(loss_and_gradient(config, drifted())[1] != 0.0))


def test_context_tokens_do_not_count_in_a_sequences_drift():
    """Far on the one trained token: three context tokens, equal in both, do not pull it near."""
    made = arrays(
        1,
        4,
        logprob_BT=[[-1.0, -1.0, -1.0, -1.4]],
        old_BT=np.full((1, 4), -1.0),
        advantage_BT=np.full((1, 4), -1.0),
        weight_BT=[[0.0, 0.0, 0.0, 1.0]],
    )
    config = grpo.GrpoConfig(kl_coefficient=0.0, clip_low=0.9, off_policy_delta=0.3)
    np.testing.assert_array_equal(loss_and_gradient(config, made)[1], np.zeros((1, 4)))


# A sampler that is not the trainer.


def mismatched(**given):
    """One row of two tokens, the policy as it was before the update."""
    before_BT = np.array([[-1.0, -2.0]])
    found = dict(logprob_BT=before_BT, proximal_BT=before_BT, advantage_BT=np.ones((1, 2)))
    return arrays(1, 2, **(found | given))


def test_a_token_that_the_sampler_drew_too_often_weighs_less_and_one_too_rarely_up_to_the_cap():
    """pi_trainer/pi_sampler is 0.5 and 8, the cap 2: that times the slope of the plain loss."""
    sampled_BT = np.array([[-1.0 + np.log(2.0), -2.0 - np.log(8.0)]])
    config = grpo.GrpoConfig(kl_coefficient=0.0, importance_cap=2.0)
    loss, gradient_BT = loss_and_gradient(config, mismatched(old_BT=sampled_BT))
    np.testing.assert_allclose(gradient_BT, [[-0.5, -2.0]], rtol=1e-6)
    assert float(loss) == pytest.approx(-2.5)
    found = figures(config, mismatched(old_BT=sampled_BT))
    assert float(found.importance) == pytest.approx(2.5)
    assert float(found.ratio) == 2.0 and float(found.clipped) == 0.0


def test_the_clipped_ratio_is_against_the_trainers_own_policy_before_the_update():
    """The policy moved by a factor of 1.5, beyond 1.28: no gradient, whatever the sampler did."""
    moved = mismatched(
        logprob_BT=np.array([[-1.0 + np.log(1.5), -2.0]]), old_BT=np.array([[-9.0, -2.0]])
    )
    config = grpo.GrpoConfig(kl_coefficient=0.0, importance_cap=4.0)
    _, gradient_BT = loss_and_gradient(config, moved)
    np.testing.assert_allclose(gradient_BT, [[0.0, -1.0]], rtol=1e-6)


def test_the_importance_weighs_the_kl_too():
    sampled_BT = np.array([[-1.0 - np.log(1.5), -2.0]])
    made = mismatched(
        old_BT=sampled_BT, advantage_BT=np.zeros((1, 2)), reference_BT=np.array([[-1.5, -2.0]])
    )
    config = grpo.GrpoConfig(kl_coefficient=1.0, importance_cap=9.0)
    assert float(loss_and_gradient(config, made)[0]) == pytest.approx(1.5 * (np.exp(-0.5) - 0.5))


def test_without_a_first_policy_of_its_own_the_one_that_is_differentiated_is_it():
    sampled_BT = np.array([[-1.0 + np.log(2.0), -2.0]])
    made = mismatched(old_BT=sampled_BT)
    config = grpo.GrpoConfig(kl_coefficient=0.0, importance_cap=2.0)
    expected, expected_BT = loss_and_gradient(config, made)
    made.pop("proximal_BT")
    loss, gradient_BT = loss_and_gradient(config, made)
    assert float(loss) == float(expected)
    np.testing.assert_array_equal(gradient_BT, expected_BT)


def test_without_a_cap_the_ratio_is_against_the_sampler():
    sampled_BT = np.array([[-1.0 + np.log(2.0), -2.0]])
    _, gradient_BT = loss_and_gradient(PLAIN, mismatched(old_BT=sampled_BT))
    np.testing.assert_allclose(gradient_BT, [[-0.5, -1.0]], rtol=1e-6)


# Masks and cuts.

EVERYTHING = grpo.GrpoConfig(
    entropy_coefficient=0.1, kl_coefficient=0.5, off_policy_delta=0.2, importance_cap=1.1
)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "name",
    ["logprob_BT", "entropy_BT", "old_BT", "reference_BT", "proximal_BT", "advantage_BT"],
)
def test_what_a_masked_token_holds_never_reaches_loss_or_gradient(name, value):
    made = random_batch()
    masked_BT = made["weight_BT"] == 0.0
    assert 0 < int(jnp.sum(masked_BT)) < masked_BT.size
    poisoned = made | {name: jnp.where(masked_BT, value, made[name])}
    expected, expected_BT = loss_and_gradient(EVERYTHING, made)
    loss, gradient_BT = loss_and_gradient(EVERYTHING, poisoned)
    assert float(loss) == float(expected)
    np.testing.assert_array_equal(gradient_BT, expected_BT)
    np.testing.assert_array_equal(gradient_BT[masked_BT], 0.0)
    assert all(bool(jnp.isfinite(x)) for x in figures(EVERYTHING, poisoned))


@pytest.mark.parametrize("normalisation", grpo.NORMALISATIONS)
def test_cutting_a_batch_into_micro_batches_changes_neither_loss_nor_gradient(normalisation):
    lengths = [[6, 3], [1, 5]]
    config = grpo.GrpoConfig(
        normalisation=normalisation, constant_length=9, off_policy_delta=0.2, kl_coefficient=0.5
    )
    weight_BT = np.zeros((4, 6))
    flat = [w for group in grpo.token_weights(lengths, config) for w in group]
    for row, (length, weight) in enumerate(zip([6, 3, 1, 5], flat, strict=True)):
        weight_BT[row, :length] = weight
    made = random_batch() | dict(weight_BT=jnp.asarray(weight_BT, jnp.float32))
    loss, gradient_BT = loss_and_gradient(config, made)
    for cuts in ((0, 2, 4), (0, 1, 2, 3, 4)):
        parts = [
            loss_and_gradient(config, {k: v[a:b] for k, v in made.items()})
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        assert float(sum(p[0] for p in parts)) == pytest.approx(float(loss), rel=1e-5)
        np.testing.assert_allclose(
            np.concatenate([p[1] for p in parts]), gradient_BT, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(advantage="median"), "'median': must be one of .*mean_std"),
        (dict(normalisation="tokens"), "'tokens': must be one of .*sequence"),
        (dict(clip_low=1.0), r"clip_low = 1.0.*lies in \(0, 1\)"),
        (dict(clip_high=0.0), "clip_high = 0.0.*above 0"),
        (dict(kl_coefficient=-0.1), "kl_coefficient = -0.1: must not be negative"),
        (dict(entropy_coefficient=-0.1), "entropy_coefficient = -0.1: must not be negative"),
        (dict(off_policy_delta=-1.0), "off_policy_delta = -1.0: must not be negative"),
        (dict(constant_length=0), "constant_length = 0: must be positive"),
    ],
)
def test_a_bad_setting_is_named_with_its_rule(fields, message):
    with pytest.raises(ValueError, match=message):
        grpo.GrpoConfig(**fields)
