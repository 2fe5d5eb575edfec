"""Parameters with logical axes, RMSNorm and the gated feed-forward."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def weight(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str],
    fan_in: int,
) -> jax.Array:
    """A float32 matrix declared once: shape, logical axes, normal init of variance 1 / fan_in."""
    init = nn.initializers.normal(stddev=fan_in**-0.5)
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    return module.param(name, boxed, tuple(shape), jnp.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale_D = self.param("scale", ones, (x.shape[-1],), jnp.float32)
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
