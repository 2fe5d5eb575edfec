import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import block, cache, layers, mtp, transformer

LENGTH = 10
ON, DETACHED = (transformer.Signals(mtp=name) for name in ("on", "detached"))


def tokens_of(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 40, n).astype(np.int32) for n in lengths]


def alone(*sequences):
    """One right-padded sequence a row: tokens, layout, sources."""
    tokens = np.stack([np.pad(s, (0, LENGTH - len(s))) for s in sequences])
    layout = cache.plain_layout(jnp.asarray([len(s) for s in sequences]), LENGTH)
    sources = np.maximum(np.arange(LENGTH) - 1, 0) * np.ones((len(sequences), 1), int)
    real = np.asarray(layout.segments_BT) > 0
    sources = np.where(real, sources, np.arange(LENGTH)).astype(np.int32)
    return jnp.asarray(tokens), layout, jnp.asarray(sources)


@pytest.fixture(scope="module")
def ahead(sparse_model):
    """The whole pass with its further predictions, compiled: (tokens, layout, sources)."""
    config, variables = sparse_model.config, sparse_model.variables

    @jax.jit
    def run(tokens_BT, layout, sources_BT):
        return transformer.apply(
            config, variables, tokens_BT, layout, sources_BT=sources_BT, signals=ON
        )

    return run


def test_each_depth_joins_a_state_with_the_next_embedding_and_runs_a_block(sparse_model, ahead):
    """As plain rows of pairs: at depth k there are k fewer of them, from position 0 on."""
    c, (sequence,) = sparse_model.config, tokens_of(0, LENGTH)
    out = ahead(*alone(sequence))
    params: Any = sparse_model.variables["params"]
    router: Any = sparse_model.variables["router"]["mtp"]["block"]
    state_TD, embedded_TD = out.hidden_BTD[0], params["embed"][sequence]
    assert c.num_mtp_layers == 2
    for depth in range(2):
        p = jax.tree.map(lambda x, k=depth: x[k], params["mtp"])

        def norm(name, x_TD, p=p):
            module = layers.RMSNorm(c.norm_eps)
            return module.apply({"params": p[name]}, x_TD)

        both = [norm("embed_norm", embedded_TD[depth + 1 :]), norm("hidden_norm", state_TD[:-1])]
        x_BTD = (jnp.concatenate(both, axis=-1) @ p["project"])[None]
        layout = cache.plain_layout(jnp.asarray([x_BTD.shape[1]]), x_BTD.shape[1])
        module = block.Block(c, block.Kernels(), block.Signals(), True)
        variables = {
            "params": p["block"],
            "router": jax.tree.map(lambda x, k=depth: x[k], router),
        }
        (state_1TD, _), _ = module.apply(variables, (x_BTD, None), None, None, layout, None)
        state_TD = state_1TD[0]
        got_TD = out.further.hidden_BTD[depth, 0, depth + 1 :]
        np.testing.assert_allclose(got_TD, norm("final_norm", state_TD), rtol=2e-3, atol=2e-4)
        real_T = np.asarray(out.further.real_BT[depth, 0])
        np.testing.assert_array_equal(real_T, np.arange(LENGTH) > depth)


def test_answers_that_share_one_prompt_look_ahead_as_each_alone(ahead):
    prompt, *answers = tokens_of(1, 3, 2, 4)
    tokens = np.concatenate([prompt, *answers, [0]])[None]
    segments = np.array([[1] * 3 + [2] * 2 + [3] * 4 + [0]])
    prefixes = np.array([[1] * 9 + [0]])
    positions = np.array([[0, 1, 2, 3, 4, 3, 4, 5, 6, 0]])
    sources = np.array([[0, 0, 1, 2, 3, 2, 5, 6, 7, 9]])
    layout = cache.Layout(*(jnp.asarray(x, jnp.int32) for x in (positions, segments, prefixes)))
    args = (jnp.asarray(tokens), layout, jnp.asarray(sources))
    # The compiled shape has two rows: the second is padding.
    pad = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]), args)
    pad = (*pad[:2], pad[2].at[1].set(jnp.arange(LENGTH)))
    together = ahead(*pad).further
    apart = ahead(*alone(*(np.concatenate([prompt, a]) for a in answers))).further
    for depth in range(2):
        for row, where in ((0, [0, 1, 2, 3, 4]), (1, [0, 1, 2, 5, 6, 7, 8])):
            real = np.asarray(apart.real_BT)[depth, row, : len(where)]
            np.testing.assert_array_equal(together.real_BT[depth, 0, np.array(where)], real)
            got = np.asarray(together.hidden_BTD)[depth, 0, where][real]
            wanted = np.asarray(apart.hidden_BTD)[depth, row, : len(where)][real]
            np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-4)
    assert not np.asarray(together.real_BT)[:, 1].any()


def test_looking_ahead_changes_nothing_else_and_its_variables_are_kept(sparse_model, ahead):
    tokens_BT, layout, sources_BT = alone(*tokens_of(2, 7, LENGTH))
    plain = transformer.apply(sparse_model.config, sparse_model.variables, tokens_BT, layout)
    out = ahead(tokens_BT, layout, sources_BT)
    assert plain.further is None
    np.testing.assert_allclose(plain.hidden_BTD, out.hidden_BTD, rtol=2e-4, atol=2e-5)
    fresh = transformer.unboxed(transformer.boxed_abstract(sparse_model.config))
    mtp, d = fresh["params"]["mtp"], sparse_model.config.width
    assert mtp["project"].shape == (2, 2 * d, d)
    assert {k for k in mtp} == {"embed_norm", "hidden_norm", "project", "block", "final_norm"}
    assert fresh["router"]["mtp"]["block"]["mlp"]["bias"].shape == (2, 6)


def test_detached_states_leave_trunk_and_embedding_alone(sparse_model):
    tokens_BT, layout, sources_BT = alone(*tokens_of(3, 7, LENGTH))

    @functools.partial(jax.jit, static_argnums=1)
    def slope(params, signals):
        def total(params):
            out = transformer.apply(
                sparse_model.config,
                {**sparse_model.variables, "params": params},
                tokens_BT,
                layout,
                sources_BT=sources_BT,
                signals=signals,
            )
            return jnp.sum(jnp.sin(out.further.hidden_BTD))

        return jax.grad(total)(params)

    params = sparse_model.variables["params"]
    free, detached = slope(params, ON), slope(params, DETACHED)
    for name in ("embed", "dense", "sparse", "final_norm"):
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(detached[name])), name
        assert any(np.asarray(x).any() for x in jax.tree.leaves(free[name])), name
    for one, other in zip(*map(jax.tree.leaves, (free["mtp"], detached["mtp"])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_depth_over_its_cache_gives_the_states_of_the_whole_pass(sparse_model, ahead, depth):
    """Two rows that share nothing; the prompt's first tokens have no state and are not seen."""
    c, at, prompt = sparse_model.config, depth - 1, 6
    sequences = tokens_of(4, LENGTH, LENGTH)
    tokens_BT, layout, sources_BT = alone(*sequences)
    out = ahead(tokens_BT, layout, sources_BT)
    below_BTD = (out.hidden_BTD, out.further.state_BTD[0])[at]
    layer = mtp.MtpLayer(c, block.Kernels(), block.Signals())
    variables = {
        kind: jax.tree.map(lambda x: x[at], sparse_model.variables[kind]["mtp"])
        for kind in ("params", "router")
    }
    pages = cache.empty_pages(c, 1, 1 + 2 * LENGTH, 1)
    table_BM = 1 + jnp.arange(2 * LENGTH).reshape(2, LENGTH)
    none_B = jnp.zeros(2, jnp.int32)

    @functools.partial(jax.jit, static_argnums=2)
    def step(pages, here, length, below_BtD):
        at_t = here + jnp.arange(length)
        positions_Bt = jnp.broadcast_to(at_t - depth, (2, length))
        real_Bt = positions_Bt >= 0
        before = mtp.Depth(below_BtD, jnp.maximum(positions_Bt, 0), real_Bt)
        tokens_Bt = jax.lax.dynamic_slice_in_dim(tokens_BT, here, length, axis=1)
        embedded_BtD = sparse_model.variables["params"]["embed"][tokens_Bt]
        view = cache.PageView(table_BM, positions_Bt, none_B, none_B)
        return mtp.step(layer, variables, before, embedded_BtD, pages, view)

    assert bool(jnp.all(out.further.real_BT[at, :, :prompt] == (jnp.arange(prompt) >= depth)[None]))
    begin = 0
    for length in (prompt, *(1,) * (LENGTH - prompt)):
        # The state below at each token's predecessor; the first token has none.
        below_BtD = jnp.pad(below_BTD, ((0, 0), (1, 0), (0, 0)))[:, begin : begin + length]
        got = step(pages, jnp.int32(begin), length, below_BtD)
        pages, first = got.pages, max(begin, depth)
        for one, whole in (
            (got.hidden_BTD, out.further.hidden_BTD),
            (got.state_BTD, out.further.state_BTD),
        ):
            np.testing.assert_allclose(
                one[:, first - begin :],
                whole[at, :, first : begin + length],
                rtol=2e-3,
                atol=2e-4,
            )
        begin += length
