import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import config as model_config
from mathv2_jax.model import transformer
from mathv2_jax.rl import optimizer as optimizer_lib

CONFIG = optimizer_lib.OptimizerConfig(
    learning_rate=1e-3, warmup_steps=4, final_share=0.1, weight_decay=0.5, epsilon=1e-2
)
MODEL = model_config.ModelConfig(
    vocab_size=8,
    width=4,
    num_layers=2,
    num_heads=1,
    kv_latent_width=4,
    head_key_width=4,
    head_rope_width=2,
    head_value_width=4,
    dense_width=4,
    expert_width=4,
    num_experts=2,
    experts_per_token=1,
    embedding_taps=1,
)


def parameters(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "norm": {"scale": jnp.asarray(draw.normal(size=3), jnp.float32)},
        "matrix": jnp.asarray(draw.normal(size=(3, 2)), jnp.float32),
        "verifier_head_kernel": jnp.asarray(draw.normal(size=(3, 3)), jnp.float32),
    }


def directions(config, gradients, params):
    """What each of a sequence of gradients makes of the optimizer, at unchanging parameters."""
    optimizer = optimizer_lib.make_optimizer(config)
    state, found = optimizer.init(params), []
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            direction, state = optimizer.update(gradient, state, params)
            found.append(direction)
    return found


def scaled(tree, factor):
    return jax.tree.map(lambda x: factor * x, tree)


def test_the_rate_climbs_in_equal_steps_and_reaches_its_peak_at_the_warm_ups_end():
    rates = [optimizer_lib.learning_rate(CONFIG, step, 20) for step in range(5)]
    np.testing.assert_allclose(rates, [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_after_the_warm_up_the_rate_falls_along_half_a_cosine_to_its_final_share():
    for step in range(4, 21):
        cosine = (1.0 + math.cos(math.pi * (step - 4) / 16)) / 2.0
        expected = 1e-3 * (0.1 + 0.9 * cosine)
        assert optimizer_lib.learning_rate(CONFIG, step, 20) == pytest.approx(expected)
    assert optimizer_lib.learning_rate(CONFIG, 12, 20) == pytest.approx(0.55e-3)
    assert optimizer_lib.learning_rate(CONFIG, 99, 20) == pytest.approx(0.1e-3)


def test_a_final_share_of_one_holds_the_rate():
    config = optimizer_lib.OptimizerConfig(learning_rate=2e-3, warmup_steps=0)
    assert {optimizer_lib.learning_rate(config, step, 30) for step in range(30)} == {2e-3}


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_run_shorter_than_the_warm_up_still_reaches_its_peak(num_steps):
    rates = [optimizer_lib.learning_rate(CONFIG, step, num_steps) for step in range(num_steps)]
    assert max(rates) == rates[-1] == pytest.approx(1e-3)


def test_two_steps_are_adams_with_clipped_gradients_and_decoupled_decay():
    params, gradient = parameters(), parameters(1)
    first, second = directions(CONFIG, [scaled(gradient, 100.0), scaled(gradient, 0.01)], params)
    trunk = {name: gradient[name] for name in ("norm", "matrix")}
    norm = math.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(trunk)))
    for place, decay in ((("norm", "scale"), 0.0), (("matrix",), 0.5)):
        g, p, one, two = gradient, params, first, second
        for key in place:
            g, p, one, two = g[key], p[key], one[key], two[key]
        g1, g2 = np.asarray(g) / norm, 0.01 * np.asarray(g)  # clipped to norm 1; below it
        expected = g1 / (np.abs(g1) + 1e-2) + decay * np.asarray(p)
        np.testing.assert_allclose(one, expected, rtol=1e-4)
        mean = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
        square = (0.95 * 0.05 * g1**2 + 0.05 * g2**2) / (1 - 0.95**2)
        expected = mean / (np.sqrt(square) + 1e-2) + decay * np.asarray(p)
        np.testing.assert_allclose(two, expected, rtol=1e-4)


def test_without_a_gradient_every_matrix_of_a_model_decays_and_no_norm_or_bias_does():
    abstract = transformer.unboxed(transformer.boxed_abstract(MODEL))["params"]
    params = jax.tree.map(lambda _: jnp.ones(2), abstract)  # what decays is a matter of names
    (direction,) = directions(CONFIG, [jax.tree.map(jnp.zeros_like, params)], params)
    kinds = set()
    for (path, moved), p in zip(
        jax.tree.leaves_with_path(direction), jax.tree.leaves(params), strict=True
    ):
        matrix = path[-1].key not in ("scale", "bias") and path[0].key[:8] != "verifier"
        kinds.add(matrix)
        np.testing.assert_allclose(moved, 0.5 * p if matrix else np.zeros(p.shape), err_msg=path)
    assert kinds == {True, False}


def test_a_bias_in_the_trunk_does_not_decay():
    params = {"norm": {"bias": jnp.ones(3), "scale": jnp.ones(3)}, "matrix": jnp.ones((2, 2))}
    (direction,) = directions(CONFIG, [jax.tree.map(jnp.zeros_like, params)], params)
    np.testing.assert_array_equal(direction["norm"]["bias"], np.zeros(3))


def test_the_verifier_heads_gradient_does_not_touch_the_trunks_clipping_nor_the_reverse():
    params, gradient = parameters(), scaled(parameters(1), 0.1)
    head = {"verifier_head_kernel": gradient["verifier_head_kernel"]}
    (alone,) = directions(CONFIG, [gradient], params)
    (large_head,) = directions(CONFIG, [gradient | scaled(head, 1e4)], params)
    (large_trunk,) = directions(CONFIG, [scaled(gradient, 1e4) | head], params)
    for name, small, other in (
        ("norm", alone, large_head),
        ("matrix", alone, large_head),
        ("verifier_head_kernel", alone, large_trunk),
    ):
        chex.assert_trees_all_equal(small[name], other[name])
    assert not np.allclose(alone["matrix"], large_trunk["matrix"])


def test_the_verifier_head_is_clipped_on_its_own():
    params, gradient = parameters(), parameters(1)
    head = "verifier_head_kernel"
    g = 1e4 * np.asarray(gradient[head])
    (direction,) = directions(CONFIG, [gradient | {head: jnp.asarray(g)}], params)
    clipped = g / np.linalg.norm(g)
    np.testing.assert_allclose(direction[head], clipped / (np.abs(clipped) + 1e-2), rtol=1e-4)


def test_without_a_gradient_the_verifier_head_stays_where_it_is():
    params, gradient = parameters(), parameters(1)
    head = "verifier_head_kernel"
    still = gradient | {head: jnp.zeros((3, 3))}
    for direction in directions(CONFIG, [still, still, still], params):
        np.testing.assert_array_equal(direction[head], np.zeros((3, 3)))
        assert bool(jnp.all(direction["matrix"] != 0.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(learning_rate=float("inf")), "learning_rate = inf.*the rate finite"),
        (dict(learning_rate=0.0), "learning_rate = 0.0.*must be positive"),
        (dict(clip_norm=-1.0), "clip_norm = -1.0: both must be positive"),
        (dict(warmup_steps=-1), "warmup_steps = -1 must not be negative"),
        (dict(final_share=1.5), r"final_share = 1.5 must lie in 0..1"),
        (dict(weight_decay=-0.1), "weight_decay = -0.1 must not be negative"),
        (dict(epsilon=0.0), "epsilon = 0.0 must be positive"),
        (dict(beta2=1.0), r"beta2 = 1.0: each must lie in \[0, 1\)"),
    ],
)
def test_a_bad_setting_is_named_with_its_rule(fields, message):
    with pytest.raises(ValueError, match=message):
        optimizer_lib.OptimizerConfig(**(dict(learning_rate=1e-3) | fields))


def test_moments_in_bfloat16_take_half_the_room_and_point_nearly_the_same_way():
    config = optimizer_lib.OptimizerConfig(learning_rate=1e-3)
    half = dataclasses.replace(config, moments="bfloat16")
    params = parameters()
    gradients = [parameters(seed) for seed in range(1, 6)]
    state = optimizer_lib.make_optimizer(half).init(params)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    exact, rounded = (directions(c, gradients, params)[-1] for c in (config, half))
    chex.assert_trees_all_close(rounded, exact, rtol=0.05, atol=0.02)
    far = [
        float(jnp.abs(a - b).max())
        for a, b in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True)
    ]
    assert max(far) > 1e-5  # it is rounded


def test_moments_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="moments = 'float8'"):
        optimizer_lib.OptimizerConfig(learning_rate=1e-3, moments="float8")
