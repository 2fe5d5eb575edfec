import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import attention as attention_lib
from mathv2_jax.model import cache, dsa, mla, rope, transformer

LENGTH = 9
SEGMENTS = [[1, 1, 1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2]]
PREFIXES = [[1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2]]
POSITIONS = [[0, 1, 2, 3, 4, 5, 4, 5, 0], [0, 1, 2, 3, 4, 5, 0, 1, 2]]


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layout():
    return cache.Layout(*(jnp.asarray(x, jnp.int32) for x in (POSITIONS, SEGMENTS, PREFIXES)))


@pytest.fixture(scope="module")
def attention(sparse_model):
    """The first sparse layer's attention: (config, params, inputs)."""
    params = jax.tree.map(lambda x: x[0], sparse_model.variables["params"]["sparse"]["attention"])
    return sparse_model.config, params, draw(0, 2, LENGTH, sparse_model.config.width)


def expanded(config, params, x_BTD, align="off", attend=attention_lib.attend_densely):
    module = mla.LatentAttention(config, attend, align)
    run = jax.jit(functools.partial(module.apply, method="expanded"))
    return run({"params": params}, x_BTD, layout())


def turned(x_NTW, config):
    """The first channels in half-split pairs, the rest as they are; positions of the layout."""
    r, by = config.head_rope_width, rope.rotation(config)
    pairs = x_NTW[..., : r // 2] + 1j * x_NTW[..., r // 2 : r]
    angle = np.asarray(POSITIONS)[..., None] * np.asarray(by.frequency_r, np.float64)
    angle = angle.reshape(2, LENGTH, *(1,) * (x_NTW.ndim - 3), -1)
    pairs = pairs * np.exp(1j * angle) * by.magnitude
    return np.concatenate([pairs.real, pairs.imag, x_NTW[..., r:]], axis=-1)


def slow_scores(config, params, x_BTD):
    """Index scores from their equations, in float64, head by head."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x, i = np.asarray(x_BTD, np.float64), p["indexer"]
    latent = x @ p["q_a"]
    latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True) + 1e-6) * p["q_a_norm"]["scale"]
    key = x @ i["k"]
    key = (key - key.mean(-1, keepdims=True)) / np.sqrt(key.var(-1, keepdims=True) + 1e-6)
    key = turned(key * i["k_norm"]["scale"] + i["k_norm"]["bias"], config)
    total = np.zeros((2, LENGTH, LENGTH))
    for j in range(config.index_heads):
        query = turned(latent @ i["q_b"][:, j], config)
        hit = np.maximum(query @ key.swapaxes(1, 2) / np.sqrt(config.index_head_width), 0)
        total += (x @ i["weights"][:, j])[..., None] / np.sqrt(config.index_heads) * hit
    return total


def slow_selection(score_BTS, topk):
    """Per token the best of those it sees, one by one."""
    seen_BTS = np.asarray(cache.visible(layout()))
    kept_BTS = np.zeros_like(seen_BTS)
    for b, t in np.ndindex(2, LENGTH):
        seen = [s for s in range(LENGTH) if seen_BTS[b, t, s]]
        kept_BTS[b, t, sorted(seen, key=lambda s: -score_BTS[b, t, s])[:topk]] = True
    return kept_BTS


def softmax(score, kept):
    weight = np.where(
        kept, np.exp(score - np.where(kept, score, -np.inf).max(-1, keepdims=True)), 0
    )
    return weight / weight.sum(-1, keepdims=True)


def test_scores_follow_their_equations(attention):
    config, params, x_BTD = attention
    module = mla.LatentAttention(config, attention_lib.attend_densely)

    def score(module, x_BTD):
        q_in_BTQ = module._query_input(x_BTD)
        queries = module.indexer.queries(x_BTD, q_in_BTQ, layout().positions_BT)
        return dsa.scores(queries, module.indexer.keys(x_BTD, layout().positions_BT))

    got = module.apply({"params": params}, x_BTD, method=score)
    np.testing.assert_allclose(got, slow_scores(config, params, x_BTD), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("topk", [1, 2, 4, 8])
def test_selection_is_the_best_of_the_visible_and_the_earlier_at_a_tie(topk):
    score_BTS = np.round(np.asarray(draw(1, 2, LENGTH, LENGTH)))  # of few values: many ties
    seen_BTS = cache.visible(layout())
    got = np.asarray(dsa.select(jnp.asarray(score_BTS), seen_BTS, topk))
    np.testing.assert_array_equal(got, slow_selection(score_BTS, topk))
    assert (got.sum(-1) == np.minimum(topk, np.asarray(seen_BTS).sum(-1))).all()


@pytest.mark.parametrize(("topk", "length"), [(3, 9), (9, 9), (20, 9), (5, 300), (200, 300)])
def test_places_are_those_of_the_selection(topk, length):
    """More tokens than a group of 128 has, none at all in some rows, and many ties."""
    rng = np.random.default_rng(3)
    score_BTS = jnp.asarray(np.round(rng.standard_normal((2, 7, length))), jnp.float32)
    seen_BTS = rng.random((2, 7, length)) < np.linspace(0, 1, 7)[None, :, None]
    places, count = dsa.pick(score_BTS, jnp.asarray(seen_BTS), topk)
    chosen = np.asarray(dsa.select(score_BTS, jnp.asarray(seen_BTS), topk))
    assert places.shape == (2, 7, min(topk, length))
    assert (np.asarray(places) < length).all()
    for b, t in np.ndindex(2, 7):
        found = np.asarray(places)[b, t, : int(count[b, t, 0])]
        np.testing.assert_array_equal(found, np.flatnonzero(chosen[b, t]))


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_the_nth_largest_is_found_to_the_bit(n):
    x_BTS = np.asarray(draw(9, 3, 5, 20)) * np.float32(10.0) ** np.arange(-22, 23, 3)[:15].reshape(
        3, 5, 1
    ).astype(np.float32)
    x_BTS[0, 0, 4:9] = [0.0, -0.0, np.inf, -np.inf, 1e-42]
    x_BTS[1, 1] = -np.inf
    found = dsa.nth_largest(jnp.asarray(x_BTS), n)
    np.testing.assert_array_equal(found, np.sort(x_BTS, axis=-1)[..., ::-1][..., n - 1 : n])


@pytest.mark.parametrize("topk", [1, 3, 5])
def test_attention_is_dense_attention_over_the_selected(attention, topk):
    config, params, x_BTD = attention
    kept_BTS = jnp.asarray(slow_selection(slow_scores(config, params, x_BTD), topk))

    def attend(q, k, v, layout, scale, index):
        assert index is None
        return attention_lib.mixed(q, k, v, kept_BTS, scale), None

    without = dataclasses.replace(config, index_topk=0, index_heads=0, index_head_width=0)
    wanted_BTD, _ = expanded(without, params, x_BTD, attend=attend)
    got_BTD, _ = expanded(dataclasses.replace(config, index_topk=topk), params, x_BTD)
    np.testing.assert_allclose(got_BTD, wanted_BTD, rtol=1e-5, atol=1e-6)
    dense_BTD, _ = expanded(without, params, x_BTD)
    assert np.abs(got_BTD - dense_BTD).max() > 0.01


def test_a_selection_that_holds_the_whole_row_is_dense_attention_to_the_bit(sparse_model):
    tokens_BT = jnp.asarray(np.random.default_rng(2).integers(0, 40, (2, 6)))
    wide = dataclasses.replace(sparse_model.config, index_topk=6)
    without = dataclasses.replace(wide, index_topk=0, index_heads=0, index_head_width=0)
    one, other, narrow = (
        jax.jit(functools.partial(transformer.forward, c))(sparse_model.variables, tokens_BT)
        for c in (wide, without, dataclasses.replace(wide, index_topk=5))
    )
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one[:, :5], narrow[:, :5], rtol=1e-3, atol=1e-5)
    assert np.abs(one - narrow)[:, 5].max() > 1e-3


# What the indexer learns from.


@pytest.mark.parametrize("align", ["dense", "sparse"])
def test_alignment_is_the_divergence_from_attention_summed_over_heads(attention, align):
    config, params, x_BTD = attention
    seen_BTS = np.asarray(cache.visible(layout()))
    score_BTS = slow_scores(config, params, x_BTD)
    kept_BTS = seen_BTS if align == "dense" else slow_selection(score_BTS, config.index_topk)
    asked = []

    def attend(q, k, v, layout, scale, index):
        assert index.align and (index.topk == 0) == (align == "dense")
        asked.append((np.asarray(q, np.float64), np.asarray(k, np.float64), scale))
        return attention_lib.attend_densely(q, k, v, layout, scale, index)

    module = mla.LatentAttention(config, attend, align)
    _, got = module.apply({"params": params}, x_BTD, layout(), method="expanded")
    ((q, k, scale),) = asked
    p_BTS = np.zeros(kept_BTS.shape)
    for h in range(config.num_heads):
        p_BTS += softmax(q[:, :, h] @ k[:, :, h].swapaxes(1, 2) * scale, kept_BTS)
    p_BTS /= p_BTS.sum(-1, keepdims=True)
    q_BTS = softmax(score_BTS, kept_BTS)
    each_BTS = p_BTS * np.log(np.where(kept_BTS, p_BTS, 1) / np.where(kept_BTS, q_BTS, 1))
    wanted = each_BTS.sum(-1)[np.asarray(SEGMENTS) > 0].sum()
    assert float(got) == pytest.approx(wanted, rel=1e-4) and wanted > 0.5


@pytest.mark.parametrize("align", ["dense", "sparse"])
def test_the_alignment_trains_the_indexer_alone_and_nothing_else_does(attention, align):
    config, params, x_BTD = attention

    @functools.partial(jax.jit, static_argnums=2)
    def slopes(params, x_BTD, which):
        def loss(params, x_BTD):
            out_BTD, aligned = expanded(config, params, x_BTD, align)
            return aligned if which == "alignment" else jnp.sum(out_BTD**2)

        return jax.grad(loss, argnums=(0, 1))(params, x_BTD)

    of_params, of_x = slopes(params, x_BTD, "alignment")
    of_indexer = of_params.pop("indexer")
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((of_params, of_x)))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(of_indexer))
    of_params, _ = slopes(params, x_BTD, "output")
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(of_params.pop("indexer")))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(of_params))


@pytest.mark.parametrize("align", ["dense", "sparse"])
def test_the_alignments_gradient_is_its_slope(attention, align):
    """Along random directions, by central differences too small to pass a corner of relu."""
    config, params, x_BTD = attention

    @jax.jit
    def loss(indexer):
        return expanded(config, {**params, "indexer": indexer}, x_BTD, align)[1]

    gradient = jax.grad(loss)(params["indexer"])
    for seed in range(3):
        rng = np.random.default_rng(seed)
        way = jax.tree.map(
            lambda x, rng=rng: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), gradient
        )
        ahead, behind = (
            float(loss(jax.tree.map(lambda x, d, s=s: x + s * d, params["indexer"], way)))
            for s in (2e-4, -2e-4)
        )
        wanted = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, way)))
        assert (ahead - behind) / 4e-4 == pytest.approx(float(wanted), rel=0.02, abs=0.03)


def test_warm_up_brings_the_indexer_to_attentions_favourites(attention):
    """Fifty plain steps on fixed inputs: divergence falls, the best tokens become the selected."""
    config, params, x_BTD = attention

    @jax.jit
    def step(indexer):
        def loss(indexer):
            return expanded(config, {**params, "indexer": indexer}, x_BTD, "dense")[1]

        value, slope = jax.value_and_grad(loss)(indexer)
        return value, jax.tree.map(lambda x, g: x - 0.02 * g, indexer, slope)

    indexer, values = params["indexer"], []
    for _ in range(50):
        value, indexer = step(indexer)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]
