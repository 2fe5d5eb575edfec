"""DeepSeek sparse attention (DeepSeek-V3.2 report, section 2.1): indexer, selection, alignment.

The indexer scores every visible token for every query; attention sees the best `index_topk` of
them. Selection has no gradient and the indexer's input is detached, so the indexer learns from its
alignment with attention alone, and nothing else learns from that.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mathv2_jax.model import layers, rope
from mathv2_jax.model.config import ModelConfig

KEY_NORM_EPS = 1e-6
_GROUP = 128  # tokens, as many as a TPU's vector has lanes


class IndexQueries(NamedTuple):
    """Per token: its indexer heads, and what each head's score weighs (float32)."""

    heads_BTJW: Float[Array, "B T J W"]
    weights_BTJ: Float[Array, "B T J"]


class Indexer(nn.Module):
    """The lightning indexer of one layer. Both methods detach what they are given."""

    config: ModelConfig

    def setup(self):
        c = self.config
        own = functools.partial(layers.weight, self, dtype=c.param_dtype, used_in=c.compute_dtype)
        self.q_b_QJW = own(
            "q_b",
            (c.q_latent_width, c.index_heads, c.index_head_width),
            ("latent_in", "heads", "head_width"),
            c.q_latent_width,
        )
        self.k_DW = own("k", (c.width, c.index_head_width), ("embed", "head_width"), c.width)
        self.k_norm = layers.LayerNorm(KEY_NORM_EPS, c.param_dtype, name="k_norm")
        self.weights_DJ = own(
            "weights", (c.width, c.index_heads), ("embed", "heads"), c.width, used_in=c.param_dtype
        )

    def queries(
        self,
        x_BTD: Float[Array, "B T D"],
        q_latent_BTQ: Float[Array, "B T Q"],
        positions_BT: Int[Array, "B T"],
    ) -> IndexQueries:
        """From the normed stream and the normed query latent."""
        x_BTD, q_latent_BTQ = jax.lax.stop_gradient((x_BTD, q_latent_BTQ))
        heads_BTJW = jnp.einsum("BTQ,QJW->BTJW", q_latent_BTQ, self.q_b_QJW)
        weights_BTJ = jnp.einsum(
            "BTD,DJ->BTJ",
            x_BTD.astype(jnp.float32),
            self.weights_DJ.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        scale = self.config.index_heads**-0.5
        return IndexQueries(self._turned(heads_BTJW, positions_BT), weights_BTJ * scale)

    def keys(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T W"]:
        """From the normed stream: what the indexer's cache keeps."""
        x_BTD = jax.lax.stop_gradient(x_BTD)
        key_BTW = self.k_norm(x_BTD @ self.k_DW)
        return self._turned(key_BTW[:, :, None], positions_BT)[:, :, 0]

    def _turned(self, x_BTNW: jax.Array, positions_BT: jax.Array) -> jax.Array:
        turned, kept = jnp.split(x_BTNW, [self.config.head_rope_width], axis=-1)
        turned = rope.rotate_halves(turned, positions_BT, rope.rotation(self.config))
        return jnp.concatenate([turned, kept], axis=-1)


class Index(NamedTuple):
    """What narrows a row's attention, and what of it is asked for.

    `topk` tokens are picked for each query (0: attention stays dense); with `align` the kernel
    gives `alignment` with attention over what is seen.
    """

    queries: IndexQueries
    keys_BSW: Float[Array, "B S W"]
    topk: int
    align: bool

    @property
    def num_heads(self) -> int:
        """The indexer's."""
        return self.queries.heads_BTJW.shape[2]


def scores(queries: IndexQueries, keys_BSW: Float[Array, "B S W"]) -> Float[Array, "B T S"]:
    """Equation 1: sum over heads of weight * relu(query . key), the product scaled by W^-1/2."""
    product_BTJS = jnp.einsum(
        "BTJW,BSW->BTJS", queries.heads_BTJW, keys_BSW, preferred_element_type=jnp.float32
    )
    hits_BTJS = nn.relu(product_BTJS * keys_BSW.shape[-1] ** -0.5)
    return jnp.einsum("BTJ,BTJS->BTS", queries.weights_BTJ, hits_BTJS)


def nth_largest(x_BTS: Float[Array, "B T S"], n: int) -> Float[Array, "B T 1"]:
    """The n-th largest of each row, exactly: its 32 bits one by one, the highest first.

    Every bit costs one look at the row. A sort, which a top-k of thousands is, takes longer to run
    and minutes to compile for TPUs.
    """
    bits_BTS = jax.lax.bitcast_convert_type(x_BTS, jnp.int32)
    # Ordered like the floats: of negative ones all bits but the sign are turned round.
    key_BTS = bits_BTS ^ ((bits_BTS >> 31) & jnp.int32(0x7FFFFFFF))

    def one_bit(step: jax.Array, found_BT1: jax.Array) -> jax.Array:
        # The first step is from the smallest number to 0, and wraps.
        tried_BT1 = found_BT1 + (jnp.int32(1) << (31 - step))
        enough_BT1 = jnp.sum(key_BTS >= tried_BT1, axis=-1, keepdims=True) >= n
        return jnp.where(enough_BT1, tried_BT1, found_BT1)

    smallest_BT1 = jnp.full((*x_BTS.shape[:-1], 1), jnp.iinfo(jnp.int32).min)
    key_BT1 = jax.lax.fori_loop(0, 32, one_bit, smallest_BT1)
    return jax.lax.bitcast_convert_type(
        key_BT1 ^ ((key_BT1 >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32
    )


def select(
    score_BTS: Float[Array, "B T S"], seen_BTS: Bool[Array, "B T S"], topk: int
) -> Bool[Array, "B T S"]:
    """The `topk` best of the seen tokens, the earlier one at a tie; all where fewer are seen."""
    if topk >= score_BTS.shape[-1]:
        return seen_BTS
    score_BTS = jnp.where(seen_BTS, jax.lax.stop_gradient(score_BTS), -jnp.inf)
    last_BT1 = nth_largest(score_BTS, topk)
    above_BTS, level_BTS = score_BTS > last_BT1, score_BTS == last_BT1
    room_BT1 = topk - jnp.sum(above_BTS, axis=-1, keepdims=True)
    first_BTS = jnp.cumsum(level_BTS, axis=-1) <= room_BT1
    return seen_BTS & (above_BTS | (level_BTS & first_BTS))


def pick(
    score_BTS: Float[Array, "B T S"], seen_BTS: Bool[Array, "B T S"], topk: int
) -> tuple[Int[Array, "B T X"], Int[Array, "B T 1"]]:
    """The places of what `select` selects, in their order, X = min(topk, S); and how many it is.

    Without a sort or a scatter. The row lies in groups of 128: the n-th chosen token's group is
    found by the groups' counts, and its place there by the group's own.
    """
    chosen_BTS = select(score_BTS, seen_BTS, topk)
    length = chosen_BTS.shape[-1]
    chosen_BTS = jnp.pad(chosen_BTS, ((0, 0), (0, 0), (0, -length % _GROUP)))
    upto_BTGL = jnp.cumsum(chosen_BTS.reshape(*chosen_BTS.shape[:2], -1, _GROUP), axis=-1)
    upto_BTG = jnp.cumsum(upto_BTGL[..., -1], axis=-1)
    number_11X = jnp.arange(min(topk, length))[None, None]
    count_BT1 = upto_BTG[..., -1:]
    group_BTX = jnp.sum(upto_BTG[:, :, None, :] <= number_11X[..., None], axis=-1)
    group_BTX = jnp.minimum(group_BTX, upto_BTG.shape[-1] - 1)
    before_BTX = jnp.take_along_axis(upto_BTG - upto_BTGL[..., -1], group_BTX, axis=-1)
    own_BTXL = jnp.take_along_axis(upto_BTGL, group_BTX[..., None], axis=2)
    place_BTX = jnp.sum(own_BTXL <= (number_11X - before_BTX)[..., None], axis=-1)
    places_BTX = jnp.where(number_11X < count_BT1, group_BTX * _GROUP + place_BTX, 0)
    return places_BTX, count_BT1


def attention_mean(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    kept_BTS: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T S"]:
    """Attention's distribution over `kept_BTS`, summed over heads and normalised to one."""
    score_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    score_BHTS = jnp.where(kept_BTS[:, None], score_BHTS * scale, layers.MASKED)
    return jnp.mean(jax.nn.softmax(score_BHTS, axis=-1), axis=1)


def alignment(
    score_BTS: Float[Array, "B T S"],
    kept_BTS: Bool[Array, "B T S"],
    target_BTS: Float[Array, "B T S"],
    real_BT: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Equations 3 and 4: KL(target || softmax of the scores over `kept_BTS`), summed over tokens.

    `target_BTS` is detached and is a distribution over `kept_BTS`.
    """
    target_BTS = jax.lax.stop_gradient(target_BTS)
    logprob_BTS = jax.nn.log_softmax(jnp.where(kept_BTS, score_BTS, layers.MASKED), axis=-1)
    counts_BTS = kept_BTS & (target_BTS > 0.0)
    log_target_BTS = jnp.log(jnp.where(counts_BTS, target_BTS, 1.0))
    each_BTS = target_BTS * (log_target_BTS - logprob_BTS)
    each_BT = jnp.sum(jnp.where(counts_BTS, each_BTS, 0.0), axis=-1)
    return jnp.sum(jnp.where(real_BT, each_BT, 0.0))
