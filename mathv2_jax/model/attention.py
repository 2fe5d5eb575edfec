"""Attention over a row's own tokens in expanded form: the kernels, one of which is chosen once.

All are equal up to rounding; `attend_densely` is the reference. With an indexer (`dsa.Index`) they
narrow attention to the tokens that it picks, and give the loss that it learns from.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mathv2_jax import sharding
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model import dsa, layers

# (queries, keys, values, layout, scale, index) -> (mixed values, the indexer's loss or None).
Attend = Callable[
    [jax.Array, jax.Array, jax.Array, cache_lib.Layout, float, dsa.Index | None],
    tuple[jax.Array, jax.Array | None],
]
_CHUNKS = 8
_TILE_BYTES = 2**31


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
    chunks: int = _CHUNKS,
) -> tuple[Float[Array, "B T H U"], Float[Array, ""] | None]:
    """`block` queries at a time, a device, and their scores once more in the backward pass.

    So memory holds [B, H, block, S] of scores, and [B, block, S] of an indexer's choice; `block`
    None is 128, or as many as keep the scores of a row below 2 GiB. The keys after the last of a
    chunk of queries (T / `chunks`) are left out: with 8 chunks 9 / 16 of the square is computed.
    Where the mesh splits time, its devices take blocks in turn, so that each has as much to do as
    the others. For any platform.
    """
    batch, length = q_BTHK.shape[:2]
    ways = sharding.ways("time")
    if block is None:
        heads = q_BTHK.shape[2] if index is None else max(q_BTHK.shape[2], index.num_heads)
        a_query = 4 * length * -(-heads // sharding.ways("heads"))
        block = max(1, min(128, _TILE_BYTES // a_query))
    block = min(block, -(-length // ways))
    chunks = min(chunks, -(-length // (ways * block)))
    loops = -(-length // (chunks * ways * block))
    turn = ways * block  # the queries of one step, `block` of each device
    padded = chunks * loops * turn

    def cut(x_BT: jax.Array) -> jax.Array:
        """[chunks, loops, B, turn, ...]: a device's block of each turn lies where it computes."""
        x_BT = jnp.pad(x_BT, ((0, 0), (0, padded - length), *((0, 0),) * (x_BT.ndim - 2)))
        x_BT = x_BT.reshape(batch, chunks, loops, turn, *x_BT.shape[2:])
        x = jnp.moveaxis(x_BT, 0, 2)
        free = (sharding.FREE,) * (x.ndim - 4)
        return sharding.constrain(x, None, None, "batch", "time", *free)

    places_T = jnp.arange(length, dtype=jnp.int32)
    places_BT = jnp.broadcast_to(places_T[None], (batch, length))
    asked = (q_BTHK, places_BT, layout.segments_BT, layout.prefixes_BT)
    asked = jax.tree.map(cut, (asked, None if index is None else index.queries))
    outs, losses = [], []
    for chunk in range(chunks):
        end = min(length, (chunk + 1) * loops * turn)
        keys = (k_BSHK[:, :end], v_BSHU[:, :end], layout.segments_BT[:, :end])
        of_index = None if index is None else index.keys_BSW[:, :end]

        @jax.checkpoint
        def step(some, keys=keys, of_index=of_index):
            (q_BtHK, places_Bt, segments_Bt, prefixes_Bt), queries = some
            k_BSHK, v_BSHU, segments_BS = keys
            seen_BtS = cache_lib.visible_from(segments_Bt, prefixes_Bt, places_Bt, segments_BS)
            part = None
            if index is not None and queries is not None and of_index is not None:
                part = index._replace(queries=queries, keys_BSW=of_index)
            return _part(q_BtHK, k_BSHK, v_BSHU, seen_BtS, segments_Bt > 0, scale, part)

        out, loss = jax.lax.map(step, jax.tree.map(lambda x, i=chunk: x[i], asked))
        outs.append(out)
        losses.append(loss)
    out = jnp.moveaxis(jnp.stack(outs), 2, 0).reshape(batch, padded, *v_BSHU.shape[2:])[:, :length]
    out = sharding.constrain(out, "batch", "time", "heads", None)
    if losses[0] is None:
        return out, None
    return out, functools.reduce(jnp.add, map(jnp.sum, losses))


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
