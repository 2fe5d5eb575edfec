"""Jitted prefill and decode over fixed shapes: P prompts of S slots, G answers each, N new tokens.

The answers of a prompt share its prefill and its cached latents. A row's noise is a function of its
own key and the token's index, so an answer does not depend on what runs beside it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from mathv2_jax.model import cache, heads, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import sampling


class Prefilled(NamedTuple):
    """What prompts leave behind; `tail_PW` are their last tokens, the last one first."""

    latents: transformer.Latents
    logits_PV: Float[Array, "P V"]
    head_P3: Float[Array, "P 3"]
    tail_PW: Int[Array, "P W"]


class RowSettings(NamedTuple):
    """Per row: key data, sampling settings and the limit on new tokens (0: a row not in use)."""

    keys_B2: UInt32[Array, "B 2"]
    temperature_B: Float[Array, "B"]
    top_p_B: Float[Array, "B"]
    limit_B: Int[Array, "B"]


class Decoded(NamedTuple):
    """Answers, right-padded: `length_B` counts tokens, the ending one included."""

    tokens_BN: Int[Array, "B N"]
    logprobs_BN: Float[Array, "B N"]
    length_B: Int[Array, "B"]
    stopped_B: Bool[Array, "B"]


class _Carry(NamedTuple):
    step: Int[Array, ""]
    decoded: Decoded
    logits_BV: Float[Array, "B V"]
    tail_BW: Int[Array, "B W"]
    dense: cache.LatentPair | None
    sparse: cache.LatentPair | None
    done_B: Bool[Array, "B"]


class Programs:
    """Prefill and decode of one model, compiled per shape; engines of one model share them."""

    def __init__(self, config: ModelConfig, kernels: transformer.Kernels):
        self.config, self.kernels = config, kernels
        self.prefill = jax.jit(functools.partial(prefill, config, kernels))
        self.decode = jax.jit(
            functools.partial(decode, config, kernels), static_argnames=("slots", "truncate")
        )


def prefill(
    config: ModelConfig,
    kernels: transformer.Kernels,
    variables: transformer.Variables,
    prompts_PS: Int[Array, "P S"],
    lengths_P: Int[Array, "P"],
) -> Prefilled:
    """Right-padded prompts to latents, the next token's logits and the verifier head's P(score)."""
    layout = cache.plain_layout(lengths_P, prompts_PS.shape[1])
    previous_PSW = cache.previous_tokens(
        prompts_PS, cache.plain_sources(prompts_PS), config.embedding_taps
    )
    out = transformer.apply(
        config, variables, prompts_PS, layout, previous_BTW=previous_PSW, kernels=kernels
    )
    last_P1 = jnp.maximum(lengths_P - 1, 0)[:, None, None]
    hidden_P1D = jnp.take_along_axis(out.hidden_BTD, last_P1, axis=1)
    params = variables["params"]
    head_P3 = heads.score_logits(
        hidden_P1D[:, 0], params["verifier_head_kernel"], params["verifier_head_bias"]
    )
    logits_PV = heads.logits(hidden_P1D, params["unembed"])[:, 0]
    back_PW = lengths_P[:, None] - 1 - jnp.arange(config.embedding_taps)[None, :]
    tail_PW = jnp.take_along_axis(prompts_PS, jnp.maximum(back_PW, 0), axis=1)
    return Prefilled(out.latents, logits_PV, jax.nn.softmax(head_P3, axis=-1), tail_PW)


def _empty(prompt: cache.LatentPair | None, rows: int, slots: int) -> cache.LatentPair | None:
    if prompt is None:
        return None
    return jax.tree.map(
        lambda x: jnp.zeros((x.shape[0], rows, slots, x.shape[-1]), x.dtype), prompt
    )


def _layer_caches(
    prompt: cache.LatentPair | None, own: cache.LatentPair | None
) -> cache.LayerCache | None:
    return None if prompt is None or own is None else cache.LayerCache(prompt, own)


def _write(own: cache.LatentPair | None, new: cache.LatentPair | None, at: jax.Array) -> Any:
    def put(old: jax.Array, fresh: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, fresh, at, axis=2)

    return jax.tree.map(put, own, new)


def decode(
    config: ModelConfig,
    kernels: transformer.Kernels,
    variables: transformer.Variables,
    prefilled: Prefilled,
    lengths_P: Int[Array, "P"],
    rows: RowSettings,
    stop_ids_X: Int[Array, "X"],
    *,
    slots: int,
    truncate: bool,
) -> Decoded:
    """Answer every prompt B / P times, up to `slots` tokens, until every row has ended.

    A row ends with one of `stop_ids_X` (kept as its last token) or at its limit.
    """
    num_rows, num_prompts = rows.limit_B.shape[0], lengths_P.shape[0]
    answers = num_rows // num_prompts
    some = prefilled.latents.sparse if prefilled.latents.dense is None else prefilled.latents.dense
    assert some is not None, "a model has layers"
    prompt_PS = jnp.arange(some.latent.shape[2])[None, :] < lengths_P[:, None]
    start_B = jnp.repeat(lengths_P, answers)
    keys_B = jax.random.wrap_key_data(rows.keys_B2)
    ones_B1 = jnp.ones((num_rows, 1), jnp.int32)

    def unfinished(carry: _Carry) -> jax.Array:
        return (carry.step < slots) & ~jnp.all(carry.done_B)

    def advance(carry: _Carry) -> _Carry:
        step, decoded, done_B = carry.step, carry.decoded, carry.done_B
        noise_B = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, step)))(keys_B)
        drawn = sampling.sample(
            carry.logits_BV, noise_B, rows.temperature_B, rows.top_p_B, truncate=truncate
        )
        token_B = jnp.where(done_B, 0, drawn.token_B)
        logprob_B = jnp.where(done_B, 0.0, drawn.logprob_B)
        ends_B = (token_B[:, None] == stop_ids_X[None, :]).any(axis=1) & ~done_B
        put = jax.lax.dynamic_update_slice_in_dim
        decoded = Decoded(
            put(decoded.tokens_BN, token_B[:, None], step, axis=1),
            put(decoded.logprobs_BN, logprob_B[:, None], step, axis=1),
            decoded.length_B + jnp.where(done_B, 0, 1),
            decoded.stopped_B | ends_B,
        )
        past = transformer.DecodeInputs(
            _layer_caches(prefilled.latents.dense, carry.dense),
            _layer_caches(prefilled.latents.sparse, carry.sparse),
            cache.DecodeView(prompt_PS, jnp.arange(slots) < step),
        )
        layout = cache.Layout((start_B + step)[:, None], ones_B1, ones_B1)
        out = transformer.apply(
            config,
            variables,
            token_B[:, None],
            layout,
            past=past,
            previous_BTW=carry.tail_BW[:, None],
            kernels=kernels,
        )
        tail_BW = jnp.concatenate([token_B[:, None], carry.tail_BW], axis=1)
        return _Carry(
            step + 1,
            decoded,
            heads.logits(out.hidden_BTD, variables["params"]["unembed"])[:, 0],
            tail_BW[:, : config.embedding_taps],
            _write(carry.dense, out.latents.dense, step),
            _write(carry.sparse, out.latents.sparse, step),
            done_B | ends_B | (decoded.length_B >= rows.limit_B),
        )

    empty = Decoded(
        jnp.zeros((num_rows, slots), jnp.int32),
        jnp.zeros((num_rows, slots), jnp.float32),
        jnp.zeros((num_rows,), jnp.int32),
        jnp.zeros((num_rows,), bool),
    )
    carry = _Carry(
        jnp.zeros((), jnp.int32),
        empty,
        jnp.repeat(prefilled.logits_PV, answers, axis=0),
        jnp.repeat(prefilled.tail_PW, answers, axis=0),
        _empty(prefilled.latents.dense, num_rows, slots),
        _empty(prefilled.latents.sparse, num_rows, slots),
        rows.limit_B <= 0,
    )
    return jax.lax.while_loop(unfinished, advance, carry).decoded
