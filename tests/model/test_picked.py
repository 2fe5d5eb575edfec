"""Gathered attention is expanded attention, narrowed by the same indexer, with all gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import deepseek_v32, tiny_v32
from mathv2_jax import sharding
from mathv2_jax.model import attention, cache, dsa, mla, picked, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import hlo
from tests import traced

LENGTH, BATCH, TOPK = 48, 4, 5


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layout():
    """A prompt with two answers and a document after them; padding; and one whole sequence."""
    segments_T = np.repeat([1, 2, 3, 4, 0], [9, 7, 8, 21, 3])
    prefixes_T = np.repeat([1, 1, 1, 4, 0], [9, 7, 8, 21, 3])
    positions_T = np.concatenate([np.arange(16), np.arange(9, 17), np.arange(21), np.zeros(3)])
    rows = [(positions_T, segments_T, prefixes_T)] * 3
    rows.append((np.arange(LENGTH), np.ones(LENGTH), np.ones(LENGTH)))
    return cache.Layout(*(jnp.asarray(np.stack(x), jnp.int32) for x in zip(*rows, strict=True)))


@pytest.fixture(scope="module")
def layer(sparse_model):
    """(config, params, inputs) of a layer whose heads and indexer heads two devices share."""
    params = jax.tree.map(lambda x: x[0], sparse_model.variables["params"]["sparse"]["attention"])
    config = dataclasses.replace(sparse_model.config, index_topk=TOPK)
    return config, params, draw(0, BATCH, LENGTH, config.width)


def both_ways(config, align, gathers, params, x_BTD):
    """Output of real places and the indexer's loss, with the gradients of a mixture of them."""
    module = mla.LatentAttention(config, attention.attend_densely, align, gathers)
    mix_BTD, real_BT = draw(1, *x_BTD.shape), layout().segments_BT > 0

    def total(params, x_BTD):
        out_BTD, loss = module.apply({"params": params}, x_BTD, layout(), method="expanded")
        out_BTD = jnp.where(real_BT[..., None], out_BTD, 0.0)
        return jnp.sum(out_BTD * mix_BTD) + (0.0 if loss is None else loss), (out_BTD, loss)

    return jax.grad(total, argnums=(0, 1), has_aux=True)(params, x_BTD)


def require_same(found, wanted):
    for got, due in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, due, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("align", ["off", "sparse"])
@pytest.mark.parametrize(("block", "chunks"), [(None, 8), (4, 3), (5, 1)])
def test_it_is_expanded_attention_narrowed_by_the_same_indexer(
    layer, align, block, chunks, monkeypatch
):
    config, params, x_BTD = layer
    cut = functools.partial(picked.attend, block=block, chunks=chunks)
    monkeypatch.setattr(picked, "attend", cut)
    found, wanted = (
        jax.jit(functools.partial(both_ways, config, align, gathers))(params, x_BTD)
        for gathers in (picked.always, picked.never)
    )
    require_same(found, wanted)
    assert np.abs(wanted[1][0]).max() > 0.5
    assert align == "off" or wanted[1][1] > 0.5


@pytest.mark.parametrize(
    "axes", [dict(data=2, context=4), dict(data=2, tensor=2, context=2), dict(data=4, tensor=2)]
)
@pytest.mark.parametrize("block", [3, 5])  # blocks that devices hold whole, and others
def test_devices_that_share_a_row_or_the_heads_give_what_one_gives(layer, axes, block, monkeypatch):
    config, params, x_BTD = layer
    monkeypatch.setattr(picked, "attend", functools.partial(picked.attend, block=block, chunks=2))
    step = functools.partial(both_ways, config, "sparse")
    wanted = jax.jit(functools.partial(step, picked.never))(params, x_BTD)
    mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(step, picked.always))(params, x_BTD)
    require_same(found, wanted)


def test_gradients_of_what_the_devices_of_a_row_hold_in_common_meet_once(layer, monkeypatch):
    """Not in every turn of the loop: there a row of 131,072 tokens has hundreds."""
    config, params, x_BTD = layer
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, context=4))
    attend = picked.attend

    def sent(block):
        cut = functools.partial(attend, block=block, chunks=1)
        monkeypatch.setattr(picked, "attend", cut)
        step = jax.jit(functools.partial(both_ways, config, "sparse", picked.always))
        with jax.set_mesh(mesh):
            text = step.lower(params, x_BTD).compile().as_text()
        return hlo.collectives(text).bytes_by_kind

    few, many = sent(3), sent(1)
    assert few["all-reduce"] > 0 and many["all-reduce"] <= 1.1 * few["all-reduce"]


def test_without_picks_there_is_nothing_to_gather(layer):
    config, _, _ = layer
    queries = dsa.IndexQueries(draw(1, 1, 4, 2, 4), draw(2, 1, 4, 2))
    index = dsa.Index(queries, draw(3, 1, 4, 4), 0, False)
    latents = cache.LatentPair(draw(4, 1, 4, 3), draw(5, 1, 4, 2), draw(3, 1, 4, 4))
    where = cache.plain_layout(jnp.full((1,), 4), 4)
    with pytest.raises(ValueError, match="index.topk = 0"):
        picked.attend(
            draw(6, 1, 4, 2, 5), draw(7, 1, 4, 2, 2), latents, draw(8, 3, 2, 9), where, 1.0, index
        )
    assert config.index_topk


def test_v32_gathers_in_rows_that_are_long_beside_its_picks():
    config = ModelConfig(**deepseek_v32.model())
    lengths = (1024, 4096, 8192, 16_384, 131_072)
    assert [picked.where_cheaper(config, x) for x in lengths] == [False, False, False, True, True]


def test_no_array_of_a_long_row_is_as_large_as_its_square(layer):
    config, params, _ = layer
    length = 2048
    module = mla.LatentAttention(config, attention.attend_densely, "sparse", picked.always)
    where = cache.plain_layout(jnp.full((1,), length), length)

    def total(params, x_BTD):
        out_BTD, loss = module.apply({"params": params}, x_BTD, where, method="expanded")
        return jnp.sum(out_BTD) + loss

    x_BTD = jax.ShapeDtypeStruct((1, length, config.width), jnp.float32)
    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(params, x_BTD)
    assert traced.largest(program.jaxpr) < length * length


def test_a_whole_model_that_recomputes_its_layers_learns_the_same_on_devices_that_share_rows():
    own = dict(num_mtp_layers=0, q_latent_width=12, kv_latent_width=12, remat="full")
    config = ModelConfig(**tiny_v32.model() | own)
    rng = np.random.default_rng(5)
    boxed = transformer.boxed_abstract(config)
    variables = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
        transformer.unboxed(boxed),
    )
    tokens_BT = jnp.asarray(rng.integers(0, config.vocab_size, (2, 48)), jnp.int32)
    where = cache.plain_layout(jnp.asarray([48, 31]), 48)

    def loss(gathers, params):
        kernels = transformer.Kernels(gathers=gathers)
        out = transformer.apply(
            config, {**variables, "params": params}, tokens_BT, where, kernels=kernels
        )
        real_BT1 = (where.segments_BT > 0)[..., None]
        return jnp.sum(jnp.where(real_BT1, jnp.sin(out.hidden_BTD), 0.0))

    wanted = jax.jit(jax.value_and_grad(functools.partial(loss, picked.never)))
    value, slopes = wanted(variables["params"])
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, context=4))
    split = jax.device_put(variables["params"], sharding.shardings_for(boxed, mesh)["params"])
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(functools.partial(loss, picked.always)))(split)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    for got, due in zip(jax.tree.leaves(found[1]), jax.tree.leaves(slopes), strict=True):
        assert np.linalg.norm(got - due) <= 1e-4 * np.linalg.norm(due)
