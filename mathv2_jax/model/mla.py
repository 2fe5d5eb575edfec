"""Multi-head latent attention: expanded for training and prefill, absorbed for decoding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model import attention, dsa, layers, picked, rope
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model.config import ModelConfig

# The norms inside MLA keep this one whatever `norm_eps` says, in DeepSeek's code and elsewhere.
LATENT_NORM_EPS = 1e-6

# What an indexer learns from: nothing, dense attention (warm-up), or sparse attention.
ALIGN_NAMES = ("off", "dense", "sparse")


class LatentAttention(nn.Module):
    """MLA of one layer. `attend` is the expanded form's kernel, chosen at construction.

    `gathers` tells which rows' narrowed attention is of picked latents instead.

    With an indexer, attention is narrowed to the tokens that it picks, unless `align` is "dense".
    """

    config: ModelConfig
    attend: attention.Attend
    align: str = "off"
    gathers: picked.Gathers = picked.never

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
    ) -> tuple[Float[Array, "B T D"], cache_lib.LatentPair, Float[Array, ""] | None]:
        """Attention over the row itself; the latents that a cache would keep; the alignment.

        The last is the indexer's loss, a sum over real tokens, or None where `align` is "off".
        """
        c = self.config
        q_in_BTQ = self._query_input(x_BTD)
        q_BTHK, q_BTHR = self._queries(q_in_BTQ, layout.positions_BT)
        latents = self._latents(x_BTD, layout.positions_BT)
        # Where the mesh splits time, latents travel: they are small beside heads.
        whole = jax.tree.map(lambda x: sharding.constrain(x, "batch", None, None), latents)
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
            return jnp.einsum("BTHU,HUD->BTD", out_BTHU, self.o_HUD), latents, loss
        kv_BSHK = jnp.einsum("BSC,CHK->BSHK", whole.latent, self.kv_b_CHK)
        kv_BSHK = sharding.constrain(kv_BSHK, "batch", None, "heads", "head_width")
        k_BSHK, v_BSHU = jnp.split(kv_BSHK, [c.head_key_width], axis=-1)
        shape = (*k_BSHK.shape[:-1], c.head_rope_width)
        shared_BSHR = jnp.broadcast_to(whole.rope_key[:, :, None], shape)
        q_BTHK = jnp.concatenate([q_BTHK, q_BTHR], axis=-1)
        k_BSHK = jnp.concatenate([k_BSHK, shared_BSHR], axis=-1)
        with jax.named_scope("attend"):
            out_BTHU, loss = self.attend(q_BTHK, k_BSHK, v_BSHU, layout, self.scale, index)
        return jnp.einsum("BTHU,HUD->BTD", out_BTHU, self.o_HUD), latents, loss

    def absorbed(
        self,
        x_B1D: Float[Array, "B 1 D"],
        positions_B1: Int[Array, "B 1"],
        cached: cache_lib.LayerCache,
        view: cache_lib.DecodeView,
    ) -> tuple[Float[Array, "B 1 D"], cache_lib.LatentPair]:
        """Attention of one new token a row over its prompt, its own past and itself.

        Works on the latents: the key half of `kv_b` goes into the query, the value half is
        applied after the weighted sum, so heads are never expanded over the cache.
        """
        c, dtype = self.config, x_B1D.dtype
        q_in_B1Q = self._query_input(x_B1D)
        q_B1HK, q_B1HR = self._queries(q_in_B1Q, positions_B1)
        new = self._latents(x_B1D, positions_B1)
        key_CHK, value_CHU = jnp.split(self.kv_b_CHK, [c.head_key_width], axis=-1)
        q_BHC = jnp.einsum("BHK,CHK->BHC", q_B1HK[:, 0], key_CHK)
        q_BHR = q_B1HR[:, 0]
        num_prompts = cached.prompt.latent.shape[0]
        q_PGHC = q_BHC.reshape((num_prompts, -1, *q_BHC.shape[1:]))
        q_PGHR = q_BHR.reshape((num_prompts, -1, *q_BHR.shape[1:]))
        score_of = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        prompt_PGHS = score_of("PGHC,PSC->PGHS", q_PGHC, cached.prompt.latent)
        prompt_PGHS += score_of("PGHR,PSR->PGHS", q_PGHR, cached.prompt.rope_key)
        own_BHN = score_of("BHC,BNC->BHN", q_BHC, cached.own.latent)
        own_BHN += score_of("BHR,BNR->BHN", q_BHR, cached.own.rope_key)
        self_BH1 = score_of("BHC,B1C->BH1", q_BHC, new.latent)
        self_BH1 += score_of("BHR,B1R->BH1", q_BHR, new.rope_key)
        prompt_BHS = prompt_PGHS.reshape((*q_BHC.shape[:2], -1))
        score = jnp.concatenate([prompt_BHS, own_BHN, self_BH1], axis=-1)
        seen_BX = _seen(view, q_BHC.shape[0])
        if self.indexer is not None and c.index_topk < seen_BX.shape[-1]:
            queries = self.indexer.queries(x_B1D, q_in_B1Q, positions_B1)
            index_B1X = _index_scores(queries, cached, new)
            seen_BX = dsa.select(index_B1X, seen_BX[:, None], c.index_topk)[:, 0]
        score = jnp.where(seen_BX[:, None], score * self.scale, layers.MASKED)
        weight = jax.nn.softmax(score, axis=-1).astype(dtype)
        slots = prompt_BHS.shape[-1]
        prompt_BHS, own_BHN, self_BH1 = jnp.split(weight, [slots, weight.shape[-1] - 1], axis=-1)
        prompt_PGHS = prompt_BHS.reshape(prompt_PGHS.shape)
        mixed_PGHC = jnp.einsum("PGHS,PSC->PGHC", prompt_PGHS, cached.prompt.latent)
        mixed_BHC = mixed_PGHC.reshape(q_BHC.shape)
        mixed_BHC += jnp.einsum("BHN,BNC->BHC", own_BHN, cached.own.latent)
        mixed_BHC += jnp.einsum("BH1,B1C->BHC", self_BH1, new.latent)
        out_BHU = jnp.einsum("BHC,CHU->BHU", mixed_BHC, value_CHU)
        out_BD = jnp.einsum("BHU,HUD->BD", out_BHU, self.o_HUD)
        return out_BD[:, None], new


def _seen(view: cache_lib.DecodeView, num_rows: int) -> Bool[Array, "B X"]:
    """The slots that count, of a row's prompt, of its own past, and its new token itself."""
    answers = num_rows // view.prompt_PS.shape[0]
    own_BN = jnp.broadcast_to(view.own_N[None, :], (num_rows, view.own_N.shape[0]))
    prompt_BS = jnp.repeat(view.prompt_PS, answers, axis=0)
    return jnp.concatenate([prompt_BS, own_BN, jnp.ones((num_rows, 1), bool)], axis=1)


def _index_scores(
    queries: dsa.IndexQueries, cached: cache_lib.LayerCache, new: cache_lib.LatentPair
) -> Float[Array, "B 1 X"]:
    """The indexer's scores over the slots of `_seen`; prompts are read once for all answers."""
    prompt_PSW, own_BNW, new_B1W = (x.index_key for x in (cached.prompt, cached.own, new))
    assert prompt_PSW is not None and own_BNW is not None and new_B1W is not None
    of_answers = dsa.IndexQueries(
        *(x.reshape((prompt_PSW.shape[0], -1, *x.shape[2:])) for x in queries)
    )
    prompt_PGS = dsa.scores(of_answers, prompt_PSW)
    prompt_B1S = prompt_PGS.reshape((own_BNW.shape[0], 1, -1))
    rest = dsa.scores(queries, jnp.concatenate([own_BNW, new_B1W], axis=1))
    return jnp.concatenate([prompt_B1S, rest], axis=-1)
