"""Whether the product of routed experts grows with their number on a chip.

Each row is of one expert, so the work is that of the rows. A compiler may do otherwise, above all
for the weights' gradient: multiply all rows once for every expert. Executed FLOPs are counted from
traced programs (pods/counting.py) and would not show it. So the product is compiled; and since a
compiler knows of kernels what they declare alone, the tiles that their grids visit are counted.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mathv2_jax.model import grouped
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import tiles

# As many as a chip of DeepSeek-V3.2's mesh has at 4,096 tokens each: each group's last tile weighs
# more in few rows.
_ROWS = 2**15
_FEW, _MANY = 2, 8
_LIMIT = 1.2  # times the FLOPs of few experts


def flops_by_experts(product: grouped.Experts, model: ModelConfig, device: Any) -> dict[str, Any]:
    """FLOPs of a compiled product with its gradients on `device`, for 2 and for 8 experts there.

    The rows are as many both times, each of an expert drawn evenly. `scales` where the FLOPs grow
    by more than a fifth; `of_kernels` are those in Pallas kernels.
    """
    found = [_flops(product, model, device, number) for number in (_FEW, _MANY)]
    (few, few_kernels), (many, many_kernels) = found
    return {
        "flops": {str(_FEW): few, str(_MANY): many},
        "of_kernels": {str(_FEW): few_kernels, str(_MANY): many_kernels},
        "scales": many > _LIMIT * few,
    }


def said(found: Mapping[str, Any]) -> str:
    """A line for the terminal."""
    few, many = (found["flops"][str(n)] for n in (_FEW, _MANY))
    verdict = "grow with their number" if found["scales"] else "do not grow with it"
    return f"experts of a chip: {few:.3g} FLOPs for {_FEW}, {many:.3g} for {_MANY}: {verdict}"


def _flops(
    product: grouped.Experts, model: ModelConfig, device: Any, number: int
) -> tuple[float, float]:
    """All, and of kernels."""
    c, where = model, jax.sharding.SingleDeviceSharding(device)

    def laid(*shape: int, dtype: Any = c.compute_dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    into = laid(number, c.width, c.expert_width)
    weights = grouped.ExpertWeights(into, into, laid(number, c.expert_width, c.width))

    def total(x_ND: jax.Array, weights: grouped.ExpertWeights, ids_N1: jax.Array) -> jax.Array:
        out_ND = product(x_ND, ids_N1, jnp.ones(ids_N1.shape, jnp.float32), weights)
        return jnp.sum(out_ND.astype(jnp.float32))

    both_ways = jax.jit(jax.grad(total, argnums=(0, 1)))
    traced = both_ways.trace(laid(_ROWS, c.width), weights, laid(_ROWS, 1, dtype=jnp.int32))
    ids_N1 = np.random.default_rng(0).integers(0, number, (_ROWS, 1), np.int32)
    unknown = [None] * len(jax.tree.leaves(weights))
    kernels = tiles.visited(traced.jaxpr, None, *unknown, ids_N1)
    compiled = traced.lower().compile().cost_analysis()
    assert isinstance(compiled, dict)
    return compiled["flops"] - kernels.declared + kernels.by_tiles, kernels.by_tiles
