"""What a traced program makes, without running it."""

import jax


def largest(jaxpr, found=0):
    """Numbers in the largest array that a program makes, loops' own included."""
    for equation in jaxpr.eqns:
        found = max([found, *(v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))])
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found = largest(inner, found)
    return found
