"""FLOPs of Pallas kernels by the steps of their grids, whatever they declare.

A kernel multiplies whole tiles, those too that are partly beyond an array's edge, and, of a grouped
product, once for each group those that two groups share. JAX's kernels for grouped products declare
the products of rows and widths alone.
"""

import math
from typing import Any, NamedTuple

import jax

from mathv2_jax.pods import flops

# Within these kernels are looked for.
_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)


class Visited(NamedTuple):
    """FLOPs of the kernels of a program: by the tiles that they visit, and as they declare them."""

    by_tiles: float
    declared: float


def of_step(kernel: Any) -> float:
    """FLOPs of one step of a grid; of a branch the most that it may take."""
    total = 0.0
    for equation in kernel.eqns:
        inner = [of_step(one) for one in flops.inner(equation.params)]
        total += flops.of_equation(equation)
        total += max(inner, default=0.0) if equation.primitive.name == "cond" else sum(inner)
    return total


def expected(equation: Any, filled: float = 1.0) -> float:
    """FLOPs of a call of a kernel, by its tiles; of its rows the share `filled` is of groups.

    A grid with one size that is known late is one of JAX's grouped products: that size is the tiles
    of its groups' rows, and each group but the first begins within a tile of the one before.
    """
    grid, step = equation.params["grid_mapping"], of_step(equation.params["jaxpr"])
    late = grid.num_dynamic_grid_bounds
    if not late:
        return step * math.prod(grid.grid)
    if late > 1:
        raise ValueError(f"{equation.params['name']}: a grid of which {late} sizes are not known")
    rows, tile = grid.block_mappings[0].array_aval.shape[0], grid.block_mappings[0].block_shape[0]
    (offsets,) = equation.invars[late].aval.shape  # one more than groups
    return step * _known(grid) * (math.ceil(filled * rows / tile.block_size) + offsets - 2)


def _known(grid: Any) -> int:
    return math.prod(size for size in grid.grid if isinstance(size, int))


def visited(program: Any, *arguments: Any) -> Visited:
    """The kernels of `program`, a closed jaxpr, for `arguments` of which None are not known.

    Only what follows from those that are known is computed, which the grids' sizes must.
    """
    found = [0.0, 0.0]
    _walk(program.jaxpr, program.consts, arguments, found)
    return Visited(*found)


def _walk(program: Any, consts: Any, arguments: Any, found: list[float]) -> list[Any]:
    known = dict(zip((*program.constvars, *program.invars), (*consts, *arguments), strict=True))

    def value(variable: Any) -> Any:
        return variable.val if hasattr(variable, "val") else known.get(variable)

    for equation in program.eqns:
        given = [value(variable) for variable in equation.invars]
        name = equation.primitive.name
        outs: list[Any] = [None] * len(equation.outvars)
        if name == "pallas_call":
            _visit(equation, given, found)
        elif name in _CALLS:
            (one,) = flops.inner(equation.params)
            jaxpr, constants = getattr(one, "jaxpr", one), getattr(one, "consts", ())
            outs = _walk(jaxpr, constants, given, found)
        elif not any(x is None for x in given):
            outs = equation.primitive.bind(*given, **equation.params)
            outs = outs if equation.primitive.multiple_results else [outs]
        known.update(zip(equation.outvars, outs, strict=True))
    return [value(variable) for variable in program.outvars]


def _visit(equation: Any, given: list[Any], found: list[float]) -> None:
    grid, cost = equation.params["grid_mapping"], equation.params["cost_estimate"]
    late = given[: grid.num_dynamic_grid_bounds]
    if any(size is None for size in late):
        raise ValueError(f"{equation.params['name']}: the size of its grid is not known")
    steps = _known(grid) * math.prod(int(size) for size in jax.device_get(late))
    found[0] += steps * of_step(equation.params["jaxpr"])
    found[1] += float(cost.flops) if cost is not None else 0.0
