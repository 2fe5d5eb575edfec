"""Rotary position embedding: interleaved pairs (MLA) and halves (the indexer), with YaRN.

A channel pair i of R / 2 turns by position times its frequency. YaRN ("YaRN: Efficient Context
Window Extension", section 3) divides the slow frequencies by a factor and leaves the fast ones.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax.model.config import ModelConfig


class Rotation(NamedTuple):
    """Radians a position for each pair, and what cos and sin are multiplied by."""

    frequency_r: Float[Array, "r"]
    magnitude: float = 1.0


def plain(width: int, theta: float) -> Rotation:
    """theta^(-2i / width) for pair i."""
    return Rotation(theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width))


def rotation(config: ModelConfig) -> Rotation:
    """The rotation of `head_rope_width` channels, stretched where the config asks for YaRN."""
    c, width = config, config.head_rope_width
    fast = plain(width, c.rope_theta)
    if c.yarn_factor == 1.0 or not width:
        return fast
    low = max(math.floor(_pair_that_turns(c, c.yarn_beta_fast)), 0)
    high = min(math.ceil(_pair_that_turns(c, c.yarn_beta_slow)), width - 1)
    reach = max(high - low, 1e-3)
    pair_r = jnp.arange(width // 2, dtype=jnp.float32)
    slow_r = jnp.clip((pair_r - low) / reach, 0.0, 1.0)
    frequency_r = fast.frequency_r * (slow_r / c.yarn_factor + (1.0 - slow_r))
    # Where either exponent is unset (0), YaRN's own 0.1 ln(factor) + 1 stands.
    if c.yarn_mscale and c.yarn_mscale_all_dim:
        magnitude = stretch(c.yarn_factor, c.yarn_mscale)
        magnitude /= stretch(c.yarn_factor, c.yarn_mscale_all_dim)
    else:
        magnitude = stretch(c.yarn_factor, 1.0)
    return Rotation(frequency_r, magnitude)


def stretch(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1: by how much attention is sharpened beyond the old length."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_correction(config: ModelConfig) -> float:
    """What YaRN multiplies the softmax scale of MLA by."""
    if not config.yarn_mscale_all_dim:
        return 1.0
    return stretch(config.yarn_factor, config.yarn_mscale_all_dim) ** 2


def _pair_that_turns(c: ModelConfig, turns: float) -> float:
    """The pair, as a real number, that turns `turns` times over the original length."""
    ratio = math.log(c.yarn_original_length / (2 * math.pi * turns))
    return c.head_rope_width * ratio / (2 * math.log(c.rope_theta))


def rotate(
    x_BTNR: Float[Array, "B T N R"], positions_BT: Int[Array, "B T"], by: Rotation
) -> Float[Array, "B T N R"]:
    """Turn the pairs (2i, 2i + 1) of the last axis, in float32."""
    cos, sin = _angles(positions_BT, by)
    x32 = x_BTNR.astype(jnp.float32)
    even, odd = x32[..., 0::2], x32[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BTNR.shape).astype(x_BTNR.dtype)


def rotate_halves(
    x_BTNR: Float[Array, "B T N R"], positions_BT: Int[Array, "B T"], by: Rotation
) -> Float[Array, "B T N R"]:
    """Turn the pairs (i, i + R / 2) of the last axis, in float32."""
    cos, sin = _angles(positions_BT, by)
    first, second = jnp.split(x_BTNR.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.astype(x_BTNR.dtype)


def _angles(positions_BT: jax.Array, by: Rotation) -> tuple[jax.Array, jax.Array]:
    angle_BTr = positions_BT.astype(jnp.float32)[..., None] * by.frequency_r[None, None, :]
    cos_BT1r, sin_BT1r = jnp.cos(angle_BTr)[:, :, None, :], jnp.sin(angle_BTr)[:, :, None, :]
    if by.magnitude == 1.0:
        return cos_BT1r, sin_BT1r
    return cos_BT1r * by.magnitude, sin_BT1r * by.magnitude
