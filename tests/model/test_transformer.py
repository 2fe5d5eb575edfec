import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import cache, heads, transformer

ROWS, LENGTH = 3, 14  # the one shape that most tests here share


class Rows(NamedTuple):
    """What a pass reads, on the host: padding has segment 0, and is its own source."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    prefixes_BT: np.ndarray
    sources_BT: np.ndarray

    @property
    def layout(self):
        return cache.Layout(
            *(jnp.asarray(x) for x in (self.positions_BT, self.segments_BT, self.prefixes_BT))
        )


def empty_rows():
    blank = np.zeros((ROWS, LENGTH), np.int32)
    own = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return Rows(blank, blank.copy(), blank.copy(), blank.copy(), own)


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


def put(rows, row, start, tokens, *, segment, position=0, prefix=None, source=None):
    """A sequence at a place in a row; `source` is the place of its first token's predecessor."""
    at = np.arange(start, start + len(tokens))
    rows.tokens_BT[row, at] = tokens
    rows.positions_BT[row, at] = position + np.arange(len(tokens))
    rows.segments_BT[row, at] = segment
    rows.prefixes_BT[row, at] = segment if prefix is None else prefix
    rows.sources_BT[row, at] = [start if source is None else source, *at[:-1]]


def alone(*sequences):
    """One right-padded sequence a row."""
    rows = empty_rows()
    for row, tokens in enumerate(sequences):
        put(rows, row, 0, tokens, segment=1)
    return rows


def sharing_one_prompt(prompt, answers):
    """A prompt and its answers, one after the other in the first row."""
    rows, at = empty_rows(), len(prompt)
    put(rows, 0, 0, prompt, segment=1)
    for number, answer in enumerate(answers):
        where = dict(position=len(prompt), prefix=1, source=len(prompt) - 1)
        put(rows, 0, at, answer, segment=2 + number, **where)
        at += len(answer)
    return rows


def run(model, rows, kept_LBTA=None, variables=None):
    c = model.config
    if kept_LBTA is None:
        shape = (c.num_sparse_layers, *rows.tokens_BT.shape, c.experts_per_token)
        kept_LBTA = jnp.full(shape, -1, jnp.int32)
    tokens_BT, sources_BT = jnp.asarray(rows.tokens_BT), jnp.asarray(rows.sources_BT)
    variables = model.variables if variables is None else variables
    return model.run(variables, tokens_BT, rows.layout, sources_BT, kept_LBTA)


def draw_tokens(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 40, n).astype(np.int32) for n in lengths]


def test_packed_documents_are_as_each_alone(model):
    documents = draw_tokens(0, 5, 3, 6)
    packed, at = empty_rows(), 0
    for number, document in enumerate(documents):
        put(packed, 1, at, document, segment=number + 1)
        at += len(document)
    together = run(model, packed).hidden_BTD[1]
    apart = run(model, alone(*documents)).hidden_BTD
    wanted = np.concatenate([apart[i, : len(d)] for i, d in enumerate(documents)])
    assert_close(together[:at], wanted)


def test_answers_that_share_one_prompt_are_as_each_alone(model):
    prompt, *answers = draw_tokens(1, 4, 3, 2, 5)
    together = run(model, sharing_one_prompt(prompt, answers))
    apart = run(model, alone(*(np.concatenate([prompt, a]) for a in answers))).hidden_BTD
    wanted = [apart[0, :4]] + [apart[i, 4 : 4 + len(a)] for i, a in enumerate(answers)]
    assert_close(together.hidden_BTD[0], np.concatenate(wanted))


def test_what_stands_in_padding_changes_nothing(model):
    rows = alone(*draw_tokens(2, 9, 9, 6))
    real_BT = rows.segments_BT > 0
    blank = run(model, rows)
    noise_BT = np.random.default_rng(3).integers(1, 40, (ROWS, LENGTH))
    filled = rows._replace(tokens_BT=np.where(real_BT, rows.tokens_BT, noise_BT).astype(np.int32))
    noisy = run(model, filled)
    assert_close(noisy.hidden_BTD[real_BT], blank.hidden_BTD[real_BT])
    np.testing.assert_array_equal(noisy.routing.load_E, blank.routing.load_E)
    counted = real_BT.sum() * model.config.experts_per_token
    np.testing.assert_array_equal(blank.routing.load_E.sum(-1), counted)


def test_the_number_of_padding_tokens_changes_nothing(full):
    documents = draw_tokens(2, 9, 9)
    hidden_BTD = run(full, alone(*documents)).hidden_BTD[:2, :9]
    wanted_BTV = heads.logits(hidden_BTD, full.variables["params"]["unembed"])
    forward = jax.jit(functools.partial(transformer.forward, full.config))
    logits_BTV = forward(full.variables, jnp.asarray(np.stack(documents)))
    np.testing.assert_allclose(logits_BTV, wanted_BTV, rtol=1e-3, atol=1e-4)


def test_taps_add_the_scaled_embeddings_of_the_previous_tokens(full):
    """As if each token of the row had an embedding of its own, with the sum written into it."""
    (tokens,) = draw_tokens(10, LENGTH)
    params = full.variables["params"]
    embed_VD, taps_WD = np.asarray(params["embed"]), np.asarray(params["taps"])
    summed_TD = embed_VD[tokens].copy()
    for t in range(LENGTH):
        for w in range(full.config.embedding_taps):
            summed_TD[t] += taps_WD[w] * embed_VD[tokens[max(t - 1 - w, 0)]]
    written = params["embed"].at[:LENGTH].set(jnp.asarray(summed_TD))
    untapped = {**params, "embed": written, "taps": jnp.zeros_like(params["taps"])}
    rows = alone(np.arange(LENGTH, dtype=np.int32))
    wanted = run(full, rows, variables={**full.variables, "params": untapped})
    assert_close(run(full, alone(tokens)).hidden_BTD[0], wanted.hidden_BTD[0])


@pytest.fixture(scope="module")
def reach(full):
    """The size of d hidden[0, t] / d embedding of the token at s, for rows of distinct tokens."""

    @jax.jit
    def jacobian(embed_VD, tokens_BT, layout, sources_BT, mix_D):
        def read(embed_VD):
            params = {**full.variables["params"], "embed": embed_VD}
            kept_LBTA = jnp.full((2, 1, LENGTH, 2), -1, jnp.int32)
            variables = {**full.variables, "params": params}
            out = full.run(variables, tokens_BT, layout, sources_BT, kept_LBTA)
            return jnp.einsum("TD,D->T", out.hidden_BTD[0], mix_D)

        slope_TVD = jax.jacrev(read)(embed_VD)
        return jnp.abs(slope_TVD[:, tokens_BT[0]]).max(axis=-1)

    def of(rows):
        first = Rows(*(x[:1] for x in rows))
        mix_D = jnp.asarray(np.random.default_rng(4).standard_normal(16), jnp.float32)
        embed_VD = full.variables["params"]["embed"]
        tokens_BT, sources_BT = jnp.asarray(first.tokens_BT), jnp.asarray(first.sources_BT)
        return np.asarray(jacobian(embed_VD, tokens_BT, first.layout, sources_BT, mix_D))

    return of


def test_no_gradient_comes_from_later_tokens(reach):
    slope_TS = reach(alone(np.arange(1, LENGTH + 1)))
    assert (slope_TS[np.triu_indices(LENGTH, 1)] == 0).all()
    assert (slope_TS[np.tril_indices(LENGTH)] > 1e-5).all()


def test_gradients_stay_within_an_answer_and_its_prompt(reach):
    prompt, *answers = np.split(np.arange(1, LENGTH), [4, 7, 9])  # and one token of padding
    rows = sharing_one_prompt(prompt, answers)
    slope_TS = reach(rows)
    seen_TS = np.asarray(cache.visible(rows.layout))[0]
    real = rows.segments_BT[0] > 0
    assert (slope_TS[~seen_TS] == 0).all()
    assert (slope_TS[seen_TS & real[:, None]] > 1e-5).all()


def previous_of_next(rows_tokens, lengths_B, taps):
    """The last tokens of each row, the nearest first, its first token repeated."""
    back = np.maximum(lengths_B[:, None] - 1 - np.arange(taps)[None, :], 0)
    return np.take_along_axis(rows_tokens, back, axis=1)


def test_decoding_over_pages_token_by_token_equals_one_forward(model):
    """Three prompts, two answers each, taught token by token on the prompts' pages."""
    c, answers, steps, page = model.config, 2, 4, 2
    prompts, lengths_P = draw_tokens(5, 7, 1, 4), np.array([7, 1, 4])
    lengths_B = np.repeat(lengths_P, answers)
    answer_BN = np.stack(draw_tokens(6, *[steps] * (ROWS * answers)))
    full_rows = [np.concatenate([prompts[b // answers], answer_BN[b]]) for b in range(6)]
    halves = [run(model, alone(*full_rows[i : i + 3])) for i in (0, 3)]
    wanted_BTD = np.concatenate([h.hidden_BTD for h in halves])
    wanted_ids = np.concatenate([h.routing.experts_BTA for h in halves], axis=1)
    tokens_BT = np.stack([np.pad(r, (0, LENGTH - len(r))) for r in full_rows])

    most = -(-max(lengths_P) // page)
    own = steps // page
    table_BM = np.zeros((6, most + own), np.int32)
    number = 1
    for b, n in enumerate(lengths_B):
        held, first = -(-n // page), b % answers == 0
        shared = range(number, number + held) if first else table_BM[b - 1, :held]
        number += held * first
        table_BM[b, : held + own] = [*shared, *range(number, number + own)]
        number += own
    pages = jax.tree.map(lambda x: x + 9.0, transformer.empty_cache(c, int(number), page))

    @jax.jit
    def over(pages, tokens_BT, at_BT, previous_BTW, view):
        ones_BT = jnp.ones_like(tokens_BT)
        out = transformer.apply(
            c,
            model.variables,
            tokens_BT,
            cache.Layout(at_BT, ones_BT, ones_BT),
            past=transformer.Past(pages, view),
            previous_BTW=previous_BTW,
        )
        return out.hidden_BTD, out.routing, out.cache

    first, at_PT = slice(0, None, answers), np.broadcast_to(np.arange(7), (3, 7))
    slots_PT = np.where(at_PT < lengths_P[:, None], at_PT, -1)
    previous = [previous_of_next(tokens_BT[first], at_P, c.embedding_taps) for at_P in at_PT.T]
    none_P = jnp.zeros(3, jnp.int32)
    view = cache.PageView(table_BM[first], jnp.asarray(slots_PT), none_P, none_P)
    got, _, pages = over(
        pages, jnp.asarray(tokens_BT[first, :7]), at_PT, jnp.stack(previous, axis=1), view
    )
    real_PT = slots_PT >= 0
    assert_close(got[real_PT], wanted_BTD[first, :7][real_PT])
    shared_B = jnp.asarray(lengths_B)
    padded_B = -(-shared_B // page) * page
    for step in range(steps):
        at_B1 = (lengths_B + step)[:, None]
        previous = previous_of_next(tokens_BT, lengths_B + step, c.embedding_taps)
        view = cache.PageView(table_BM, (padded_B + step)[:, None], shared_B, padded_B)
        got, routing, pages = over(
            pages,
            jnp.asarray(np.take_along_axis(tokens_BT, at_B1, 1)),
            jnp.asarray(at_B1),
            jnp.asarray(previous)[:, None],
            view,
        )
        wanted_BD = np.take_along_axis(wanted_BTD, at_B1[..., None], 1)[:, 0]
        assert_close(got[:, 0], wanted_BD)
        here = np.take_along_axis(wanted_ids, at_B1[None, :, :, None], 2)
        np.testing.assert_array_equal(routing.experts_BTA, here)
        assert routing.load_E.sum() == 6 * c.experts_per_token * c.num_sparse_layers


def test_each_layer_replays_its_own_kept_routing(full):
    rows = alone(*draw_tokens(7, LENGTH, 9, 12))
    live = run(full, rows)
    elsewhere = jax.tree.map(lambda b: b[::-1] * 8, full.variables["router"])
    changed = {**full.variables, "router": elsewhere}
    assert (
        run(full, rows, variables=changed).routing.experts_BTA != live.routing.experts_BTA
    ).any()
    replayed = run(full, rows, live.routing.experts_BTA, changed)
    np.testing.assert_array_equal(replayed.routing.experts_BTA, live.routing.experts_BTA)
    assert_close(replayed.hidden_BTD, live.hidden_BTD)
    assert (live.routing.experts_BTA[0] != live.routing.experts_BTA[1]).any()


def test_unrolled_layers_equal_the_scan_with_all_their_sums_and_gradients(everything):
    chex.assert_trees_all_close(everything(scan_unroll=True), everything(), rtol=1e-3, atol=2e-4)


def test_unrolled_layers_equal_the_scan_on_the_same_variables(full):
    config = dataclasses.replace(full.config, scan_unroll=not full.config.scan_unroll)
    shapes = [
        jax.tree.map(lambda x: x.shape, transformer.unboxed(transformer.boxed_abstract(c)))
        for c in (config, full.config)
    ]
    assert shapes[0] == shapes[1]
    rows = alone(*draw_tokens(8, LENGTH, 3, 12))
    previous_BTW = cache.previous_tokens(
        jnp.asarray(rows.tokens_BT), jnp.asarray(rows.sources_BT), config.embedding_taps
    )
    unrolled = jax.jit(functools.partial(transformer.apply, config))(
        full.variables, jnp.asarray(rows.tokens_BT), rows.layout, previous_BTW=previous_BTW
    )
    chex.assert_trees_all_close(unrolled, run(full, rows), rtol=2e-4, atol=2e-5)


SIGNALS = transformer.Signals(balance=True, align="sparse", mtp="on")


@pytest.fixture(scope="module")
def everything(sparse_model):
    """Values and gradients of a pass with all its auxiliary sums, by fields to replace."""
    rows = alone(*draw_tokens(11, LENGTH, 9, 12))
    mix_BTD = np.random.default_rng(12).standard_normal((ROWS, LENGTH, sparse_model.config.width))
    mix_BTD = jnp.asarray(mix_BTD * (rows.segments_BT > 0)[..., None], jnp.float32)

    def total(config, params):
        out = transformer.apply(
            config,
            {**sparse_model.variables, "params": params},
            jnp.asarray(rows.tokens_BT),
            rows.layout,
            sources_BT=jnp.asarray(rows.sources_BT),
            signals=SIGNALS,
        )
        loss = jnp.sum(mix_BTD * out.hidden_BTD) + jnp.sum(out.alignment_L)
        loss += jnp.sum(out.routing.balance) + jnp.sum(out.further.routing.balance)
        further_nBTD = jnp.where(out.further.real_BT[..., None], out.further.hidden_BTD, 0.0)
        return loss + jnp.sum(mix_BTD[None] * further_nBTD), out

    @functools.cache
    def run(**fields):
        config = dataclasses.replace(sparse_model.config, **fields)
        gradient = jax.value_and_grad(functools.partial(total, config), has_aux=True)
        return jax.jit(gradient)(sparse_model.variables["params"])

    return run


@pytest.mark.parametrize(
    "fields",
    [
        dict(remat="full"),
        dict(remat="dots"),
        dict(remat="dots_no_batch", scan_unroll=True),
    ],
    ids=lambda f: "-".join(map(str, f.values())),
)
def test_what_a_layer_recomputes_changes_neither_values_nor_gradients(everything, fields):
    plain, changed = everything(), everything(**fields)
    chex.assert_trees_all_close(changed, plain, rtol=1e-3, atol=2e-4)
    assert all(np.asarray(x).any() for x in jax.tree.leaves(plain[1]["sparse"]))


def test_parameters_in_bfloat16_are_the_rounded_ones_and_what_must_be_float32_is(sparse_model):
    config = dataclasses.replace(sparse_model.config, param_dtype="bfloat16")
    shapes = transformer.unboxed(transformer.boxed_abstract(config))
    flat = jax.tree_util.tree_leaves_with_path(shapes)
    in_float32 = {jax.tree_util.keystr(p) for p, x in flat if x.dtype == jnp.float32}
    assert in_float32 == {
        "['params']['verifier_head_bias']",
        "['params']['verifier_head_kernel']",
        "['router']['mtp']['block']['mlp']['bias']",
        "['router']['sparse']['mlp']['bias']",
    }
    stored = jax.tree.map(lambda x, s: x.astype(s.dtype), sparse_model.variables, shapes)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    tokens_BT = jnp.asarray(np.stack(draw_tokens(13, LENGTH, LENGTH, LENGTH)))
    got_BTV = jax.jit(functools.partial(transformer.forward, config))(stored, tokens_BT)
    plain = jax.jit(functools.partial(transformer.forward, sparse_model.config))
    np.testing.assert_allclose(got_BTV, plain(rounded, tokens_BT), rtol=1e-4, atol=1e-4)
    fresh = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    assert jax.tree.map(lambda x: x.dtype, fresh) == jax.tree.map(lambda x: x.dtype, shapes)


def test_bfloat16_compute_keeps_parameters_gradients_and_logits_in_float32(full):
    """And stays near the float32 model, on the float32 model's routing."""
    config = dataclasses.replace(full.config, compute_dtype="bfloat16")
    rows = alone(*draw_tokens(9, LENGTH, 8, 12))
    exact = run(full, rows)
    tokens_BT, sources_BT = jnp.asarray(rows.tokens_BT), jnp.asarray(rows.sources_BT)
    previous_BTW = cache.previous_tokens(tokens_BT, sources_BT, config.embedding_taps)

    def loss(params):
        out = transformer.apply(
            config,
            {**full.variables, "params": params},
            tokens_BT,
            rows.layout,
            kept_LBTA=exact.routing.experts_BTA,
            previous_BTW=previous_BTW,
        )
        found = heads.token_logprobs(out.hidden_BTD, params["unembed"], tokens_BT, chunk=7)
        return jnp.sum(found.logprob_BT), (out, found)

    _, (out, found) = jax.jit(loss)(full.variables["params"])
    assert out.hidden_BTD.dtype == jnp.bfloat16
    pages = transformer.empty_cache(config, 2, 2)
    assert {x.dtype for x in jax.tree.leaves(pages)} == {jnp.dtype(jnp.bfloat16)}
    assert out.routing.load_E.dtype == found.logprob_BT.dtype == found.entropy_BT.dtype == "float32"
    grads, _ = jax.eval_shape(jax.grad(loss, has_aux=True), full.variables["params"])
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    real_BT = rows.segments_BT > 0
    error = np.abs(np.asarray(out.hidden_BTD.astype(jnp.float32) - exact.hidden_BTD)[real_BT])
    size = np.sqrt(np.mean(np.square(np.asarray(exact.hidden_BTD)[real_BT])))
    assert 0 < error.mean() < 0.02 * size


def test_fresh_matrices_have_variance_one_over_fan_in_and_layers_differ(full):
    config = dataclasses.replace(full.config, width=64, expert_width=32, num_dense_layers=0)
    key = jax.random.key(1, impl="rbg")  # compiles in a fraction of the default's time
    params = jax.jit(functools.partial(transformer.init, config))(key)["params"]
    attention, mlp = params["sparse"]["attention"], params["sparse"]["mlp"]
    heads_in = config.num_heads * config.head_value_width
    for matrix, fan_in in (
        (attention["q_a"], 64),
        (attention["q_b"], config.q_latent_width),
        (attention["kv_a"], 64),
        (attention["kv_b"], config.kv_latent_width),
        (attention["o"], heads_in),
        (mlp["router"], 64),
        (mlp["experts_gate"], 64),
        (mlp["experts_down"], 32),
        (mlp["shared"]["down"], 2 * 32),
        (params["unembed"], 64),
    ):
        assert abs(float(jnp.std(matrix)) * fan_in**0.5 - 1) < 4 / matrix.size**0.5
    assert not np.allclose(attention["q_b"][0], attention["q_b"][1])
    assert (np.asarray(attention["kv_a_norm"]["scale"]) == 1).all()
    assert not np.asarray(params["verifier_head_kernel"]).any()
