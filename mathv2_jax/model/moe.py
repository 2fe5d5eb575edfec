"""DeepSeekMoE: sigmoid routing with bias correction, dropless experts, one shared expert path.

The grouped matrix product is a function chosen at construction. All forms here are dropless and
equal up to rounding; `every_expert` is the reference.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax.model import layers
from mathv2_jax.model.config import ModelConfig


class ExpertWeights(NamedTuple):
    """The routed experts of one layer, stacked."""

    gate_EDF: Float[Array, "E D F"]
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]


Experts = Callable[[jax.Array, jax.Array, jax.Array, ExpertWeights], jax.Array]


def every_expert(
    x_ND: Float[Array, "N D"],
    ids_NA: Int[Array, "N A"],
    weights_NA: Float[Array, "N A"],
    experts: ExpertWeights,
) -> Float[Array, "N D"]:
    """The reference: each expert sees each token, unchosen ones weigh nothing. E / A times work."""
    num_experts = experts.gate_EDF.shape[0]
    chosen_NAE = ids_NA[:, :, None] == jnp.arange(num_experts)[None, None, :]
    weight_NE = jnp.sum(jnp.where(chosen_NAE, weights_NA[:, :, None], 0.0), axis=1)
    gate_ENF = jnp.einsum("ND,EDF->ENF", x_ND, experts.gate_EDF)
    h_ENF = nn.silu(gate_ENF) * jnp.einsum("ND,EDF->ENF", x_ND, experts.up_EDF)
    h_ENF = h_ENF * weight_NE.T[:, :, None].astype(x_ND.dtype)
    return jnp.einsum("ENF,EFD->ND", h_ENF, experts.down_EFD)


def sorted_blocks(
    x_ND: Float[Array, "N D"],
    ids_NA: Int[Array, "N A"],
    weights_NA: Float[Array, "N A"],
    experts: ExpertWeights,
    block: int | None = None,
) -> Float[Array, "N D"]:
    """Assignments grouped by expert, each group padded to whole blocks, one product a block.

    For CPUs, where `lax.ragged_dot` costs as much as every expert on every row. Memory holds one
    copy of an expert per block, so it is for small experts. `block` None: 16 to 64 rows, by the
    mean group, or up to 128 where an expert's matrix is not tiny: tools/bench_step.py's layers of
    192 x 96 and 384 x 192 take 10 and 20 % less time so, forward and backward.
    """
    num_experts, width, hidden = experts.gate_EDF.shape
    num_tokens, per_token = ids_NA.shape
    most = 64 if width * hidden < 128 * 64 else 128
    block = block or min(most, max(16, ids_NA.size // (4 * num_experts)))
    flat_M = ids_NA.reshape(-1)
    one_hot_ME = (flat_M[:, None] == jnp.arange(num_experts)[None, :]).astype(jnp.int32)
    running_ME = jnp.cumsum(one_hot_ME, axis=0)
    rank_M = jnp.take_along_axis(running_ME, flat_M[:, None], axis=1)[:, 0] - 1
    blocks_E = -(-running_ME[-1] // block)
    end_E = jnp.cumsum(blocks_E)
    slot_M = (end_E - blocks_E)[flat_M] * block + rank_M
    num_blocks = -(-flat_M.shape[0] // block) + num_experts
    source_S = jnp.full((num_blocks * block,), num_tokens * per_token, dtype=jnp.int32)
    source_S = source_S.at[slot_M].set(jnp.arange(flat_M.shape[0], dtype=jnp.int32))
    padded_ND = jnp.concatenate([x_ND, jnp.zeros_like(x_ND[:1])], axis=0)
    x_KbD = padded_ND[source_S // per_token].reshape(num_blocks, block, -1)
    block_ids_K = jnp.arange(num_blocks, dtype=end_E.dtype)
    owner_K = jnp.sum(block_ids_K[:, None] >= end_E[None, :], axis=1)
    owner_K = jnp.minimum(owner_K, num_experts - 1)
    gate_KbF = jnp.einsum("KbD,KDF->KbF", x_KbD, experts.gate_EDF[owner_K])
    h_KbF = nn.silu(gate_KbF) * jnp.einsum("KbD,KDF->KbF", x_KbD, experts.up_EDF[owner_K])
    y_KbD = jnp.einsum("KbF,KFD->KbD", h_KbF, experts.down_EFD[owner_K])
    y_NAD = y_KbD.reshape(num_blocks * block, -1)[slot_M].reshape(num_tokens, per_token, -1)
    return _combined(y_NAD, weights_NA)


def _combined(y_NAD: Float[Array, "N A D"], weights_NA: Float[Array, "N A"]) -> Float[Array, "N D"]:
    """The weighted sum of each token's experts, in float32."""
    out_ND = jnp.einsum("NAD,NA->ND", y_NAD.astype(jnp.float32), weights_NA)
    return out_ND.astype(y_NAD.dtype)


def ragged(
    x_ND: Float[Array, "N D"],
    ids_NA: Int[Array, "N A"],
    weights_NA: Float[Array, "N A"],
    experts: ExpertWeights,
) -> Float[Array, "N D"]:
    """Assignments sorted by expert and `lax.ragged_dot`: native on TPU and GPU."""
    per_token, num_experts = ids_NA.shape[1], experts.gate_EDF.shape[0]
    flat_M = ids_NA.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True)
    sizes_E = jnp.bincount(flat_M, length=num_experts).astype(jnp.int32)
    x_MD = x_ND[order_M // per_token]
    gate_MF = jax.lax.ragged_dot(x_MD, experts.gate_EDF, sizes_E)
    h_MF = nn.silu(gate_MF) * jax.lax.ragged_dot(x_MD, experts.up_EDF, sizes_E)
    y_MD = jax.lax.ragged_dot(h_MF, experts.down_EFD, sizes_E)
    inverse_M = jnp.argsort(order_M)
    y_NAD = y_MD[inverse_M].reshape(*ids_NA.shape, -1)
    return _combined(y_NAD, weights_NA)


class Routing(NamedTuple):
    """What the router of one layer (or, stacked, of all) decided."""

    experts_BTA: Int[Array, "... B T A"]
    load_E: Float[Array, "... E"]  # real tokens that chose each expert
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
    experts: Experts

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        real_BT: Array,
        kept_BTA: Int[Array, "B T A"] | None,
        segments_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        c, dtype = self.config, x_BTD.dtype
        own = functools.partial(layers.weight, self, dtype=c.param_dtype)
        router_DE = own("router", (c.width, c.num_experts), ("embed", "router"), c.width)
        bias = nn.with_logical_partitioning(nn.initializers.zeros, ("router",))
        bias_E = cast(
            Array,
            self.variable("router", "bias", bias, None, (c.num_experts,), jnp.float32).value,
        )
        shape_in, shape_out = (c.num_experts, c.width, c.expert_width), ("experts", "embed", "mlp")
        gate_EDF = own("experts_gate", shape_in, shape_out, c.width)
        up_EDF = own("experts_up", shape_in, shape_out, c.width)
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
        stacked = ExpertWeights(
            gate_EDF.astype(dtype), up_EDF.astype(dtype), down_EFD.astype(dtype)
        )
        routed_ND = self.experts(x_ND, ids_NA, weight_NA * c.routed_scaling, stacked)
        out_BTD = routed_ND.reshape(batch, length, width)
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
        return out_BTD, Routing(ids_NA.reshape(batch, length, -1), load_E, balance)


def updated_bias(
    bias_LE: Float[Array, "L E"], load_LE: Float[Array, "L E"], rate: float
) -> Float[Array, "L E"]:
    """Move each bias a fixed step against its load (DeepSeek-V3, auxiliary-loss-free balance)."""
    error_LE = jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE
    return bias_LE + rate * jnp.sign(error_LE)
