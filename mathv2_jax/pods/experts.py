"""Whether the compiled product of routed experts grows with their number on a chip.

Each row is of one expert, so the work is that of the rows. A compiler may do otherwise, above all
for the weights' gradient: multiply all rows once for every expert. Executed FLOPs are counted from
traced programs (pods/counting.py) and would not show it; this does.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mathv2_jax.model import grouped
from mathv2_jax.model.config import ModelConfig

_ROWS = 4096
_FEW, _MANY = 2, 8
_LIMIT = 1.2  # times the FLOPs of few experts


def flops_by_experts(product: grouped.Experts, model: ModelConfig, device: Any) -> dict[str, Any]:
    """FLOPs of a compiled product with its gradients on `device`, for 2 and for 8 experts there.

    The rows are as many both times. `scales` where the FLOPs grow by more than a fifth.
    """
    few, many = (_compiled(product, model, device, number) for number in (_FEW, _MANY))
    return {"flops": {str(_FEW): few, str(_MANY): many}, "scales": many > _LIMIT * few}


def said(found: Mapping[str, Any]) -> str:
    """A line for the terminal."""
    few, many = (found["flops"][str(n)] for n in (_FEW, _MANY))
    verdict = "grow with their number" if found["scales"] else "do not grow with it"
    return f"experts of a chip: {few:.3g} FLOPs for {_FEW}, {many:.3g} for {_MANY}: {verdict}"


def _compiled(product: grouped.Experts, model: ModelConfig, device: Any, number: int) -> float:
    c, where = model, jax.sharding.SingleDeviceSharding(device)

    def laid(*shape: int, dtype: Any = c.compute_dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    into = laid(number, c.width, c.expert_width)
    weights = grouped.ExpertWeights(into, into, laid(number, c.expert_width, c.width))

    def total(x_ND: jax.Array, weights: grouped.ExpertWeights, ids_N1: jax.Array) -> jax.Array:
        out_ND = product(x_ND, ids_N1, jnp.ones(ids_N1.shape, jnp.float32), weights)
        return jnp.sum(out_ND.astype(jnp.float32))

    both_ways = jax.jit(jax.grad(total, argnums=(0, 1)))
    ids_N1 = laid(_ROWS, 1, dtype=jnp.int32)
    done = both_ways.lower(laid(_ROWS, c.width), weights, ids_N1).compile()
    return float(done.cost_analysis()["flops"])  # pyright: ignore - typed as Any or a list
