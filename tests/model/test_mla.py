import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mathv2_jax.model import attention, cache, mla

PROMPTS = (5, 3)  # lengths, in five slots
ANSWERS, STEPS = 2, 4


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layer_of(model):
    """The attention of the first sparse layer: its module and variables."""
    params = model.variables["params"]["sparse"]["attention"]
    module = mla.LatentAttention(model.config, attention.attend_densely)
    return module, {"params": jax.tree.map(lambda x: x[0], params)}


def expanded(model, x_BTD, layout):
    module, variables = layer_of(model)
    return jax.jit(functools.partial(module.apply, method="expanded"))(variables, x_BTD, layout)


def turned(x, positions_T, theta):
    """Rope of [T, ..., R], written with complex numbers."""
    width = x.shape[-1]
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    angle = positions_T[:, None] * theta ** (-2 * np.arange(width // 2) / width)
    angle = angle.reshape(len(angle), *(1,) * (x.ndim - 2), -1)
    out = pairs * np.exp(1j * angle)
    return np.stack([out.real, out.imag], axis=-1).reshape(x.shape)


def slowly(c, params, x_TD, positions_T, seen_TS):
    """MLA of one row from its equations, head by head and query by query, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    q_in = x_TD
    if c.q_latent_width:
        q_in = norm(x_TD @ p["q_a"], p["q_a_norm"]["scale"])
    latent = norm(x_TD @ p["kv_a"][:, : c.kv_latent_width], p["kv_a_norm"]["scale"])
    shared_key = turned(x_TD @ p["kv_a"][:, c.kv_latent_width :], positions_T, c.rope_theta)
    out_TD, n = np.zeros_like(x_TD), c.head_key_width
    for h in range(c.num_heads):
        q, kv = q_in @ p["q_b"][:, h], latent @ p["kv_b"][:, h]
        q_turned = turned(q[:, n:], positions_T, c.rope_theta)
        for t in range(len(x_TD)):
            score = kv[:, :n] @ q[t, :n] + shared_key @ q_turned[t]
            score = np.exp(score / np.sqrt(n + c.head_rope_width)) * seen_TS[t]
            out_TD[t] += (score / score.sum()) @ kv[:, n:] @ p["o"][h]
    return out_TD, latent, shared_key


def test_expanded_attention_follows_its_equations(model):
    """With a rotation and a scale that YaRN leaves alone, and all tokens picked by an indexer."""
    config = dataclasses.replace(
        model.config, yarn_factor=1.0, index_topk=8 * bool(model.config.index_topk)
    )
    model = model._replace(config=config)
    x_BTD = draw(0, 1, 8, model.config.width)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 0]])
    prefixes = jnp.asarray([[1, 1, 1, 1, 1, 3, 3, 0]])
    layout = cache.Layout(jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 0]]), segments, prefixes)
    got, _ = expanded(model, x_BTD, layout)
    _, variables = layer_of(model)
    seen_TS = np.asarray(cache.visible(layout))[0]
    wanted, _, _ = slowly(
        model.config,
        variables["params"],
        np.asarray(x_BTD[0], np.float64),
        np.asarray(layout.positions_BT[0]),
        seen_TS,
    )
    np.testing.assert_allclose(got[0], wanted, rtol=1e-4, atol=1e-5)


def test_attention_over_pages_equals_expanded_attention_of_the_whole_row(model):
    """Prompts in two pieces, in pages in any order that their answers share; then token by token.

    What no token may see is filled with numbers that would be noticed.
    """
    c, (module, variables) = model.config, layer_of(model)
    num_rows, slots, page = len(PROMPTS) * ANSWERS, max(PROMPTS), 2
    lengths_B = np.repeat(np.asarray(PROMPTS), ANSWERS)
    prompt_PSD = draw(1, len(PROMPTS), slots, c.width)
    answer_BND = draw(2, num_rows, STEPS, c.width)
    rows = [
        jnp.concatenate([prompt_PSD[b // ANSWERS, :n], answer_BND[b], jnp.zeros((slots - n, 16))])
        for b, n in enumerate(lengths_B)
    ]
    layout = cache.plain_layout(jnp.asarray(lengths_B + STEPS), slots + STEPS)
    wanted, _ = expanded(model, jnp.stack(rows), layout)

    pages_of = [-(-n // page) for n in PROMPTS]
    number = 1 + sum(pages_of) + num_rows * STEPS // page
    free = list(np.random.default_rng(5).permutation(np.arange(1, number)))
    prompt_pages = [[free.pop() for _ in range(n)] for n in pages_of]
    tables_PM = np.zeros((len(PROMPTS), max(pages_of)), np.int32)
    table_BM = np.zeros((num_rows, max(pages_of) + STEPS // page), np.int32)
    for p, own in enumerate(prompt_pages):
        tables_PM[p, : len(own)] = own
    for b in range(num_rows):
        own = prompt_pages[b // ANSWERS] + [free.pop() for _ in range(STEPS // page)]
        table_BM[b, : len(own)] = own
    pages = jax.tree.map(lambda x: x + 50.0, cache.empty_pages(c, 2, number, page))
    run = jax.jit(functools.partial(module.apply, method="paged"))
    layer, none_P = jnp.int32(1), jnp.zeros(len(PROMPTS), jnp.int32)
    for begin, end in ((0, 2), (2, slots)):
        at_PT = np.broadcast_to(np.arange(begin, end), (len(PROMPTS), end - begin))
        slots_PT = np.where(at_PT < np.asarray(PROMPTS)[:, None], at_PT, -1)
        view = cache.PageView(tables_PM, jnp.asarray(slots_PT), none_P, none_P)
        got, pages = run(variables, prompt_PSD[:, begin:end], at_PT, pages, layer, view)
        for p, n in enumerate(PROMPTS):
            here = slice(begin, min(end, n))
            np.testing.assert_allclose(
                got[p, : here.stop - begin], wanted[p * ANSWERS, here], rtol=1e-4, atol=1e-5
            )
    shared_B = jnp.asarray(lengths_B)
    padded_B = -(-shared_B // page) * page
    for step in range(STEPS):
        at_B1 = jnp.asarray(lengths_B + step)[:, None]
        view = cache.PageView(table_BM, (padded_B + step)[:, None], shared_B, padded_B)
        got, pages = run(variables, answer_BND[:, step : step + 1], at_B1, pages, layer, view)
        there = jnp.take_along_axis(wanted, at_B1[:, :, None], axis=1)
        np.testing.assert_allclose(got, there, rtol=1e-4, atol=1e-5)
    for pool in jax.tree.leaves(pages):
        assert bool(jnp.all(pool[0] == 50.0))  # another layer's


def test_scores_stay_float32_where_the_stream_is_bfloat16():
    """Near 64 bfloat16 has steps of 0.5: a rounded score would be off by a quarter."""
    q, k, v = draw(3, 1, 6, 1, 8), draw(4, 1, 6, 1, 8), draw(5, 1, 6, 1, 4)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q.at[..., 0].set(8), k.at[..., 0].set(8), v))
    layout = cache.plain_layout(jnp.asarray([6]), 6)
    got, _ = attention.attend_densely(q, k, v, layout, 1.0)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    wanted, _ = attention.attend_densely(q, k, v, layout, 1.0)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=0.02, atol=0.02)
