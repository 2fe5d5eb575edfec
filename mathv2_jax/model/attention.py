"""Attention over a row's own tokens in expanded form: the kernels, one of which is chosen once.

All are equal up to rounding; `attend_densely` is the reference. With an indexer (`dsa.Index`) they
narrow attention to the tokens that it picks, and give the loss that it learns from.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mathv2_jax import sharding
from mathv2_jax.model import blocks, dsa, layers
from mathv2_jax.model import cache as cache_lib

# (queries, keys, values, layout, scale, index) -> (mixed values, the indexer's loss or None).
Attend = Callable[
    [jax.Array, jax.Array, jax.Array, cache_lib.Layout, float, dsa.Index | None],
    tuple[jax.Array, jax.Array | None],
]


def mixed(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHU: Float[Array, "B S H U"],
    seen_BTS: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T H U"]:
    """Softmax attention over what is seen; scores and softmax in float32."""
    score_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    score_BHTS = jnp.where(seen_BTS[:, None], score_BHTS * scale, layers.MASKED)
    weight_BHTS = jax.nn.softmax(score_BHTS, axis=-1).astype(v_BSHU.dtype)
    return jnp.einsum("BHTS,BSHU->BTHU", weight_BHTS, v_BSHU)


def _part(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHU: jax.Array,
    seen_BTS: jax.Array,
    real_BT: jax.Array,
    scale: float,
    index: dsa.Index | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Some queries over some keys, the index being of the same; the loss is a sum over queries."""
    if index is None:
        return mixed(q_BTHK, k_BSHK, v_BSHU, seen_BTS, scale), None
    loss = None
    with jax.named_scope("index"):
        score_BTS = dsa.scores(index.queries, index.keys_BSW)
        if index.topk:
            seen_BTS = dsa.select(score_BTS, seen_BTS, index.topk)
    if index.align:
        target_BTS = dsa.attention_mean(*jax.lax.stop_gradient((q_BTHK, k_BSHK)), seen_BTS, scale)
        loss = dsa.alignment(score_BTS, seen_BTS, target_BTS, real_BT)
    return mixed(q_BTHK, k_BSHK, v_BSHU, seen_BTS, scale), loss


def attend_densely(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHU: Float[Array, "B S H U"],
    layout: cache_lib.Layout,
    scale: float,
    index: dsa.Index | None = None,
) -> tuple[Float[Array, "B T H U"], Float[Array, ""] | None]:
    """The whole score matrix in memory."""
    seen_BTS, real_BT = cache_lib.visible(layout), layout.segments_BT > 0
    return _part(q_BTHK, k_BSHK, v_BSHU, seen_BTS, real_BT, scale, index)


def attend_in_blocks(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHU: Float[Array, "B S H U"],
    layout: cache_lib.Layout,
    scale: float,
    index: dsa.Index | None = None,
    *,
    block: int | None = None,
    chunks: int = blocks.CHUNKS,
) -> tuple[Float[Array, "B T H U"], Float[Array, ""] | None]:
    """`block` queries at a time, a device, and their scores once more in the backward pass.

    So memory holds [B, H, block, S] of scores, and [B, block, S] of an indexer's choice; `block`
    None is 128, or as many as keep the scores of a row below 2 GiB. With 8 chunks (`blocks.over`)
    9 / 16 of the square is computed. For any platform.
    """
    heads = q_BTHK.shape[2] if index is None else max(q_BTHK.shape[2], index.num_heads)
    cut = blocks.cut_for(q_BTHK.shape[1], heads, block, chunks)
    queries = None if index is None else index.queries
    keys = None if index is None else index.keys_BSW

    def of_block(asked, held, where):
        (q_BtHK, queries), (k_BSHK, v_BSHU, keys_BSW) = asked, held
        part = None
        if index is not None and queries is not None and keys_BSW is not None:
            part = index._replace(queries=queries, keys_BSW=keys_BSW)
        return _part(q_BtHK, k_BSHK, v_BSHU, where.seen, where.real, scale, part)

    asked, held = cut.apart((q_BTHK, queries)), (k_BSHK, v_BSHU, keys)
    out, loss = blocks.over(cut, layout, asked, held, of_block)
    out = sharding.constrain(cut.joined(out), "batch", "time", "heads", None)
    return out, loss


def attend_by_length(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHU: jax.Array,
    layout: cache_lib.Layout,
    scale: float,
    index: dsa.Index | None = None,
    *,
    whole: int = 1024,
) -> tuple[jax.Array, jax.Array | None]:
    """Rows of at most `whole` tokens at once, longer ones in blocks."""
    form = attend_densely if q_BTHK.shape[1] <= whole else attend_in_blocks
    return form(q_BTHK, k_BSHK, v_BSHU, layout, scale, index)
