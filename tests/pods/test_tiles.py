"""Kernels' FLOPs by the tiles that they visit, counted by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from mathv2_jax.model import grouped
from mathv2_jax.pods import counting, experts, tiles

WIDTH, HIDDEN = 256, 384


def program(rows, number, most=(128, 128), gradients=True):
    weights = grouped.ExpertWeights(
        *(jnp.zeros((number, *s)) for s in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    )
    product = functools.partial(grouped.megablox, most=most)

    def total(x_ND, weights, ids_N1):
        with jax.named_scope("experts"):
            return jnp.sum(product(x_ND, ids_N1, jnp.ones(ids_N1.shape), weights))

    shapes = jax.eval_shape(lambda: (jnp.zeros((rows, WIDTH)), weights))
    function = jax.grad(total, argnums=(0, 1)) if gradients else total
    with jax.numpy_dtype_promotion("standard"):  # which JAX's kernels need
        return jax.make_jaxpr(function)(*shapes, jax.ShapeDtypeStruct((rows, 1), jnp.int32))


def visited(made, *sizes):
    ids_N1 = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[:, None]
    return tiles.visited(made, None, None, None, None, ids_N1)


# Tiles of 128 rows that groups of these sizes are in, each counted; an empty one is in none.
SIZES = {(512, 0): 4, (256, 256): 4, (200, 312): 2 + 3, (100, 28, 200, 184): 1 + 1 + 2 + 2}


@pytest.mark.parametrize(("sizes", "expected"), SIZES.items())
def test_a_tile_that_groups_share_is_visited_for_each(sizes, expected):
    found = visited(program(512, len(sizes), gradients=False), *sizes)
    assert found.declared == 3 * 2 * 512 * WIDTH * HIDDEN
    assert found.by_tiles == 3 * 2 * expected * 128 * WIDTH * HIDDEN


def test_weights_gradients_visit_the_tiles_of_empty_groups_too():
    """Two of nine products for each of three matrices look at one more tile, once a matrix."""
    one = 2 * 128 * WIDTH * HIDDEN
    assert visited(program(512, 2), 512, 0).by_tiles == (6 * 4 + 3 * (4 + 1)) * one


def test_of_a_width_that_tiles_do_not_divide_the_last_is_computed_whole():
    found = visited(program(512, 2, most=(128, 256), gradients=False), 256, 256)
    # 384 is one tile of 384, and 256 one of 256.
    assert found.by_tiles == found.declared
    assert grouped.Tiles(256, 1024)(4096, 1408, 7168) == (256, 1408, 1024)
    assert grouped.Tiles(256, 1024)(100, 1664, 896) == (100, 896, 896)


def test_the_groups_of_a_traced_program_are_taken_to_begin_within_tiles():
    made = program(512, 4)
    whole = counting.executed(made).per_chip(1)
    worst = visited(made, 100, 100, 100, 212)
    assert whole["routed_experts"] - worst.declared < 1e6  # and the sum of a token's experts
    assert (
        whole[counting.EDGES] == worst.by_tiles - worst.declared == 9 * 3 * 2 * 128 * WIDTH * HIDDEN
    )
    half = counting.executed(made, filled=0.5).per_chip(1)
    assert half[counting.EDGES] == whole[counting.EDGES]


def test_a_kernel_whose_grid_grows_with_the_experts_is_seen_whatever_it_declares():
    def everything(x_ND, y_EDF):
        def kernel(x_ref, y_ref, out_ref):
            out_ref[...] += x_ref[...] @ y_ref[0]

        rows, number = x_ND.shape[0], y_EDF.shape[0]
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((rows, HIDDEN), jnp.float32),
            grid=(number,),
            in_specs=[
                pl.BlockSpec((rows, WIDTH), lambda e: (0, 0)),
                pl.BlockSpec((1, WIDTH, HIDDEN), lambda e: (e, 0, 0)),
            ],
            out_specs=pl.BlockSpec((rows, HIDDEN), lambda e: (0, 0)),
            cost_estimate=pl.CostEstimate(flops=7, transcendentals=0, bytes_accessed=0),
        )(x_ND, y_EDF)

    for number in (2, 8):
        made = jax.make_jaxpr(everything)(jnp.ones((16, WIDTH)), jnp.ones((number, WIDTH, HIDDEN)))
        assert tiles.visited(made, None, None) == (number * 2 * 16 * WIDTH * HIDDEN, 7)


def test_a_grid_of_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="the size of its grid is not known"):
        tiles.visited(program(512, 2), *[None] * 5)


def test_experts_that_are_drawn_evenly_cost_little_more_for_being_many():
    few, many = (
        tiles.visited(
            program(experts._ROWS, number, most=(256, 128), gradients=False),
            *[None] * 4,
            np.random.default_rng(0).integers(0, number, (experts._ROWS, 1), np.int32),
        )
        for number in (2, 8)
    )
    assert few.declared == many.declared < few.by_tiles < many.by_tiles
    assert many.by_tiles / few.by_tiles == (128 + 7) / (128 + 1)
