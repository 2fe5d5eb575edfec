import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import rope

THETA = 500.0
PLAIN = rope.plain(8, THETA)
# Width 16: pairs 0 to 7. At 64 positions, theta 100: 64 / (2 pi f) = 100^(pair / 8).
YARN = dict(head_rope_width=16, rope_theta=100.0, yarn_factor=4.0, yarn_original_length=64)
YARN |= dict(yarn_beta_fast=6.0, yarn_beta_slow=1.0, yarn_mscale=0.7, yarn_mscale_all_dim=0.4)


def draw(seed, shape=(2, 5, 3, 8)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_rotation_multiplies_neighbouring_pairs_by_a_phase():
    x_BTNR = draw(0)
    positions_BT = np.array([[0, 1, 2, 3, 4], [7, 7, 0, 90, 2000]])
    got = rope.rotate(x_BTNR, jnp.asarray(positions_BT), PLAIN)

    pairs = np.asarray(x_BTNR, np.float64).reshape(2, 5, 3, 4, 2)
    phase_BTr = positions_BT[..., None] * THETA ** (-2 * np.arange(4) / 8)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * phase_BTr)[:, :, None, :]
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x_BTNR.shape)
    np.testing.assert_allclose(got, expected, atol=5e-4)  # float32 angles of up to 2000
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)


@pytest.mark.parametrize("shift", [1, 17, 100])
def test_product_of_query_and_key_depends_on_their_distance_only(shift):
    q_BTNR, k_BTNR = draw(1), draw(2)
    q_at = jnp.asarray([[0, 3, 5, 9, 30], [4, 4, 0, 2, 1]])
    k_at = jnp.asarray([[5, 3, 0, 1, 2], [4, 9, 0, 0, 8]])

    def product(by):
        q, k = rope.rotate(q_BTNR, q_at + by, PLAIN), rope.rotate(k_BTNR, k_at + by, PLAIN)
        return np.asarray(jnp.sum(q * k, axis=-1))

    np.testing.assert_allclose(product(shift), product(0), atol=1e-4)
    unturned = np.asarray(jnp.sum(q_BTNR * k_BTNR, axis=-1))
    same_place = np.asarray(q_at == k_at)
    np.testing.assert_allclose(product(shift)[same_place], unturned[same_place], atol=1e-4)
    assert np.abs(product(shift) - unturned)[~same_place].min() > 1e-4


def test_angles_are_float32_where_the_stream_is_bfloat16():
    x_BTNR = draw(3).astype(jnp.bfloat16)
    positions_BT = jnp.asarray([[1001, 1002, 1003, 1004, 1005], [257, 259, 261, 263, 265]])
    got = rope.rotate(x_BTNR, positions_BT, PLAIN)
    expected = rope.rotate(x_BTNR.astype(jnp.float32), positions_BT, PLAIN).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))


def test_halves_rotate_as_pairs_do_with_the_channels_reordered():
    x_BTNR, positions_BT = draw(4), jnp.asarray([[0, 1, 2, 3, 4], [7, 7, 0, 90, 20]])
    together = np.stack([np.arange(4), 4 + np.arange(4)], axis=1).reshape(-1)  # 0 4 1 5 2 6 3 7
    wanted = rope.rotate(x_BTNR[..., together], positions_BT, PLAIN)
    got = rope.rotate_halves(x_BTNR, positions_BT, PLAIN)
    np.testing.assert_allclose(got[..., together], wanted, atol=1e-6)
    assert np.abs(got - rope.rotate(x_BTNR, positions_BT, PLAIN))[:, 1:].max() > 0.1


def test_yarn_leaves_fast_pairs_slows_slow_ones_and_blends_between(full):
    """64 / 2 pi = 10.19 turns at pair 0. Six turns: pair 0.92, floor 0; one: 4.03, ceiling 5."""
    got = rope.rotation(dataclasses.replace(full.config, **YARN))
    plain_r = 100.0 ** (-np.arange(8) / 8)
    slow_r = np.clip(np.arange(8) / 5, 0, 1)
    np.testing.assert_allclose(got.frequency_r, plain_r * (1 - slow_r + slow_r / 4), rtol=1e-5)
    np.testing.assert_allclose(got.frequency_r[5:], plain_r[5:] / 4, rtol=1e-5)
    wanted = (0.1 * 0.7 * math.log(4) + 1) / (0.1 * 0.4 * math.log(4) + 1)
    assert got.magnitude == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("mscale", "all_dim", "magnitude", "correction"),
    [
        (1.0, 1.0, 1.0, (0.1 * math.log(4) + 1) ** 2),
        (0.0, 1.0, 0.1 * math.log(4) + 1, (0.1 * math.log(4) + 1) ** 2),
        (1.0, 0.0, 0.1 * math.log(4) + 1, 1.0),
    ],
)
def test_yarn_sharpens_in_the_scale_or_in_the_rotation(
    full, mscale, all_dim, magnitude, correction
):
    changed = {**YARN, "yarn_mscale": mscale, "yarn_mscale_all_dim": all_dim}
    config = dataclasses.replace(full.config, **changed)
    got = rope.rotation(config)
    assert got.magnitude == pytest.approx(magnitude)
    assert rope.softmax_correction(config) == pytest.approx(correction)
    x_BTNR, at_BT = draw(5, (1, 5, 1, 16)), jnp.asarray([[3, 9, 1, 0, 50]])
    for turn in (rope.rotate, rope.rotate_halves):
        norm_BTN = np.linalg.norm(turn(x_BTNR, at_BT, got), axis=-1)
        wanted = magnitude * np.linalg.norm(x_BTNR, axis=-1)
        np.testing.assert_allclose(norm_BTN, wanted, rtol=1e-5)


def test_a_factor_of_one_is_no_yarn(full):
    config = dataclasses.replace(full.config, **{**YARN, "yarn_factor": 1.0})
    got, plain = rope.rotation(config), rope.plain(16, 100.0)
    np.testing.assert_array_equal(got.frequency_r, plain.frequency_r)
    assert got.magnitude == plain.magnitude == rope.softmax_correction(config) == 1.0
