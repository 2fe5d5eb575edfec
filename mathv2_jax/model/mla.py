"""Multi-head latent attention: expanded for training and prefill, absorbed for decoding."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model import layers, rope
from mathv2_jax.model.config import ModelConfig

MASKED = -1e30
# The norms inside MLA keep this one whatever `norm_eps` says, in DeepSeek's code and elsewhere.
LATENT_NORM_EPS = 1e-6

Attend = Callable[[jax.Array, jax.Array, jax.Array, cache_lib.Layout, float], jax.Array]


def attend_densely(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHU: Float[Array, "B S H U"],
    layout: cache_lib.Layout,
    scale: float,
) -> Float[Array, "B T H U"]:
    """Softmax attention with the whole score matrix in memory; scores and softmax in float32."""
    score_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    mask_BTS = cache_lib.visible(layout)
    score_BHTS = jnp.where(mask_BTS[:, None], score_BHTS * scale, MASKED)
    weight_BHTS = jax.nn.softmax(score_BHTS, axis=-1).astype(v_BSHU.dtype)
    return jnp.einsum("BHTS,BSHU->BTHU", weight_BHTS, v_BSHU)


class LatentAttention(nn.Module):
    """MLA of one layer. `attend` is the expanded form's kernel, chosen at construction."""

    config: ModelConfig
    attend: Attend

    def setup(self):
        c = self.config
        key_width = c.head_key_width + c.head_rope_width
        q_in, q_axis = c.width, "embed"
        if c.q_latent_width:
            self.q_a_DQ = layers.weight(
                self, "q_a", (c.width, c.q_latent_width), ("embed", "q_latent"), c.width
            )
            self.q_norm = layers.RMSNorm(LATENT_NORM_EPS, name="q_a_norm")
            q_in, q_axis = c.q_latent_width, "q_latent"
        self.q_b_QHK = layers.weight(
            self, "q_b", (q_in, c.num_heads, key_width), (q_axis, "heads", "head_width"), q_in
        )
        self.kv_a_DC = layers.weight(
            self,
            "kv_a",
            (c.width, c.kv_latent_width + c.head_rope_width),
            ("embed", "kv_latent"),
            c.width,
        )
        self.kv_norm = layers.RMSNorm(LATENT_NORM_EPS, name="kv_a_norm")
        self.kv_b_CHK = layers.weight(
            self,
            "kv_b",
            (c.kv_latent_width, c.num_heads, c.head_key_width + c.head_value_width),
            ("kv_latent", "heads", "head_width"),
            c.kv_latent_width,
        )
        self.o_HUD = layers.weight(
            self,
            "o",
            (c.num_heads, c.head_value_width, c.width),
            ("heads", "head_width", "embed"),
            c.num_heads * c.head_value_width,
        )

    @property
    def scale(self) -> float:
        """1 / sqrt of the full key width, corrected where YaRN stretches the context."""
        c = self.config
        return (c.head_key_width + c.head_rope_width) ** -0.5 * rope.softmax_correction(c)

    def _queries(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H R"]]:
        c, dtype = self.config, x_BTD.dtype
        q_in_BTQ = x_BTD
        if c.q_latent_width:
            q_in_BTQ = self.q_norm(x_BTD @ self.q_a_DQ.astype(dtype))
        q_BTHK = jnp.einsum("BTQ,QHK->BTHK", q_in_BTQ, self.q_b_QHK.astype(dtype))
        q_BTHK = sharding.constrain(q_BTHK, "batch", "time", "heads", "head_width")
        nope, turned = jnp.split(q_BTHK, [c.head_key_width], axis=-1)
        return nope, rope.rotate(turned, positions_BT, rope.rotation(c))

    def _latents(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"]
    ) -> cache_lib.LatentPair:
        c = self.config
        both_BTC = x_BTD @ self.kv_a_DC.astype(x_BTD.dtype)
        latent_BTC, key_BTR = jnp.split(both_BTC, [c.kv_latent_width], axis=-1)
        key_BTR = rope.rotate(key_BTR[:, :, None, :], positions_BT, rope.rotation(c))[:, :, 0]
        return cache_lib.LatentPair(self.kv_norm(latent_BTC), key_BTR)

    def expanded(
        self, x_BTD: Float[Array, "B T D"], layout: cache_lib.Layout
    ) -> tuple[Float[Array, "B T D"], cache_lib.LatentPair]:
        """Attention over the row itself; also the latents that a cache would keep."""
        c, dtype = self.config, x_BTD.dtype
        q_BTHK, q_BTHR = self._queries(x_BTD, layout.positions_BT)
        latents = self._latents(x_BTD, layout.positions_BT)
        kv_BSHK = jnp.einsum("BSC,CHK->BSHK", latents.latent, self.kv_b_CHK.astype(dtype))
        k_BSHK, v_BSHU = jnp.split(kv_BSHK, [c.head_key_width], axis=-1)
        shared_BSHR = jnp.broadcast_to(latents.rope_key[:, :, None], q_BTHR.shape)
        out_BTHU = self.attend(
            jnp.concatenate([q_BTHK, q_BTHR], axis=-1),
            jnp.concatenate([k_BSHK, shared_BSHR], axis=-1),
            v_BSHU,
            layout,
            self.scale,
        )
        return jnp.einsum("BTHU,HUD->BTD", out_BTHU, self.o_HUD.astype(dtype)), latents

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
        q_B1HK, q_B1HR = self._queries(x_B1D, positions_B1)
        new = self._latents(x_B1D, positions_B1)
        key_CHK, value_CHU = jnp.split(self.kv_b_CHK.astype(dtype), [c.head_key_width], axis=-1)
        q_BHC = jnp.einsum("BHK,CHK->BHC", q_B1HK[:, 0], key_CHK)
        q_BHR = q_B1HR[:, 0]
        num_prompts = cached.prompt.latent.shape[0]
        q_PGHC = q_BHC.reshape((num_prompts, -1, *q_BHC.shape[1:]))
        q_PGHR = q_BHR.reshape((num_prompts, -1, *q_BHR.shape[1:]))
        score_of = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        prompt_PGHS = score_of("PGHC,PSC->PGHS", q_PGHC, cached.prompt.latent)
        prompt_PGHS += score_of("PGHR,PSR->PGHS", q_PGHR, cached.prompt.rope_key)
        prompt_PGHS = jnp.where(view.prompt_PS[:, None, None, :], prompt_PGHS, MASKED)
        own_BHN = score_of("BHC,BNC->BHN", q_BHC, cached.own.latent)
        own_BHN += score_of("BHR,BNR->BHN", q_BHR, cached.own.rope_key)
        own_BHN = jnp.where(view.own_N[None, None, :], own_BHN, MASKED)
        self_BH1 = score_of("BHC,B1C->BH1", q_BHC, new.latent)
        self_BH1 += score_of("BHR,B1R->BH1", q_BHR, new.rope_key)
        prompt_BHS = prompt_PGHS.reshape((*q_BHC.shape[:2], -1))
        score = jnp.concatenate([prompt_BHS, own_BHN, self_BH1], axis=-1)
        weight = jax.nn.softmax(score * self.scale, axis=-1).astype(dtype)
        slots = prompt_BHS.shape[-1]
        prompt_BHS, own_BHN, self_BH1 = jnp.split(weight, [slots, weight.shape[-1] - 1], axis=-1)
        prompt_PGHS = prompt_BHS.reshape(prompt_PGHS.shape)
        mixed_PGHC = jnp.einsum("PGHS,PSC->PGHC", prompt_PGHS, cached.prompt.latent)
        mixed_BHC = mixed_PGHC.reshape(q_BHC.shape)
        mixed_BHC += jnp.einsum("BHN,BNC->BHC", own_BHN, cached.own.latent)
        mixed_BHC += jnp.einsum("BH1,B1C->BHC", self_BH1, new.latent)
        out_BHU = jnp.einsum("BHC,CHU->BHU", mixed_BHC, value_CHU)
        out_BD = jnp.einsum("BHU,HUD->BD", out_BHU, self.o_HUD.astype(dtype))
        return out_BD[:, None], new
