"""Experts on other devices: what a token gets is what one device would give it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from mathv2_jax import sharding
from mathv2_jax.model import exchange, grouped

NUM_EXPERTS, WIDTH, HIDDEN, ROWS, LENGTH, PER_TOKEN = 8, 6, 4, 8, 3, 2
MESHES = {
    "expert 8": dict(expert=8),
    "expert 2, fsdp 2, tensor 2": dict(expert=2, fsdp=2, tensor=2),
    "tensor 4, data 2": dict(tensor=4, data=2),
}
LOADS = {
    "drawn": np.random.default_rng(7).permuted(np.tile(np.arange(8), (ROWS * LENGTH, 1)), axis=1),
    "one device's experts take all": np.tile([[0, 1]], (ROWS * LENGTH, 1)),
    "each its own": np.stack([np.arange(ROWS * LENGTH) // LENGTH, (np.arange(24) + 3) % 8], axis=1),
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def inputs(load):
    ids_BTA = jnp.asarray(LOADS[load][:, :PER_TOKEN], jnp.int32).reshape(ROWS, LENGTH, PER_TOKEN)
    experts = grouped.ExpertWeights(
        draw(1, NUM_EXPERTS, WIDTH, HIDDEN),
        draw(2, NUM_EXPERTS, WIDTH, HIDDEN),
        draw(3, NUM_EXPERTS, HIDDEN, WIDTH),
    )
    return draw(0, ROWS, LENGTH, WIDTH), ids_BTA, draw(4, *ids_BTA.shape), experts


def both_ways(product, how, x_BTD, ids_BTA, weights_BTA, experts):
    mix_BTD = draw(5, *x_BTD.shape)

    def total(x_BTD, weights_BTA, experts):
        out_BTD, left = exchange.run(x_BTD, ids_BTA, weights_BTA, experts, product, how)
        return jnp.sum(out_BTD * mix_BTD), (out_BTD, left)

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(x_BTD, weights_BTA, experts)


def on_mesh(sizes, product, how, load):
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, **sizes}))
    x_BTD, ids_BTA, weights_BTA, experts = inputs(load)
    rows = sharding.batch_sharding(mesh)
    held = [
        NamedSharding(mesh, sharding.partition_spec(axes, "experts"))
        for axes in (("experts", None, "mlp"), ("experts", None, "mlp"), ("experts", "mlp", None))
    ]
    tokens = jax.device_put((x_BTD, ids_BTA, weights_BTA), rows)
    experts = grouped.ExpertWeights(*map(jax.device_put, experts, held))
    with jax.set_mesh(mesh):
        return jax.jit(functools.partial(both_ways, product, how))(*tokens, experts)


@pytest.mark.parametrize("product", [grouped.sorted_blocks, grouped.ragged, grouped.every_expert])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("load", LOADS)
def test_experts_on_other_devices_and_their_gradients_equal_one_device(mesh, load, product):
    grads, (out_BTD, left) = on_mesh(MESHES[mesh], product, exchange.Exchange(), load)
    wanted_grads, (wanted_BTD, _) = both_ways(
        grouped.every_expert, exchange.Exchange(), *inputs(load)
    )
    assert float(left) == 0.0
    np.testing.assert_allclose(out_BTD, wanted_BTD, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert np.linalg.norm(wanted) > 0
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_a_devices_buffer_is_left_out_and_counted():
    # Two groups of four devices, with 6 assignments each, all for their group's first device: twice
    # an even load has room for 12 of the 24, those of the first two devices.
    how = exchange.Exchange(buffer=2.0)
    load = "one device's experts take all"
    grads, (out_BTD, left) = on_mesh(dict(expert=4, data=2), grouped.ragged, how, load)
    _, (wanted_BTD, _) = both_ways(grouped.every_expert, how, *inputs(load))
    assert float(left) == 24
    fitting = np.asarray([True, True, False, False] * 2)
    np.testing.assert_allclose(out_BTD[fitting], wanted_BTD[fitting], rtol=1e-5, atol=1e-5)
    assert not np.any(out_BTD[~fitting])
    assert not np.any(grads[0][~fitting]) and not np.any(grads[1][~fitting])


def test_nothing_travels_without_a_mesh():
    x_BTD, ids_BTA, weights_BTA, experts = inputs("drawn")
    how = exchange.choose("tpu", 2.0)
    out_BTD, left = exchange.run(x_BTD, ids_BTA, weights_BTA, experts, grouped.ragged, how)
    flat = (x_BTD.reshape(-1, WIDTH), *(a.reshape(-1, PER_TOKEN) for a in (ids_BTA, weights_BTA)))
    np.testing.assert_array_equal(out_BTD.reshape(-1, WIDTH), grouped.ragged(*flat, experts))
    assert float(left) == 0.0


@pytest.mark.parametrize("buffer", [0.5, -1.0, float("nan")])
def test_a_buffer_below_an_even_load_is_refused(buffer):
    with pytest.raises(ValueError, match=r"expert buffer = .*at least 1"):
        exchange.Exchange(buffer=buffer)


@pytest.mark.parametrize("product", [grouped.sorted_blocks, grouped.ragged, grouped.every_expert])
def test_a_zero_token_of_no_expert_weighs_nothing(product):
    x_BTD, ids_BTA, weights_BTA, experts = inputs("drawn")
    x_BTD = x_BTD.at[:, 1].set(0.0)
    none_BTA = ids_BTA.at[:, 1].set(NUM_EXPERTS)
    found, wanted = (
        both_ways(p, exchange.Exchange(), x_BTD, ids, weights, experts)
        for p, ids, weights in (
            (product, none_BTA, weights_BTA),
            (grouped.every_expert, ids_BTA, weights_BTA.at[:, 1].set(0.0)),
        )
    )
    (grads, (out_BTD, _)), (wanted_grads, (wanted_BTD, _)) = found, wanted
    np.testing.assert_allclose(out_BTD, wanted_BTD, rtol=1e-5, atol=1e-5)
    for got, due in zip(
        jax.tree.leaves((grads[0], grads[2])),
        jax.tree.leaves((wanted_grads[0], wanted_grads[2])),
        strict=True,
    ):
        np.testing.assert_allclose(got, due, rtol=1e-4, atol=1e-5)
    assert not np.any(grads[1][:, 1])
