"""DeepSeekMoE: sigmoid routing with bias correction, dropless experts, one shared expert path.

The grouped matrix product (grouped.py) and how tokens travel to experts on other devices
(exchange.py) are chosen at construction.
"""

import functools
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax.model import exchange as exchange_lib
from mathv2_jax.model import grouped, layers
from mathv2_jax.model.config import ModelConfig


class Routing(NamedTuple):
    """What the router of one layer (or, stacked, of all) decided."""

    experts_BTA: Int[Array, "... B T A"]
    load_E: Float[Array, "... E"]  # real tokens that chose each expert
    overflow: Float[Array, "..."]  # assignments left out: no room on their expert's device
    balance: Float[Array, "..."] | None = None  # see balance_loss


def choose_experts(
    score_NE: Float[Array, "N E"], bias_E: Float[Array, "E"], config: ModelConfig
) -> Int[Array, "N A"]:
    """Top experts by score + bias, within the best groups by the sum of their two best."""
    biased_NE = score_NE + bias_E[None, :]
    groups = config.num_expert_groups
    if groups > 1:
        biased_NXe = biased_NE.reshape(biased_NE.shape[0], groups, -1)
        best_two = min(2, biased_NXe.shape[-1])
        group_NX = jax.lax.top_k(biased_NXe, best_two)[0].sum(axis=-1)
        chosen_NX = jax.lax.top_k(group_NX, config.expert_groups_per_token)[1]
        kept_NX = (chosen_NX[:, :, None] == jnp.arange(groups)[None, None, :]).any(axis=1)
        biased_NXe = jnp.where(kept_NX[:, :, None], biased_NXe, -jnp.inf)
        biased_NE = biased_NXe.reshape(biased_NE.shape)
    return jax.lax.top_k(biased_NE, config.experts_per_token)[1].astype(jnp.int32)


def balance_loss(
    score_BTE: Float[Array, "B T E"], segments_BT: Int[Array, "B T"], per_token: int
) -> Float[Array, ""]:
    """Sequence-wise balance (DeepSeek-V3 report, equations 17 to 20), weighed by sequence length.

    A sequence is a segment: a prompt and each answer that shares it count apart. The sum over
    sequences of T sum_i f_i P_i: divided by the number of real tokens it is a mean of the
    report's loss. f has no gradient. The least value is 1 a token, at an even load.
    """
    num_experts, num_segments = score_BTE.shape[-1], segments_BT.shape[1] + 1
    best_BTA = jax.lax.top_k(jax.lax.stop_gradient(score_BTE), per_token)[1]
    chosen_BTE = (best_BTA[..., None] == jnp.arange(num_experts)[None, None, None, :]).any(axis=2)
    share_BTE = score_BTE / (jnp.sum(score_BTE, axis=-1, keepdims=True) + 1e-20)
    total = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=num_segments))
    chosen_BXE = total(chosen_BTE.astype(jnp.float32), segments_BT)
    share_BXE = total(share_BTE, segments_BT)
    length_BX = total(jnp.ones(segments_BT.shape, jnp.float32), segments_BT)
    loss_BX = jnp.sum(chosen_BXE * share_BXE, axis=-1) / jnp.maximum(length_BX, 1.0)
    return jnp.sum(loss_BX[:, 1:]) * (num_experts / per_token)


class SparseMlp(nn.Module):
    """Routed experts plus shared experts. The router bias lives in collection `router`.

    `kept_BTA` (or None) replays experts chosen elsewhere, -1 where the live choice stands; the
    weights always come from the live dense scores, so the gate keeps its gradient. With
    `segments_BT` the routing carries the balance loss of those sequences.
    """

    config: ModelConfig
    product: grouped.Experts
    exchange: exchange_lib.Exchange = exchange_lib.Exchange()

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        real_BT: Array,
        kept_BTA: Int[Array, "B T A"] | None,
        segments_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        c, dtype = self.config, x_BTD.dtype
        own = functools.partial(layers.weight, self, dtype=c.param_dtype, used_in=dtype)
        router_DE = own(
            "router", (c.width, c.num_experts), ("embed", "router"), c.width, used_in=None
        )
        bias = nn.with_logical_partitioning(nn.initializers.zeros, ("router",))
        bias_E = cast(
            Array,
            self.variable("router", "bias", bias, None, (c.num_experts,), jnp.float32).value,
        )
        shape_in = (c.num_experts, c.width, c.expert_width)
        axes_in = ("experts", "embed", "mlp")
        gate_EDF = own("experts_gate", shape_in, axes_in, c.width)
        up_EDF = own("experts_up", shape_in, axes_in, c.width)
        down_EFD = own(
            "experts_down",
            (c.num_experts, c.expert_width, c.width),
            ("experts", "mlp", "embed"),
            c.expert_width,
        )
        batch, length, width = x_BTD.shape
        x_ND = x_BTD.reshape(-1, width)
        logit_NE = jnp.matmul(
            x_ND.astype(jnp.float32),
            router_DE.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        score_NE = jax.nn.sigmoid(logit_NE)
        ids_NA = choose_experts(jax.lax.stop_gradient(score_NE), bias_E, c)
        if kept_BTA is not None:
            kept_NA = kept_BTA.reshape(ids_NA.shape)
            ids_NA = jnp.where(kept_NA >= 0, kept_NA, ids_NA)
        weight_NA = jnp.take_along_axis(score_NE, ids_NA, axis=1)
        if c.normalize_expert_weights:
            weight_NA = weight_NA / (jnp.sum(weight_NA, axis=1, keepdims=True) + 1e-20)
        stacked = grouped.ExpertWeights(gate_EDF, up_EDF, down_EFD)
        ids_BTA = ids_NA.reshape(batch, length, -1)
        weight_BTA = (weight_NA * c.routed_scaling).reshape(ids_BTA.shape)
        with jax.named_scope("experts"):
            out_BTD, overflow = exchange_lib.run(
                x_ND.reshape(x_BTD.shape), ids_BTA, weight_BTA, stacked, self.product, self.exchange
            )
        if c.num_shared_experts:
            hidden = c.num_shared_experts * c.expert_width
            out_BTD = out_BTD + layers.GatedMlp(hidden, c.param_dtype, name="shared")(x_BTD)
        one_hot_NAE = ids_NA[:, :, None] == jnp.arange(c.num_experts)[None, None, :]
        real_NAE = one_hot_NAE & real_BT.reshape(-1)[:, None, None]
        load_E = jnp.sum(real_NAE, axis=(0, 1)).astype(jnp.float32)
        balance = None
        if segments_BT is not None:
            score_BTE = score_NE.reshape(batch, length, -1)
            balance = balance_loss(score_BTE, segments_BT, c.experts_per_token)
        return out_BTD, Routing(ids_BTA, load_E, overflow, balance)


def updated_bias(
    bias_LE: Float[Array, "L E"], load_LE: Float[Array, "L E"], rate: float
) -> Float[Array, "L E"]:
    """Move each bias a fixed step against its load (DeepSeek-V3, auxiliary-loss-free balance)."""
    error_LE = jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE
    return bias_LE + rate * jnp.sign(error_LE)
