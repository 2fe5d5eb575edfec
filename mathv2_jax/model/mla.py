"""Multi-head latent attention: of whole rows for training, over pages for sampling."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model import attention, dsa, layers, paged, picked, rope
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model.config import ModelConfig

# The norms inside MLA keep this one whatever `norm_eps` says, in DeepSeek's code and elsewhere.
LATENT_NORM_EPS = 1e-6

# What an indexer learns from: nothing, dense attention (warm-up), or sparse attention.
ALIGN_NAMES = ("off", "dense", "sparse")


class LatentAttention(nn.Module):
    """MLA of one layer. `attend` is the expanded form's kernel, chosen at construction.

    `gathers` tells which rows' narrowed attention is of picked latents instead; of pages, `slots`
    are attended to together, in `rows` of a sampler's rows (0: in all).

    With an indexer, attention is narrowed to the tokens that it picks, unless `align` is "dense".
    """

    config: ModelConfig
    attend: attention.Attend
    align: str = "off"
    gathers: picked.Gathers = picked.never
    slots: int = 64
    rows: int = 0

    def setup(self):
        c = self.config
        own = functools.partial(layers.weight, self, dtype=c.param_dtype, used_in=c.compute_dtype)
        key_width = c.head_key_width + c.head_rope_width
        q_in, q_axis = c.width, "embed"
        if c.q_latent_width:
            self.q_a_DQ = own("q_a", (c.width, c.q_latent_width), ("embed", "q_latent"), c.width)
            self.q_norm = layers.RMSNorm(LATENT_NORM_EPS, c.param_dtype, name="q_a_norm")
            q_in, q_axis = c.q_latent_width, "latent_in"
        self.q_b_QHK = own(
            "q_b", (q_in, c.num_heads, key_width), (q_axis, "heads", "head_width"), q_in
        )
        self.kv_a_DC = own(
            "kv_a",
            (c.width, c.kv_latent_width + c.head_rope_width),
            ("embed", "kv_latent"),
            c.width,
        )
        self.kv_norm = layers.RMSNorm(LATENT_NORM_EPS, c.param_dtype, name="kv_a_norm")
        self.kv_b_CHK = own(
            "kv_b",
            (c.kv_latent_width, c.num_heads, c.head_key_width + c.head_value_width),
            ("latent_in", "heads", "head_width"),
            c.kv_latent_width,
        )
        self.o_HUD = own(
            "o",
            (c.num_heads, c.head_value_width, c.width),
            ("heads", "head_width", "embed"),
            c.num_heads * c.head_value_width,
        )
        self.indexer = dsa.Indexer(c, name="indexer") if c.index_topk else None

    @property
    def scale(self) -> float:
        """1 / sqrt of the full key width, corrected where YaRN stretches the context."""
        c = self.config
        return (c.head_key_width + c.head_rope_width) ** -0.5 * rope.softmax_correction(c)

    def _query_input(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T Q"]:
        """What queries are made of: the normed latent, or the stream itself."""
        if not self.config.q_latent_width:
            return x_BTD
        return self.q_norm(x_BTD @ self.q_a_DQ)

    def _queries(
        self, q_in_BTQ: Float[Array, "B T Q"], positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H R"]]:
        c = self.config
        q_BTHK = jnp.einsum("BTQ,QHK->BTHK", q_in_BTQ, self.q_b_QHK)
        q_BTHK = sharding.constrain(q_BTHK, "batch", "time", "heads", "head_width")
        nope, turned = jnp.split(q_BTHK, [c.head_key_width], axis=-1)
        return nope, rope.rotate(turned, positions_BT, rope.rotation(c))

    def _latents(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]
    ) -> cache_lib.LatentPair:
        c = self.config
        both_BTC = x_BTD @ self.kv_a_DC
        latent_BTC, key_BTR = jnp.split(both_BTC, [c.kv_latent_width], axis=-1)
        key_BTR = rope.rotate(key_BTR[:, :, None, :], positions_BT, rope.rotation(c))[:, :, 0]
        index_BTW = None if self.indexer is None else self.indexer.keys(x_BTD, positions_BT)
        return cache_lib.LatentPair(self.kv_norm(latent_BTC), key_BTR, index_BTW)

    def expanded(
        self, x_BTD: Float[Array, "B T D"], layout: cache_lib.Layout
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""] | None]:
        """Attention over the row itself, and the alignment.

        That is the indexer's loss, a sum over real tokens, or None where `align` is "off".
        """
        c = self.config
        q_in_BTQ = self._query_input(x_BTD)
        q_BTHK, q_BTHR = self._queries(q_in_BTQ, layout.positions_BT)
        # Where the mesh splits time, latents travel: they are small beside heads.
        whole = jax.tree.map(
            lambda x: sharding.constrain(x, "batch", None, None),
            self._latents(x_BTD, layout.positions_BT),
        )
        narrow = self.align != "dense" and 0 < c.index_topk < x_BTD.shape[1]
        index = None
        if self.indexer is not None and (narrow or self.align != "off"):
            assert whole.index_key is not None, "a model with an indexer keeps its keys"
            queries = self.indexer.queries(x_BTD, q_in_BTQ, layout.positions_BT)
            topk = c.index_topk if narrow else 0
            index = dsa.Index(queries, whole.index_key, topk, self.align != "off")
        if index is not None and narrow and self.gathers(c, x_BTD.shape[1]):
            out_BTHU, loss = picked.attend(
                q_BTHK, q_BTHR, whole, self.kv_b_CHK, layout, self.scale, index
            )
            return jnp.einsum("BTHU,HUD->BTD", out_BTHU, self.o_HUD), loss
        kv_BSHK = jnp.einsum("BSC,CHK->BSHK", whole.latent, self.kv_b_CHK)
        kv_BSHK = sharding.constrain(kv_BSHK, "batch", None, "heads", "head_width")
        k_BSHK, v_BSHU = jnp.split(kv_BSHK, [c.head_key_width], axis=-1)
        shape = (*k_BSHK.shape[:-1], c.head_rope_width)
        shared_BSHR = jnp.broadcast_to(whole.rope_key[:, :, None], shape)
        q_BTHK = jnp.concatenate([q_BTHK, q_BTHR], axis=-1)
        k_BSHK = jnp.concatenate([k_BSHK, shared_BSHR], axis=-1)
        with jax.named_scope("attend"):
            out_BTHU, loss = self.attend(q_BTHK, k_BSHK, v_BSHU, layout, self.scale, index)
        return jnp.einsum("BTHU,HUD->BTD", out_BTHU, self.o_HUD), loss

    def paged(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        pages: cache_lib.Pages,
        layer: Int[Array, ""],
        view: cache_lib.PageView,
    ) -> tuple[Float[Array, "B T D"], cache_lib.Pages]:
        """Attention of new tokens over their sequences in pages, which hold them afterwards."""
        c = self.config
        q_in_BTQ = self._query_input(x_BTD)
        q_BTHK, q_BTHR = self._queries(q_in_BTQ, positions_BT)
        pages = cache_lib.write(pages, layer, view, self._latents(x_BTD, positions_BT))
        index = None
        if self.indexer is not None and c.index_topk < cache_lib.capacity(pages, view):
            index = self.indexer.queries(x_BTD, q_in_BTQ, positions_BT)
        held = paged.Held(pages, layer, view, self.slots, self.rows)
        out_BTHU = paged.attend(
            q_BTHK, q_BTHR, self.kv_b_CHK, held, self.scale, index, c.index_topk
        )
        return jnp.einsum("BTHU,HUD->BTD", out_BTHU, self.o_HUD), pages
