"""FLOPs of one equation of a traced program, and the programs within it."""

import math
from collections.abc import Mapping
from typing import Any

import jax


def inner(params: Mapping[str, Any]) -> list[Any]:
    """The programs within an equation; of a branch all."""
    found = []
    for value in params.values():
        for leaf in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
            leaf = leaf if hasattr(leaf, "eqns") else getattr(leaf, "jaxpr", None)
            if hasattr(leaf, "eqns"):
                found.append(leaf)
    return found


def of_equation(equation: Any) -> float:
    """Of a matrix product, two a multiply-add; 0 for what is none, kernels among it."""
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name in ("ragged_dot", "ragged_dot_general"):
        left, right, out = (v.aval.shape for v in (*equation.invars[:2], equation.outvars[0]))
        # Rows are of one group each: the groups' axis, of the weights or of their gradient, is no
        # factor.
        if len(right) == 3:
            return 2.0 * math.prod(left) * out[-1]
        return 2.0 * math.prod(left) * right[-1]
    return 0.0
