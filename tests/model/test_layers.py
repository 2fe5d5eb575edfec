import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import layers


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [1.0, 1e-3, 30.0])
def test_norm_divides_by_the_root_mean_square_and_scales_each_channel(size):
    x, scale_D, eps = size * draw(0, 2, 3, 8), draw(1, 8), 1e-3
    got = layers.RMSNorm(eps).apply({"params": {"scale": jnp.asarray(scale_D)}}, jnp.asarray(x))
    assert isinstance(got, jax.Array)
    x64 = x.astype(np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps) * scale_D
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_norm_is_computed_in_float32_where_the_stream_is_bfloat16():
    x = jnp.asarray(draw(2, 4, 64)).astype(jnp.bfloat16)
    params = {"params": {"scale": jnp.asarray(1 + 0.01 * draw(3, 64))}}
    norm = layers.RMSNorm(1e-6)
    got, exact = norm.apply(params, x), norm.apply(params, x.astype(jnp.float32))
    assert isinstance(got, jax.Array) and isinstance(exact, jax.Array)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), exact.astype(jnp.bfloat16).astype("f4"))


def test_gated_feed_forward_is_down_of_silu_gate_times_up():
    x_BTD, gate_DF, up_DF, down_FD = draw(4, 2, 3, 6), draw(5, 6, 9), draw(6, 6, 9), draw(7, 9, 6)
    params = jax.tree.map(jnp.asarray, {"gate": gate_DF, "up": up_DF, "down": down_FD})
    got = layers.GatedMlp(9).apply({"params": params}, jnp.asarray(x_BTD))
    assert isinstance(got, jax.Array)
    gate = x_BTD.astype(np.float64) @ gate_DF
    expected = (gate / (1 + np.exp(-gate)) * (x_BTD @ up_DF)) @ down_FD
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
