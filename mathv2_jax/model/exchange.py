"""Routed experts on a mesh: tokens travel to the devices that hold their experts, and back.

Every device keeps the tokens that the batch gives it and the experts of its place along `experts`.
It sorts its assignments by expert, sends each to the device that holds it, multiplies what it was
sent, and sends the results home, where they are weighted and summed. No token is dropped while it
fits: a device receives at most `Exchange.buffer` times what it would at an even load, and what is
beyond is left out and counted. Without a mesh, or on one device, nothing travels.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model import grouped


class Plan(NamedTuple):
    """Who sends how many rows to whom, and where they lie; alike on all S devices of a group.

    A sender's rows lie sorted by expert; a receiver's buffer holds the senders' rows in turn.
    """

    start_SD: Int[Array, "S D"]  # where in the sender's rows those for D begin
    place_SD: Int[Array, "S D"]  # where in the receiver's buffer those of S begin
    size_SD: Int[Array, "S D"]  # how many would go
    sent_SD: Int[Array, "S D"]  # how many go: what fits the buffer


# (rows, plan, rows of the buffer, axis) -> rows received; and its inverse, (rows of the buffer,
# plan, rows at home, axis) -> rows at home. Rows that nobody sent are zero.
Travel = Callable[[jax.Array, Plan, int, str], jax.Array]


def ragged_there(x_MD: jax.Array, plan: Plan, num_rows: int, axis: str) -> jax.Array:
    """`lax.ragged_all_to_all`: TPU and GPU; XLA has none for CPUs."""
    me = jax.lax.axis_index(axis)
    out_RD = jnp.zeros((num_rows, x_MD.shape[1]), x_MD.dtype)
    return jax.lax.ragged_all_to_all(
        x_MD,
        out_RD,
        plan.start_SD[me],
        plan.sent_SD[me],
        plan.place_SD[me],
        plan.sent_SD[:, me],
        axis_name=axis,
    )


def ragged_back(y_RD: jax.Array, plan: Plan, num_rows: int, axis: str) -> jax.Array:
    """The way home of `ragged_there`."""
    me = jax.lax.axis_index(axis)
    out_MD = jnp.zeros((num_rows, y_RD.shape[1]), y_RD.dtype)
    return jax.lax.ragged_all_to_all(
        y_RD,
        out_MD,
        plan.place_SD[:, me],
        plan.sent_SD[:, me],
        plan.start_SD[:, me],
        plan.sent_SD[me],
        axis_name=axis,
    )


def gathered_there(x_MD: jax.Array, plan: Plan, num_rows: int, axis: str) -> jax.Array:
    """The same by `all_gather` and a choice of rows: any platform, S times the traffic."""
    me = jax.lax.axis_index(axis)
    source_R, step_R, held_R = _whose(num_rows, plan.place_SD[:, me], plan.sent_SD[:, me])
    all_SMD = jax.lax.all_gather(x_MD, axis)
    rows_RD = all_SMD.at[source_R, plan.start_SD[source_R, me] + step_R].get(mode="clip")
    return jnp.where(held_R[:, None], rows_RD, 0)


def gathered_back(y_RD: jax.Array, plan: Plan, num_rows: int, axis: str) -> jax.Array:
    """The way home of `gathered_there`."""
    me = jax.lax.axis_index(axis)
    target_M, step_M, held_M = _whose(num_rows, plan.start_SD[me], plan.sent_SD[me])
    all_SRD = jax.lax.all_gather(y_RD, axis)
    rows_MD = all_SRD.at[target_M, plan.place_SD[me, target_M] + step_M].get(mode="clip")
    return jnp.where(held_M[:, None], rows_MD, 0)


def _whose(
    num_rows: int, first_S: Int[Array, "S"], count_S: Int[Array, "S"]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For rows that lie in runs from `first_S`: each one's run, its place there, whether it counts.

    Of runs that begin at the same row only the last can hold any.
    """
    row_R = jnp.arange(num_rows)
    run_R = jnp.sum(row_R[:, None] >= first_S[None, :], axis=1) - 1
    step_R = row_R - first_S[run_R]
    return run_R, step_R, step_R < count_S[run_R]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """How rows travel, and how many a device receives at most.

    `buffer`: in units of an even load; None has room for every row of the group.
    """

    there: Travel = gathered_there
    back: Travel = gathered_back
    buffer: float | None = None

    def __post_init__(self):
        if self.buffer is not None and not self.buffer >= 1:
            raise ValueError(
                f"expert buffer = {self.buffer}: must be at least 1, an even load; or None"
            )


def choose(platform: str, buffer: float | None = None) -> Exchange:
    """The exchange that JAX's `platform` has."""
    if platform == "cpu":
        return Exchange(buffer=buffer)
    return Exchange(there=ragged_there, back=ragged_back, buffer=buffer)


def run(
    x_BTD: Float[Array, "B T D"],
    ids_BTA: Int[Array, "B T A"],
    weights_BTA: Float[Array, "B T A"],
    experts: grouped.ExpertWeights,
    product: grouped.Experts,
    exchange: Exchange,
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """Each token's weighted experts, on the mesh in force; and how many assignments were left out.

    `product` is the grouped product of one device. B must be divisible by the mesh's batch axes; a
    T that its time axes do not divide stays whole on each of their devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _at_home(x_BTD, ids_BTA, weights_BTA, experts, product), jnp.zeros(())
    time = sharding.time_axis(x_BTD.shape[1])
    tokens = sharding.partition_spec(("batch", time, None), "tokens")
    split = sharding.mesh_axes(("batch", time) if time else ("batch",), mesh)
    group = sharding.mesh_axes(("experts",), mesh)
    partial = sharding.mesh_axes(("mlp",), mesh)

    def on_one_device(
        x_BTD: jax.Array, ids_BTA: jax.Array, weights_BTA: jax.Array, own: grouped.ExpertWeights
    ) -> tuple[jax.Array, jax.Array]:
        if group:
            (axis,) = group
            out_BTD, dropped = _travelled(x_BTD, ids_BTA, weights_BTA, own, product, exchange, axis)
        else:
            out_BTD, dropped = _at_home(x_BTD, ids_BTA, weights_BTA, own, product), jnp.zeros(())
        # A device holds a part of each expert's hidden width: its products are parts of a sum.
        return jax.lax.psum(out_BTD, partial), jax.lax.psum(dropped, split)

    into = sharding.partition_spec(("experts", None, "mlp"), "experts_gate and experts_up")
    out_of = sharding.partition_spec(("experts", "mlp", None), "experts_down")
    held = grouped.ExpertWeights._make((into, into, out_of))
    return jax.shard_map(
        on_one_device,
        in_specs=(tokens, tokens, tokens, held),
        out_specs=(tokens, PartitionSpec()),
        check_vma=False,
    )(x_BTD, ids_BTA, weights_BTA, experts)


def _at_home(
    x_BTD: jax.Array,
    ids_BTA: jax.Array,
    weights_BTA: jax.Array,
    experts: grouped.ExpertWeights,
    product: grouped.Experts,
) -> jax.Array:
    batch, length, width = x_BTD.shape
    per_token = ids_BTA.shape[-1]
    ids_NA, weights_NA = (a.reshape(-1, per_token) for a in (ids_BTA, weights_BTA))
    out_ND = product(x_BTD.reshape(-1, width), ids_NA, weights_NA, experts)
    return out_ND.reshape(batch, length, width)


def _travelled(
    x_BTD: jax.Array,
    ids_BTA: jax.Array,
    weights_BTA: jax.Array,
    experts: grouped.ExpertWeights,
    product: grouped.Experts,
    exchange: Exchange,
    axis: str,
) -> tuple[jax.Array, jax.Array]:
    """One device's part: its tokens to their experts' devices, others' to its own, and back."""
    batch, length, width = x_BTD.shape
    ids_NA = ids_BTA.reshape(-1, ids_BTA.shape[-1])
    ways, num_own = jax.lax.axis_size(axis), experts.gate_EDF.shape[0]
    me = jax.lax.axis_index(axis)
    order_M, inverse_M, sizes_E = grouped.sort_assignments(ids_NA, ways * num_own)
    count_SDE = jax.lax.all_gather(sizes_E, axis).reshape(ways, ways, num_own)
    plan, num_rows = _plan(count_SDE, ids_NA.size, exchange.buffer)
    x_MD = grouped.spread(x_BTD.reshape(-1, width), order_M, inverse_M)
    x_RD = exchange.there(x_MD, plan, num_rows, axis)
    ids_R = _received(count_SDE[:, me], plan.place_SD[:, me], plan.sent_SD[:, me], num_rows)
    y_RD = product(x_RD, ids_R[:, None], jnp.ones((num_rows, 1), jnp.float32), experts)
    y_MD = exchange.back(y_RD, plan, ids_NA.size, axis)
    y_NAD = grouped.gathered(y_MD, inverse_M, order_M).reshape(*ids_NA.shape, width)
    out_ND = grouped.combined(y_NAD, weights_BTA.reshape(ids_NA.shape))
    dropped = jnp.sum((plan.size_SD - plan.sent_SD)[me]).astype(jnp.float32)
    return out_ND.reshape(batch, length, width), dropped


def _plan(count_SDE: Int[Array, "S D E"], num_sent: int, buffer: float | None) -> tuple[Plan, int]:
    """The plan for what each sender has for each receiver's experts, and the buffer's rows."""
    ways = count_SDE.shape[0]
    num_rows = num_sent * ways if buffer is None else math.ceil(num_sent * min(buffer, ways))
    size_SD = jnp.sum(count_SDE, axis=2)
    start_SD = jnp.cumsum(size_SD, axis=1) - size_SD
    place_SD = jnp.cumsum(size_SD, axis=0) - size_SD
    sent_SD = jnp.clip(num_rows - place_SD, 0, size_SD)
    return Plan(start_SD, place_SD, size_SD, sent_SD), num_rows


def _received(
    count_SE: Int[Array, "S E"],
    place_S: Int[Array, "S"],
    sent_S: Int[Array, "S"],
    num_rows: int,
) -> Int[Array, "R"]:
    """Which of this device's experts each row of its buffer is for; E where there is no row."""
    source_R, step_R, held_R = _whose(num_rows, place_S, sent_S)
    end_SE = jnp.cumsum(count_SE, axis=1)
    ids_R = jnp.sum(step_R[:, None] >= end_SE[source_R], axis=1)
    return jnp.where(held_R, ids_R, count_SE.shape[1]).astype(jnp.int32)
