"""Parameters with logical axes, the two norms and the gated feed-forward."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mathv2_jax import sharding

# A score that no softmax gives weight to; finite, so that a row of them is no error.
MASKED = -1e30


def parameter(
    module: nn.Module,
    name: str,
    init: Callable[..., Any],
    shape: Sequence[int],
    axes: Sequence[str],
    dtype: str = "float32",
) -> jax.Array:
    """A parameter declared once: initialiser, shape, logical axes, dtype."""
    boxed = nn.with_logical_partitioning(init, tuple(axes))
    # Flax hands out the array itself and types it as the box that `init` makes.
    return cast(jax.Array, module.param(name, boxed, tuple(shape), jnp.dtype(dtype)))


def weight(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str],
    fan_in: int,
    dtype: str = "float32",
    used_in: Any = None,
) -> jax.Array:
    """A matrix with normal init of variance 1 / fan_in, ready to be used in dtype `used_in`."""
    init = nn.initializers.normal(stddev=fan_in**-0.5)
    stored = parameter(module, name, init, shape, axes, dtype)
    return sharding.gathered(stored.astype(used_in or dtype), *axes)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    eps: float
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        shape, ones = x.shape[-1:], nn.initializers.ones
        scale_D = parameter(self, "scale", ones, shape, ("norm",), self.param_dtype)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        broadcast = scale_D.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (normed * broadcast).astype(x.dtype)


class LayerNorm(nn.Module):
    """Norm about the mean with a learned scale and bias, computed in float32."""

    eps: float
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        shape, dtype = x_BTD.shape[-1:], self.param_dtype
        scale_D = parameter(self, "scale", nn.initializers.ones, shape, ("norm",), dtype)
        bias_D = parameter(self, "bias", nn.initializers.zeros, shape, ("norm",), dtype)
        x32 = x_BTD.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        scaled = normed * scale_D.astype(jnp.float32)[None, None, :]
        return (scaled + bias_D.astype(jnp.float32)[None, None, :]).astype(x_BTD.dtype)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), the dense feed-forward and the shared experts."""

    hidden: int
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width, dtype = x_BTD.shape[-1], x_BTD.dtype
        own = functools.partial(weight, self, dtype=self.param_dtype, used_in=dtype)
        gate_DF = own("gate", (width, self.hidden), ("embed", "mlp"), width)
        up_DF = own("up", (width, self.hidden), ("embed", "mlp"), width)
        down_FD = own("down", (self.hidden, width), ("mlp", "embed"), self.hidden)
        h_BTF = nn.silu(x_BTD @ gate_DF) * (x_BTD @ up_DF)
        return h_BTF @ down_FD
