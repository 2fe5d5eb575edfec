"""How a row's queries are cut apart, and joined, by the devices that share it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax import sharding
from mathv2_jax.model import blocks
from mathv2_jax.pods import hlo


def row(length):
    return jnp.arange(2 * length * 3, dtype=jnp.float32).reshape(2, length, 3)


@pytest.mark.parametrize(("length", "block"), [(64, 2), (64, 4), (64, 3), (61, 2)])
def test_what_is_cut_apart_is_joined_again(length, block):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, context=4))
    with jax.set_mesh(mesh):
        cut = blocks.cut_for(length, 1, block, 2)
        assert cut.travels == (length == 64 and block != 3)
        x = jax.jit(cut.apart)(row(length))
        np.testing.assert_array_equal(jax.jit(cut.joined)(x), row(length))
    for chunk, loop in np.ndindex(cut.chunks, cut.loops):
        first = (chunk * cut.loops + loop) * cut.turn
        wanted = np.asarray(row(length))[:, first : first + cut.turn]
        wanted = np.pad(wanted, ((0, 0), (0, cut.turn - wanted.shape[1]), (0, 0)))
        np.testing.assert_array_equal(x[chunk, loop], wanted)


def test_whole_blocks_are_sent_and_no_row_is_gathered():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, context=4))
    with jax.set_mesh(mesh):
        cut = blocks.cut_for(64, 1, 2, 2)
        laid = sharding.constrain

        def there_and_back(x_BT):
            x = cut.apart(laid(x_BT, "batch", "time", None))
            return laid(cut.joined(2 * x), "batch", "time", None)

        text = jax.jit(there_and_back).lower(row(64)).compile().as_text()
    sent = hlo.collectives(text).bytes_by_kind
    assert set(sent) == {"all-to-all"}
    assert sent["all-to-all"] <= 2 * row(64).nbytes / 8
