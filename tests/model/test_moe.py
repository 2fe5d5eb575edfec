import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import grouped, moe

NUM_EXPERTS, WIDTH, HIDDEN, TOKENS, PER_TOKEN = 6, 5, 4, 16, 2
FORMS = {
    "sorted blocks of 64": grouped.sorted_blocks,
    "sorted blocks of 4": functools.partial(grouped.sorted_blocks, block=4),
    "ragged": grouped.ragged,
    "megablox": functools.partial(grouped.megablox, interpret=True),
    "megablox, 12 rows a step": functools.partial(grouped.megablox, most=(12, 4), interpret=True),
}
# With blocks of 4: groups that end on a block's edge, one past it, empty ones, all in one.
LOADS = {
    "balanced": np.arange(32).reshape(16, 2) % 6,
    "two experts take all": np.tile([5, 2], (16, 1)),
    "one takes half": np.stack([np.zeros(16, int), 1 + np.arange(16) % 2], axis=1),
    "edges": np.sort(np.repeat([1, 3, 4], [8, 12, 12])).reshape(2, 16).T,
    "last alone": np.array([[4, 5]] + [[0, 1]] * 15),
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def expert_weights() -> grouped.ExpertWeights:
    return grouped.ExpertWeights(
        draw(1, NUM_EXPERTS, WIDTH, HIDDEN),
        draw(2, NUM_EXPERTS, WIDTH, HIDDEN),
        draw(3, NUM_EXPERTS, HIDDEN, WIDTH),
    )


def silu(x):
    return x / (1 + np.exp(-x))


def one_by_one(x_ND, ids_NA, weights_NA, experts):
    """A loop over tokens and their experts, in float64."""
    gate, up, down = (np.asarray(w, np.float64) for w in experts)
    out = np.zeros(x_ND.shape)
    for n, x in enumerate(np.asarray(x_ND, np.float64)):
        for e, weight in zip(np.asarray(ids_NA[n]), np.asarray(weights_NA[n]), strict=True):
            out[n] += weight * ((silu(x @ gate[e]) * (x @ up[e])) @ down[e])
    return out


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    """One grouped product and its gradients, compiled once for all loads."""

    def both(grouped, x_ND, ids_NA, weights_NA, experts, mix_ND):
        def total(x_ND, weights_NA, experts):
            out_ND = grouped(x_ND, ids_NA, weights_NA, experts)
            return jnp.sum(out_ND * mix_ND), out_ND

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(x_ND, weights_NA, experts)

    return tuple(
        jax.jit(functools.partial(both, f)) for f in (FORMS[request.param], grouped.every_expert)
    )


@pytest.mark.parametrize("load", LOADS)
def test_grouped_products_and_their_gradients_equal_every_expert(form, load):
    grouped, reference = form
    ids_NA = jnp.asarray(LOADS[load], jnp.int32)
    args = (draw(0, TOKENS, WIDTH), ids_NA, draw(4, TOKENS, PER_TOKEN), expert_weights())
    mix_ND = draw(5, TOKENS, WIDTH)
    # JAX's kernels for TPUs rely on its usual promotion of types.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        grads, out_ND = grouped(*args, mix_ND)
    wanted_grads, wanted_ND = reference(*args, mix_ND)
    np.testing.assert_allclose(out_ND, wanted_ND, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out_ND, one_by_one(*args), rtol=1e-4, atol=1e-4)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("groups", "kept_groups"), [(1, 1), (2, 1), (4, 2), (4, 3), (8, 5)])
def test_experts_are_the_best_of_the_best_groups(full, groups, kept_groups):
    config = dataclasses.replace(
        full.config,
        num_experts=8,
        num_expert_groups=groups,
        expert_groups_per_token=kept_groups,
        experts_per_token=2,
    )
    score_NE, bias_E = jax.nn.sigmoid(draw(6, 40, 8)), 0.3 * draw(7, 8) - 1  # some below zero
    got = np.asarray(moe.choose_experts(score_NE, bias_E, config))
    size = 8 // groups
    for n, row in enumerate(np.asarray(score_NE) + np.asarray(bias_E)):
        by_group = [row[g * size : (g + 1) * size] for g in range(groups)]
        strength = [sum(sorted(part, reverse=True)[:2]) for part in by_group]
        best = sorted(range(groups), key=lambda g: -strength[g])[:kept_groups]
        open_to = [e for e in range(8) if e // size in best]
        assert got[n].tolist() == sorted(open_to, key=lambda e: -row[e])[:2]


def slow_balance(score_TE, per_token):
    """The loss of one sequence, from the report's equations 17 to 20 with alpha 1."""
    length, num_experts = score_TE.shape
    f, p = np.zeros(num_experts), np.zeros(num_experts)
    for row in score_TE:
        f[np.argsort(-row)[:per_token]] += num_experts / (per_token * length)
        p += row / row.sum() / length
    return float(f @ p)


def test_the_balance_loss_is_that_of_each_sequence_weighed_by_its_length():
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]])
    score_BTE = jax.nn.sigmoid(draw(12, 2, 8, 6))
    got = moe.balance_loss(score_BTE, jnp.asarray(segments), 2)
    wanted = 0.0
    for b, segment in ((0, 1), (0, 2), (0, 3), (1, 1)):
        part_TE = np.asarray(score_BTE, np.float64)[b, segments[b] == segment]
        wanted += len(part_TE) * slow_balance(part_TE, 2)
    assert float(got) == pytest.approx(wanted, rel=1e-5)


def test_an_even_load_costs_one_a_token_and_a_lopsided_one_more():
    segments_BT = jnp.ones((1, 6), jnp.int32)
    even_BTE = jnp.eye(6)[None] * 0.8 + 0.1
    assert float(moe.balance_loss(even_BTE, segments_BT, 1)) == pytest.approx(6.0, rel=1e-5)
    lopsided_BTE = jnp.tile(even_BTE[:, :1], (1, 6, 1))
    # f is 6 and P 0.9 / 1.4 at the one expert that all choose.
    assert float(moe.balance_loss(lopsided_BTE, segments_BT, 1)) == pytest.approx(6 * 6 * 0.9 / 1.4)


def test_the_balance_losss_gradient_is_its_slope_where_no_choice_changes():
    segments_BT = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]])
    logit_BTE = draw(13, 1, 8, 6)

    def loss(logit_BTE):
        return moe.balance_loss(jax.nn.sigmoid(logit_BTE), segments_BT, 2)

    slope_BTE = jax.grad(loss)(logit_BTE)
    way_BTE = jnp.sign(slope_BTE) * jnp.abs(draw(14, 1, 8, 6))
    ahead, behind = (float(loss(logit_BTE + s * way_BTE)) for s in (2e-3, -2e-3))
    wanted = float(jnp.vdot(slope_BTE, way_BTE))
    assert (ahead - behind) / 4e-3 == pytest.approx(wanted, rel=1e-2) and abs(wanted) > 0.1
    assert not np.asarray(slope_BTE[0, 7]).any()


# The whole sparse feed-forward.


@pytest.fixture(scope="module")
def sparse(full):
    """One sparse layer of the full model: (config, its variables, compiled application)."""
    params = full.variables["params"]["sparse"]["mlp"]
    variables = {"params": params, "router": full.variables["router"]["sparse"]["mlp"]}
    module = moe.SparseMlp(full.config, grouped.sorted_blocks)
    return full.config, jax.tree.map(lambda x: x[0], variables), jax.jit(module.apply)


def inputs(config, dtype=jnp.float32):
    return draw(8, 2, 5, config.width).astype(dtype), jnp.ones((2, 5), bool)


def with_bias(variables, bias_E):
    return {**variables, "router": {"bias": jnp.asarray(bias_E, jnp.float32)}}


def by_hand(config, variables, x_BTD, ids_BTA):
    """The layer's output for experts chosen already, from the equations."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x_ND, ids_NA = np.asarray(x_BTD, np.float64).reshape(-1, config.width), np.asarray(ids_BTA)
    ids_NA = ids_NA.reshape(len(x_ND), -1)
    score_NE = 1 / (1 + np.exp(-x_ND @ p["router"]))
    picked_NA = np.take_along_axis(score_NE, ids_NA, 1)
    weights_NA = config.routed_scaling * picked_NA / picked_NA.sum(1, keepdims=True)
    experts = (p["experts_gate"], p["experts_up"], p["experts_down"])
    shared = p["shared"]
    out = (silu(x_ND @ shared["gate"]) * (x_ND @ shared["up"])) @ shared["down"]
    return (out + one_by_one(x_ND, ids_NA, weights_NA, experts)).reshape(x_BTD.shape)


def test_router_bias_changes_who_is_chosen_and_not_what_they_weigh(sparse):
    config, variables, apply = sparse
    x_BTD, real_BT = inputs(config)
    chosen = []
    for bias_E in ([0.0] * 6, [0, 0, 0, 9, 0, 9], [9, 0, 9, 0, 0, 0]):
        out_BTD, routing = apply(with_bias(variables, bias_E), x_BTD, real_BT, None)
        expected = by_hand(config, variables, x_BTD, routing.experts_BTA)
        np.testing.assert_allclose(out_BTD, expected, rtol=1e-4, atol=1e-4)
        chosen.append(np.sort(np.asarray(routing.experts_BTA).reshape(-1, 2)))
    assert (chosen[1] == [3, 5]).all() and (chosen[2] == [0, 2]).all()
    assert len(np.unique(chosen[0])) > 2


def test_kept_routing_is_replayed_whatever_the_router_would_choose(sparse):
    config, variables, apply = sparse
    x_BTD, real_BT = inputs(config)
    live_BTD, live = apply(variables, x_BTD, real_BT, None)
    other = with_bias(variables, [0, 9, 0, 0, 9, 0])
    replayed_BTD, replayed = apply(other, x_BTD, real_BT, live.experts_BTA)
    np.testing.assert_array_equal(replayed.experts_BTA, live.experts_BTA)
    np.testing.assert_allclose(replayed_BTD, live_BTD, rtol=1e-6, atol=1e-6)


def test_the_live_choice_stands_where_nothing_was_kept(sparse):
    config, variables, apply = sparse
    x_BTD, real_BT = inputs(config)
    _, live = apply(variables, x_BTD, real_BT, None)
    kept_BTA = jnp.full((2, 5, 2), -1, jnp.int32).at[0, 1:3].set(jnp.asarray([0, 5]))
    out_BTD, mixed = apply(variables, x_BTD, real_BT, kept_BTA)
    np.testing.assert_array_equal(mixed.experts_BTA[0, 1:3], [[0, 5]] * 2)
    untouched = np.asarray(kept_BTA) < 0
    np.testing.assert_array_equal(
        np.asarray(mixed.experts_BTA)[untouched], np.asarray(live.experts_BTA)[untouched]
    )
    expected = by_hand(config, variables, x_BTD, mixed.experts_BTA)
    np.testing.assert_allclose(out_BTD, expected, rtol=1e-4, atol=1e-4)


def test_expert_weights_are_raw_scores_where_the_config_says_so(sparse):
    config, variables, _ = sparse
    raw = dataclasses.replace(config, normalize_expert_weights=False, num_shared_experts=0)
    x_BTD, real_BT = inputs(config)
    module = moe.SparseMlp(raw, grouped.every_expert)
    got_BTD, routing = module.apply(variables, x_BTD, real_BT, None)
    p, x_ND = variables["params"], x_BTD.reshape(10, -1)
    score_NE = 1 / (1 + np.exp(-np.asarray(x_ND, np.float64) @ np.asarray(p["router"])))
    ids_NA = np.asarray(routing.experts_BTA).reshape(10, 2)
    weight_NA = config.routed_scaling * np.take_along_axis(score_NE, ids_NA, 1)
    experts = grouped.ExpertWeights(p["experts_gate"], p["experts_up"], p["experts_down"])
    wanted_ND = one_by_one(x_ND, ids_NA, weight_NA, experts)
    np.testing.assert_allclose(got_BTD.reshape(10, -1), wanted_ND, rtol=1e-4, atol=1e-4)


def test_the_gate_learns_from_the_live_scores_of_kept_experts(sparse):
    """The router's gradient equals that of the weights' formula, the bias has none."""
    config, variables, apply = sparse
    x_BTD, real_BT = inputs(config)
    orders = np.random.default_rng(9).permuted(np.tile(np.arange(6), (10, 1)), axis=1)
    kept_BTA = jnp.asarray(orders[:, :2].reshape(2, 5, 2))
    mix_BTD = draw(10, *x_BTD.shape)

    def total(variables):
        return jnp.sum(apply(variables, x_BTD, real_BT, kept_BTA)[0] * mix_BTD)

    got: Any = jax.grad(total)(variables)
    assert not np.asarray(got["router"]["bias"]).any()

    p = variables["params"]
    x_ND, ids_NA = x_BTD.reshape(10, -1), kept_BTA.reshape(10, 2)
    experts = grouped.ExpertWeights(p["experts_gate"], p["experts_up"], p["experts_down"])
    out_NAD = np.stack(
        [one_by_one(x_ND, ids_NA[:, a : a + 1], np.ones((10, 1)), experts) for a in range(2)], 1
    )
    # d out / d weight is the expert's own output; the weights are s_a / (s_0 + s_1).
    slope_NA = np.einsum("NAD,ND->NA", out_NAD, np.asarray(mix_BTD).reshape(10, -1))
    score_NE = 1 / (1 + np.exp(-np.asarray(x_ND, np.float64) @ np.asarray(p["router"])))
    s_NA = np.take_along_axis(score_NE, np.asarray(ids_NA), 1)
    into_first = config.routed_scaling * (slope_NA[:, 0] - slope_NA[:, 1]) / s_NA.sum(1) ** 2
    into_score_NA = np.stack([into_first * s_NA[:, 1], -into_first * s_NA[:, 0]], 1)
    into_logit_NA = into_score_NA * s_NA * (1 - s_NA)
    expected = np.zeros(p["router"].shape)
    for n in range(10):
        for a in range(2):
            expected[:, ids_NA[n, a]] += np.asarray(x_ND[n]) * into_logit_NA[n, a]
    np.testing.assert_allclose(got["params"]["router"], expected, rtol=1e-3, atol=1e-4)
    assert (np.abs(expected).max(axis=0) > 1e-2).all()


def test_the_layers_balance_loss_reads_its_raw_scores_and_trains_the_router(sparse):
    """Also where experts are replayed and biased: the loss is about what the scores say."""
    config, variables, apply = sparse
    x_BTD, real_BT = inputs(config)
    segments_BT = jnp.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
    kept_BTA = jnp.zeros((2, 5, 2), jnp.int32)

    def loss(params):
        changed = {**variables, "params": params}
        return apply(changed, x_BTD, segments_BT > 0, kept_BTA, segments_BT)[1].balance

    score_BTE = jax.nn.sigmoid(x_BTD @ variables["params"]["router"])
    got, slope = jax.value_and_grad(loss)(variables["params"])
    wanted = moe.balance_loss(score_BTE, segments_BT, config.experts_per_token)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    assert np.asarray(slope.pop("router")).any()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(slope))
    assert apply(variables, x_BTD, real_BT, None)[1].balance is None


def test_load_counts_the_experts_of_real_tokens_only(sparse):
    config, variables, apply = sparse
    x_BTD, _ = inputs(config)
    real_BT = jnp.asarray([[True] * 5, [True, False, True, False, False]])
    _, routing = apply(variables, x_BTD, real_BT, None)
    ids = np.asarray(routing.experts_BTA)[np.asarray(real_BT)]
    np.testing.assert_array_equal(routing.load_E, np.bincount(ids.ravel(), minlength=6))
    assert float(routing.load_E.sum()) == 7 * config.experts_per_token


def test_the_router_is_float32_where_the_stream_is_bfloat16(sparse):
    """Two gates that differ by less than bfloat16 can say are still told apart."""
    config, variables, apply = sparse
    x_BTD, real_BT = inputs(config, jnp.bfloat16)
    router_DE = jnp.tile(variables["params"]["router"][:, :1], (1, 6))
    sign_D = jnp.sign(router_DE[:, 0])
    ahead = 1e-4 * jnp.arange(6, dtype=jnp.float32)
    router_DE = router_DE * (1 + ahead[None, :])
    variables = {"params": {**variables["params"], "router": router_DE}}
    variables = with_bias(variables, [0.0] * 6)
    x_BTD = jnp.abs(x_BTD) * sign_D.astype(jnp.bfloat16)[None, None, :]  # all scores positive
    out_BTD, routing = apply(variables, x_BTD, real_BT, None)
    assert out_BTD.dtype == jnp.bfloat16
    assert (np.asarray(routing.experts_BTA) == [5, 4]).all()


def test_each_bias_moves_one_step_against_its_load():
    bias_LE = jnp.asarray([[0.5, -0.25, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    load_LE = jnp.asarray([[10.0, 2.0, 6.0, 6.0], [3.0, 3.0, 3.0, 3.0]])
    got = moe.updated_bias(bias_LE, load_LE, 0.125)
    assert got.tolist() == [[0.375, -0.125, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_bias_steps_even_out_the_load_of_a_lopsided_router(sparse):
    config, variables, _ = sparse
    scores_NE = jax.nn.sigmoid(draw(11, 200, 6) + jnp.asarray([[3.0, 2, 0, 0, -2, -3]]))
    flat = dataclasses.replace(config, num_expert_groups=1, expert_groups_per_token=1)

    def load(bias_1E):
        ids = moe.choose_experts(scores_NE, bias_1E[0], flat)
        return jnp.bincount(ids.reshape(-1), length=6).astype(jnp.float32)[None]

    def step(_, bias_1E):
        return moe.updated_bias(bias_1E, load(bias_1E), 0.01)

    start_1E = jnp.zeros((1, 6))
    before = np.asarray(load(start_1E))
    after = np.asarray(load(jax.lax.fori_loop(0, 200, step, start_1E)))
    assert before.max() > 180 and before.min() < 5
    assert np.abs(after - 400 / 6).max() < 20
