"""Parameters with logical axes, RMSNorm and the gated feed-forward."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., Any],
    shape: Sequence[int],
    axes: Sequence[str],
) -> jax.Array:
    """A float32 parameter declared once: initialiser, shape, logical axes."""
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    # Flax hands out the array itself and types it as the box that `init` makes.
    return cast(jax.Array, module.param(name, boxed, tuple(shape), jnp.float32))


def weight(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str],
    fan_in: int,
) -> jax.Array:
    """A matrix with normal init of variance 1 / fan_in."""
    return parameter(module, name, nn.initializers.normal(stddev=fan_in**-0.5), shape, axes)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        scale_D = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), ("norm",))
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        broadcast = scale_D.reshape((1,) * (x.ndim - 1) + (-1,))
        return (normed * broadcast).astype(x.dtype)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), the dense feed-forward and the shared experts."""

    hidden: int

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width, dtype = x_BTD.shape[-1], x_BTD.dtype
        gate_DF = weight(self, "gate", (width, self.hidden), ("embed", "mlp"), width)
        up_DF = weight(self, "up", (width, self.hidden), ("embed", "mlp"), width)
        down_FD = weight(self, "down", (self.hidden, width), ("mlp", "embed"), self.hidden)
        h_BTF = nn.silu(x_BTD @ gate_DF.astype(dtype)) * (x_BTD @ up_DF.astype(dtype))
        return h_BTF @ down_FD.astype(dtype)
