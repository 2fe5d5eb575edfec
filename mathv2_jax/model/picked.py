"""Sparse attention of long rows: of each query's picked latents, which are gathered, alone.

Equal to attention in expanded form that is narrowed by the same indexer (model/attention.py) up to
rounding. The work of a query no longer grows with the row, but for the indexer's scores; in
absorbed form, as in decoding, since keys and values expanded anew for each query would not pay.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model import blocks, dsa, layers
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model.config import ModelConfig

# (model, tokens of a row) -> whether its sparse attention gathers.
Gathers = Callable[[ModelConfig, int], bool]


def never(config: ModelConfig, length: int) -> bool:
    """Attention is expanded, and masked."""
    del config, length
    return False


def always(config: ModelConfig, length: int) -> bool:
    """Attention is gathered wherever the indexer narrows it."""
    del config, length
    return True


def where_cheaper(config: ModelConfig, length: int, *, whole: int = 1024) -> bool:
    """Where it takes fewer products than 9 / 16 of the square; rows up to `whole` stay expanded."""
    c = config
    gathered = c.index_topk * (2 * c.kv_latent_width + c.head_rope_width)
    expanded = length * (c.head_key_width + c.head_rope_width + c.head_value_width)
    return length > whole and gathered < 9 / 16 * expanded


def attend(
    q_BTHK: Float[Array, "B T H K"],
    q_BTHR: Float[Array, "B T H R"],
    latents: cache_lib.LatentPair,
    kv_b_CHX: Float[Array, "C H X"],
    layout: cache_lib.Layout,
    scale: float,
    index: dsa.Index,
    *,
    block: int | None = None,
    chunks: int = blocks.CHUNKS,
) -> tuple[Float[Array, "B T H U"], Float[Array, ""] | None]:
    """Queries, as heads' own part and as the rotated one, over the latents of whole rows.

    `kv_b_CHX` expands a latent to keys (K) and values (U). Gives values by head, and the indexer's
    loss where `index.align`. ValueError for an index that picks nothing (`topk` = 0).
    """
    if not index.topk:
        raise ValueError("index.topk = 0: attention that is not narrowed has nothing to gather")
    cut = blocks.cut_for(q_BTHK.shape[1], index.num_heads, block, chunks)
    key_CHK, value_CHU = jnp.split(kv_b_CHX, [q_BTHK.shape[-1]], axis=-1)
    q_BTHK, q_BTHR, queries = cut.apart((q_BTHK, q_BTHR, index.queries))
    q_BTHC = jnp.einsum("...HK,CHK->...HC", q_BTHK, key_CHK)

    def of_block(asked, held, where):
        (q_BTHC, q_BTHR, queries), (latent_BSC, key_BSR, index_BSW) = asked, held
        with jax.named_scope("index"):
            score_BTS = dsa.scores(queries, index_BSW)
            found = dsa.pick(score_BTS, where.seen, index.topk)
            places_BTX, count_BT1 = ad_checkpoint.checkpoint_name(found, blocks.KEPT)
        kept_BTX = jnp.arange(places_BTX.shape[-1])[None, None] < count_BT1
        latent_BTXC, key_BTXR = _rows(latent_BSC, places_BTX), _rows(key_BSR, places_BTX)
        score_of = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        score_BHTX = score_of("BTHC,BTXC->BHTX", q_BTHC, latent_BTXC)
        score_BHTX += score_of("BTHR,BTXR->BHTX", q_BTHR, key_BTXR)
        score_BHTX = jnp.where(kept_BTX[:, None], score_BHTX * scale, layers.MASKED)
        weight_BHTX = jax.nn.softmax(score_BHTX, axis=-1)
        mixed_BTHC = jnp.einsum("BHTX,BTXC->BTHC", weight_BHTX.astype(q_BTHC.dtype), latent_BTXC)
        if not index.align:
            return mixed_BTHC, None
        with jax.named_scope("index"):
            own_BTX = jnp.take_along_axis(score_BTS, places_BTX, axis=-1)
            target_BTX = jnp.mean(weight_BHTX, axis=1)
            return mixed_BTHC, dsa.alignment(own_BTX, kept_BTX, target_BTX, where.real)

    held = (latents.latent, latents.rope_key, index.keys_BSW)
    with jax.named_scope("attend"):
        mixed_BTHC, loss = blocks.over(cut, layout, (q_BTHC, q_BTHR, queries), held, of_block)
    out_BTHU = cut.joined(jnp.einsum("...HC,CHU->...HU", mixed_BTHC, value_CHU))
    return sharding.constrain(out_BTHU, "batch", "time", "heads", None), loss


def _rows(x_BSC: Float[Array, "B S C"], places_BTX: Int[Array, "B T X"]) -> Float[Array, "B T X C"]:
    return jax.vmap(lambda x_SC, at_TX: x_SC.at[at_TX].get(mode="promise_in_bounds"))(
        x_BSC, places_BTX
    )
