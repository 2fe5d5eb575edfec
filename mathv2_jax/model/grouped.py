"""The grouped matrix product of routed experts on one device, in forms equal up to rounding.

One is chosen at construction; `every_expert` is the reference. All take every assignment: nothing
is dropped. An assignment to expert E, one past the last, is to none: its token must be zero, and
what comes of it is zero.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import megablox as kernels
from jaxtyping import Array, Float, Int


class ExpertWeights(NamedTuple):
    """The routed experts of one layer, stacked."""

    gate_EDF: Float[Array, "E D F"]
    up_EDF: Float[Array, "E D F"]
    down_EFD: Float[Array, "E F D"]


# Rows, and about as much of each width, that one step of the Pallas kernels takes. A tile that two
# groups share is computed for both, so rows are fewer than would be quickest without groups.
_TILES = (256, 1024)
_LANES = 128
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
    flat_M = jnp.minimum(ids_NA.reshape(-1), num_experts - 1)
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
    return combined(y_NAD, weights_NA)


def combined(y_NAD: Float[Array, "N A D"], weights_NA: Float[Array, "N A"]) -> Float[Array, "N D"]:
    """The weighted sum of each token's experts, in float32."""
    out_ND = jnp.einsum("NAD,NA->ND", y_NAD.astype(jnp.float32), weights_NA)
    return out_ND.astype(y_NAD.dtype)


def sort_assignments(
    ids_NA: Int[Array, "N A"], num_experts: int
) -> tuple[Int[Array, "M"], Int[Array, "M"], Int[Array, "E"]]:
    """The order of the assignments by expert, its inverse, and how many each expert has."""
    flat_M = ids_NA.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True)
    rows_M = jnp.arange(flat_M.shape[0], dtype=order_M.dtype)
    inverse_M = jnp.zeros_like(order_M).at[order_M].set(rows_M, unique_indices=True)
    sizes_E = jnp.sum(flat_M[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    return order_M, inverse_M, sizes_E


@jax.custom_vjp
def spread(
    x_ND: Float[Array, "N D"], order_M: Int[Array, "M"], inverse_M: Int[Array, "M"]
) -> Float[Array, "M D"]:
    """Each token once per assignment, in order. Its gradient gathers too: scatters are slow."""
    return x_ND[order_M // (order_M.shape[0] // x_ND.shape[0])]


def _spread_forward(x_ND: jax.Array, order_M: jax.Array, inverse_M: jax.Array) -> tuple:
    return spread(x_ND, order_M, inverse_M), (inverse_M, x_ND)


def _spread_backward(kept: tuple[jax.Array, jax.Array], slope_MD: jax.Array) -> tuple:
    inverse_M, x_ND = kept
    slope_NAD = slope_MD[inverse_M].reshape(x_ND.shape[0], -1, x_ND.shape[1])
    return jnp.sum(slope_NAD, axis=1, dtype=jnp.float32).astype(x_ND.dtype), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def gathered(
    y_MD: Float[Array, "M D"], inverse_M: Int[Array, "M"], order_M: Int[Array, "M"]
) -> Float[Array, "M D"]:
    """Rows back in the order of their assignments; the gradient is the opposite gather."""
    return y_MD[inverse_M]


gathered.defvjp(
    lambda y_MD, inverse_M, order_M: (y_MD[inverse_M], order_M),
    lambda order_M, slope_MD: (slope_MD[order_M], None, None),
)


def ragged(
    x_ND: Float[Array, "N D"],
    ids_NA: Int[Array, "N A"],
    weights_NA: Float[Array, "N A"],
    experts: ExpertWeights,
) -> Float[Array, "N D"]:
    """Assignments sorted by expert and `lax.ragged_dot`: native on GPU, and forward on TPU.

    TPUs' compiler (libtpu 0.0.42) multiplies weights' gradients once for every expert.
    """
    return _by_group(x_ND, ids_NA, weights_NA, experts, jax.lax.ragged_dot)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of a product, by its sizes: (rows, inner width, outer width) of each step.

    Of a width that is no multiple of `width` the part, from a half to one and a half of that, that
    leaves the least of the last tile empty.
    """

    rows: int
    width: int

    def __call__(self, rows: int, inner: int, outer: int) -> tuple[int, int, int]:
        """JAX's kernels ask for each product apart, those of a gradient too."""
        return min(self.rows, rows), self._part(inner), self._part(outer)

    def _part(self, width: int) -> int:
        if width <= self.width:
            return width
        step = min(_LANES, self.width)
        parts = range(step, 3 * self.width // 2 + 1, step)
        return min(
            (part for part in parts if 2 * part >= self.width),
            key=lambda part: (-width % part, abs(part - self.width)),
        )


def megablox(
    x_ND: Float[Array, "N D"],
    ids_NA: Int[Array, "N A"],
    weights_NA: Float[Array, "N A"],
    experts: ExpertWeights,
    *,
    most: tuple[int, int] = _TILES,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """Assignments sorted by expert and JAX's Pallas kernels for TPUs, gradients by group too.

    A step of a kernel takes the rows of `most`, and of both widths about as much as it says (see
    Tiles); `interpret` runs it on any platform, slowly.
    """
    tiles = Tiles(*most)

    def product(x_MD: jax.Array, y_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        rows = x_MD.shape[0]
        padding = -rows % min(tiles.rows, rows)
        # Rows of no group are never written: what stands there must not come out, nor go back.
        grouped_M1 = (jnp.arange(rows + padding) < jnp.sum(sizes_E))[:, None]
        x_MD = jnp.where(grouped_M1, jnp.pad(x_MD, ((0, padding), (0, 0))), 0)
        out_MF = kernels.gmm(x_MD, y_EDF, sizes_E, x_MD.dtype, tiles, interpret=interpret)
        return jnp.where(grouped_M1, out_MF, 0)[:rows]

    return _by_group(x_ND, ids_NA, weights_NA, experts, product)


def _by_group(
    x_ND: jax.Array,
    ids_NA: jax.Array,
    weights_NA: jax.Array,
    experts: ExpertWeights,
    product: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    order_M, inverse_M, sizes_E = sort_assignments(ids_NA, experts.gate_EDF.shape[0])
    x_MD = spread(x_ND, order_M, inverse_M)
    gate_MF = product(x_MD, experts.gate_EDF, sizes_E)
    h_MF = nn.silu(gate_MF) * product(x_MD, experts.up_EDF, sizes_E)
    y_MD = product(h_MF, experts.down_EFD, sizes_E)
    y_NAD = gathered(y_MD, inverse_M, order_M).reshape(*ids_NA.shape, -1)
    return combined(y_NAD, weights_NA)
