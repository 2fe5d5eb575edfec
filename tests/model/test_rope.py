import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import rope

THETA = 500.0


def draw(seed, shape=(2, 5, 3, 8)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_rotation_multiplies_neighbouring_pairs_by_a_phase():
    x_BTNR = draw(0)
    positions_BT = np.array([[0, 1, 2, 3, 4], [7, 7, 0, 90, 2000]])
    got = rope.rotate(x_BTNR, jnp.asarray(positions_BT), THETA)

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
        q, k = rope.rotate(q_BTNR, q_at + by, THETA), rope.rotate(k_BTNR, k_at + by, THETA)
        return np.asarray(jnp.sum(q * k, axis=-1))

    np.testing.assert_allclose(product(shift), product(0), atol=1e-4)
    unturned = np.asarray(jnp.sum(q_BTNR * k_BTNR, axis=-1))
    same_place = np.asarray(q_at == k_at)
    np.testing.assert_allclose(product(shift)[same_place], unturned[same_place], atol=1e-4)
    assert np.abs(product(shift) - unturned)[~same_place].min() > 1e-4


def test_angles_are_float32_where_the_stream_is_bfloat16():
    x_BTNR = draw(3).astype(jnp.bfloat16)
    positions_BT = jnp.asarray([[1001, 1002, 1003, 1004, 1005], [257, 259, 261, 263, 265]])
    got = rope.rotate(x_BTNR, positions_BT, THETA)
    expected = rope.rotate(x_BTNR.astype(jnp.float32), positions_BT, THETA).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))
