"""The two compiled programs of an engine: prompts into pages, and rows a number of tokens further.

Both work on a pool of pages (`model.cache`) that they take over and give back. A row's noise is a
function of its own key and of how many tokens it has drawn, so an answer does not depend on what
runs beside it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from mathv2_jax.model import cache, heads, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import sampling


class Chunks(NamedTuple):
    """R pieces of T tokens of prompts, right-padded; several may be of one prompt, in order.

    `previous_RTW` are the tokens before each, the nearest first, for models with embedding taps.
    """

    tokens_RT: Int[Array, "R T"]
    positions_RT: Int[Array, "R T"]
    previous_RTW: Int[Array, "R T W"]
    view: cache.PageView


class Rows(NamedTuple):
    """B sequences, each about to be fed `token_B`; see PageView for the last three.

    `previous_BW` are the tokens before it, the nearest first. `drawn_B` counts the tokens drawn so
    far, of `limit_B` at most (0: a row not in use). `stops_BX` are ids that end the row, -1 none.
    """

    token_B: Int[Array, "B"]
    previous_BW: Int[Array, "B W"]
    position_B: Int[Array, "B"]
    drawn_B: Int[Array, "B"]
    limit_B: Int[Array, "B"]
    stops_BX: Int[Array, "B X"]
    keys_B2: UInt32[Array, "B 2"]
    temperature_B: Float[Array, "B"]
    truncation: sampling.Truncation
    table_BM: Int[Array, "B M"]
    shared_B: Int[Array, "B"]
    padded_B: Int[Array, "B"]


class Drawn(NamedTuple):
    """Up to K tokens a row: its first `count_B` are real, the ending one among them.

    `experts_KLBA` are those that the token fed in each step was sent to (L sparse layers), and
    `kept_BKY` the ids that a truncated row could have drawn, of which there were `num_kept_BK`;
    both None where not asked for.
    """

    tokens_BK: Int[Array, "B K"]
    logprobs_BK: Float[Array, "B K"]
    policy_logprobs_BK: Float[Array, "B K"]
    count_B: Int[Array, "B"]
    stopped_B: Bool[Array, "B"]
    experts_KLBA: Int[Array, "K L B A"] | None
    kept_BKY: Int[Array, "B K Y"] | None
    num_kept_BK: Int[Array, "B K"] | None


class _Carry(NamedTuple):
    step: Int[Array, ""]
    cache: transformer.Cache
    drawn: Drawn
    token_B: Int[Array, "B"]
    previous_BW: Int[Array, "B W"]
    done_B: Bool[Array, "B"]


class Programs:
    """The programs of one model, compiled per shape; engines of one model share them."""

    def __init__(self, config: ModelConfig, kernels: transformer.Kernels):
        self.config, self.kernels = config, kernels
        self.prefill = jax.jit(
            functools.partial(prefill, config, kernels),
            donate_argnums=1,
            static_argnames=("experts",),
        )
        self.decode = jax.jit(
            functools.partial(decode, config, kernels),
            donate_argnums=1,
            static_argnames=("steps", "truncate", "experts", "most_kept"),
        )


def prefill(
    config: ModelConfig,
    kernels: transformer.Kernels,
    variables: transformer.Variables,
    pages: transformer.Cache,
    chunks: Chunks,
    *,
    experts: bool = False,
) -> tuple[transformer.Cache, Float[Array, "R 3"], Int[Array, "L R T A"] | None]:
    """The pages with these tokens; the verifier head's P(score) after each chunk's last token; and,
    where asked for, the experts that each token was sent to.
    """
    real_RT = (chunks.view.slots_BT >= 0).astype(jnp.int32)
    layout = cache.Layout(chunks.positions_RT, real_RT, real_RT)
    out = transformer.apply(
        config,
        variables,
        chunks.tokens_RT,
        layout,
        past=transformer.Past(pages, chunks.view),
        previous_BTW=chunks.previous_RTW,
        kernels=kernels,
    )
    last_R = jnp.maximum(jnp.sum(real_RT, axis=1) - 1, 0)
    hidden_RD = jnp.take_along_axis(out.hidden_BTD, last_R[:, None, None], axis=1)[:, 0]
    params = variables["params"]
    head_R3 = heads.score_logits(
        hidden_RD, params["verifier_head_kernel"], params["verifier_head_bias"]
    )
    sent = out.routing.experts_BTA if experts and out.routing is not None else None
    return out.cache, jax.nn.softmax(head_R3, axis=-1), sent


def decode(  # noqa: PLR0913 - the last four choose what is compiled
    config: ModelConfig,
    kernels: transformer.Kernels,
    variables: transformer.Variables,
    pages: transformer.Cache,
    rows: Rows,
    least: Int[Array, ""],
    *,
    steps: int,
    truncate: bool = False,
    experts: bool = False,
    most_kept: int = 0,
) -> tuple[transformer.Cache, Drawn]:
    """Up to `steps` tokens for every row that is not done, while at least `least` are not.

    A row is done with one of its stop ids (kept as its last token) or at its limit. `truncate`
    False promises that no row is truncated; `most_kept` > 0 records what truncation kept.
    """
    num_rows = rows.token_B.shape[0]
    keys_B = jax.random.wrap_key_data(rows.keys_B2)
    ones_B1 = jnp.ones((num_rows, 1), jnp.int32)
    num_sparse = config.num_sparse_layers if experts else 0

    def going(carry: _Carry) -> jax.Array:
        left = jnp.sum(~carry.done_B)
        return (carry.step < steps) & (left >= jnp.maximum(least, 1))

    def advance(carry: _Carry) -> _Carry:
        step, done_B = carry.step, carry.done_B
        position_B = rows.position_B + step
        slot_B = rows.padded_B + position_B - rows.shared_B
        view = cache.PageView(
            rows.table_BM,
            jnp.where(done_B, -1, slot_B)[:, None],
            rows.shared_B,
            rows.padded_B,
        )
        out = transformer.apply(
            config,
            variables,
            carry.token_B[:, None],
            cache.Layout(position_B[:, None], ones_B1, ones_B1),
            past=transformer.Past(carry.cache, view),
            previous_BTW=carry.previous_BW[:, None],
            kernels=kernels,
        )
        logits_BV = heads.logits(out.hidden_BTD, variables["params"]["unembed"])[:, 0]
        number_B = rows.drawn_B + step
        noise_B = jax.vmap(lambda k, n: jax.random.uniform(jax.random.fold_in(k, n)))(
            keys_B, number_B
        )
        rules = rows.truncation if truncate else None
        found = sampling.sample(logits_BV, noise_B, rows.temperature_B, rules)
        token_B = jnp.where(done_B, 0, found.token_B)
        ends_B = (token_B[:, None] == rows.stops_BX).any(axis=1) & ~done_B
        drawn = _noted(carry.drawn, step, done_B, token_B, ends_B, found, out)
        previous_BW = jnp.concatenate([carry.token_B[:, None], carry.previous_BW], axis=1)
        return _Carry(
            step + 1,
            out.cache,
            drawn,
            token_B,
            previous_BW[:, : config.embedding_taps],
            done_B | ends_B | (number_B + 1 >= rows.limit_B),
        )

    def table(dtype: Any, *more: int) -> jax.Array:
        return jnp.zeros((num_rows, steps, *more), dtype)

    kept = truncate and most_kept > 0
    start = Drawn(
        tokens_BK=table(jnp.int32),
        logprobs_BK=table(jnp.float32),
        policy_logprobs_BK=table(jnp.float32),
        count_B=jnp.zeros((num_rows,), jnp.int32),
        stopped_B=jnp.zeros((num_rows,), bool),
        experts_KLBA=jnp.zeros((steps, num_sparse, num_rows, config.experts_per_token), jnp.int32)
        if num_sparse
        else None,
        kept_BKY=table(jnp.int32, most_kept) if kept else None,
        num_kept_BK=table(jnp.int32) if kept else None,
    )
    carry = _Carry(
        jnp.zeros((), jnp.int32),
        pages,
        start,
        rows.token_B,
        rows.previous_BW,
        rows.drawn_B >= rows.limit_B,
    )
    found = jax.lax.while_loop(going, advance, carry)
    return found.cache, found.drawn


def _noted(
    drawn: Drawn,
    step: jax.Array,
    done_B: jax.Array,
    token_B: jax.Array,
    ends_B: jax.Array,
    found: sampling.Sampled,
    out: transformer.TrunkOutput,
) -> Drawn:
    """What was drawn up to and with this step."""
    put = jax.lax.dynamic_update_slice_in_dim

    def noted(old_BK: jax.Array, new_B: jax.Array) -> jax.Array:
        new_B = jnp.where(done_B.reshape(-1, *(1,) * (new_B.ndim - 1)), 0, new_B)
        return put(old_BK, new_B[:, None].astype(old_BK.dtype), step, axis=1)

    drawn = drawn._replace(
        tokens_BK=noted(drawn.tokens_BK, token_B),
        logprobs_BK=noted(drawn.logprobs_BK, found.logprob_B),
        policy_logprobs_BK=noted(drawn.policy_logprobs_BK, found.policy_logprob_B),
        count_B=drawn.count_B + jnp.where(done_B, 0, 1),
        stopped_B=drawn.stopped_B | ends_B,
    )
    if drawn.experts_KLBA is not None and out.routing is not None:
        sent_LBA = out.routing.experts_BTA[:, :, 0]
        drawn = drawn._replace(experts_KLBA=put(drawn.experts_KLBA, sent_LBA[None], step, axis=0))
    if drawn.kept_BKY is not None and drawn.num_kept_BK is not None and found.kept_BV is not None:
        most = drawn.kept_BKY.shape[-1]
        ids_BY, number_B = sampling.kept_ids(found.kept_BV, most)
        drawn = drawn._replace(
            kept_BKY=noted(drawn.kept_BKY, ids_BY),
            num_kept_BK=noted(drawn.num_kept_BK, number_B),
        )
    return drawn
