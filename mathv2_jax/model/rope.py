"""Rotary position embedding, interleaved pairs as in DeepSeek's MLA."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x_BTNR: Float[Array, "B T N R"], positions_BT: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N R"]:
    """Rotate pairs (2i, 2i+1) of the last axis by position * theta^(-2i/R), in float32."""
    width = x_BTNR.shape[-1]
    inv_frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle_BTr = positions_BT.astype(jnp.float32)[..., None] * inv_frequency[None, None, :]
    cos, sin = jnp.cos(angle_BTr)[:, :, None, :], jnp.sin(angle_BTr)[:, :, None, :]
    x32 = x_BTNR.astype(jnp.float32)
    even, odd = x32[..., 0::2], x32[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTNR.shape).astype(x_BTNR.dtype)
