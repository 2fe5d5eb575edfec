"""The kernels of attention are one function: blocks and devices that share a row change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax import sharding
from mathv2_jax.model import attention, cache, dsa
from tests import traced

BATCH, LENGTH, HEADS, KEY, VALUE, INDEX_HEADS, INDEX_WIDTH = 4, 37, 4, 6, 5, 2, 4
SCALE = 0.4


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layout():
    """A prompt with two answers and a document after them; padding at the end of each row."""
    segments_T = np.repeat([1, 2, 3, 4, 0], [9, 7, 8, 10, 3])
    prefixes_T = np.repeat([1, 1, 1, 4, 0], [9, 7, 8, 10, 3])
    rows = [np.roll(segments_T, 0), np.where(segments_T == 4, 0, segments_T), segments_T * 0 + 1]
    rows.append(segments_T)
    segments = np.stack(rows)
    prefixes = np.stack([prefixes_T, np.where(segments_T == 4, 0, prefixes_T), rows[2], prefixes_T])
    positions = np.tile(np.arange(LENGTH), (BATCH, 1))
    return cache.Layout(*(jnp.asarray(x, jnp.int32) for x in (positions, segments, prefixes)))


INDEXES = {"none": None, "picks 5": (5, False), "picks 5, learns": (5, True), "warm-up": (0, True)}


def index_of(kind, queries_BTJW, weights_BTJ, keys_BSW):
    if INDEXES[kind] is None:
        return None
    return dsa.Index(dsa.IndexQueries(queries_BTJW, weights_BTJ), keys_BSW, *INDEXES[kind])


def inputs():
    return (
        draw(0, BATCH, LENGTH, HEADS, KEY),
        draw(1, BATCH, LENGTH, HEADS, KEY),
        draw(2, BATCH, LENGTH, HEADS, VALUE),
        draw(3, BATCH, LENGTH, INDEX_HEADS, INDEX_WIDTH),
        draw(4, BATCH, LENGTH, INDEX_HEADS),
        draw(5, BATCH, LENGTH, INDEX_WIDTH),
    )


def both_ways(attend, kind, where, *arrays):
    """Outputs, and the gradients of a mixture of them and the loss; of real places alone."""
    mix_BTHU = draw(6, BATCH, LENGTH, HEADS, VALUE)
    real_BT = where.segments_BT > 0

    def total(q, k, v, *of_index):
        out, loss = attend(q, k, v, where, SCALE, index_of(kind, *of_index))
        out = jnp.where(real_BT[..., None, None], out, 0.0)
        return jnp.sum(out * mix_BTHU) + (0.0 if loss is None else loss), (out, loss)

    return jax.grad(total, argnums=tuple(range(6)), has_aux=True)(*arrays)


def require_same(found, wanted):
    for got, due in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, due, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize(("block", "chunks"), [(4, 3), (16, 8), (64, 8), (5, 1)])
def test_blocks_of_queries_give_what_the_whole_square_gives(kind, block, chunks):
    attend = functools.partial(attention.attend_in_blocks, block=block, chunks=chunks)
    found, wanted = (
        jax.jit(functools.partial(both_ways, form, kind))(layout(), *inputs())
        for form in (attend, attention.attend_densely)
    )
    require_same(found, wanted)
    assert np.abs(wanted[1][0]).max() > 0.5


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("attend", [attention.attend_densely, attention.attend_in_blocks])
def test_devices_that_share_a_row_give_what_one_gives(kind, attend):
    if attend is attention.attend_in_blocks:
        attend = functools.partial(attend, block=3, chunks=2)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, context=4))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(both_ways, attend, kind))(layout(), *inputs())
    require_same(found, both_ways(attention.attend_densely, kind, layout(), *inputs()))


def test_short_rows_are_attended_to_at_once():
    arrays = inputs()[:3]
    at_once, in_blocks = (
        attention.attend_by_length(*arrays, layout(), SCALE, whole=whole)[0] for whole in (37, 36)
    )
    np.testing.assert_array_equal(at_once, attention.attend_densely(*arrays, layout(), SCALE)[0])
    np.testing.assert_array_equal(
        in_blocks, attention.attend_in_blocks(*arrays, layout(), SCALE)[0]
    )


@pytest.mark.parametrize("attend", [attention.attend_densely, attention.attend_in_blocks])
def test_no_array_of_a_long_row_is_as_large_as_its_square_but_densely(attend):
    length = 2048
    shapes = [(1, length, 2, 4), (1, length, 2, 4), (1, length, 2, 4)]
    shapes += [(1, length, 2, 4), (1, length, 2), (1, length, 4)]
    where = cache.plain_layout(jnp.full((1,), length), length)

    def total(*arrays):
        out, loss = attend(*arrays[:3], where, 1.0, index_of("picks 5, learns", *arrays[3:]))
        return jnp.sum(out) + loss

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.make_jaxpr(jax.grad(total, argnums=tuple(range(6))))(*arrays)
    is_dense = attend is attention.attend_densely
    assert (traced.largest(program.jaxpr) >= length * length) == is_dense
