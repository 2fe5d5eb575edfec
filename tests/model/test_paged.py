"""Pieces of prompts long enough for every form of attention over pages."""

import dataclasses
import functools

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax import sharding
from mathv2_jax.model import attention, cache, mla, paged

LENGTH, PAGE, ROWS = 64, 4, 2


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture
def layer(model):
    params = model.variables["params"]["sparse"]["attention"]
    module = mla.LatentAttention(model.config, attention.attend_densely, slots=8)
    return model.config, module, {"params": jax.tree.map(lambda x: x[0], params)}


def over_pages(layer, x_BTD, *lengths, mesh=None, width=0):
    """Rows in pieces of these lengths, one after the other, in pages of no order.

    Each is padded to `width` tokens.
    """
    config, module, variables = layer
    ways = 1 if mesh is None else sharding.batch_ways(mesh)
    each = ROWS // ways
    held = each * LENGTH // PAGE + 1
    table_BM = np.concatenate(
        [
            1 + np.random.default_rng(part).permutation(held - 1).reshape(each, -1)
            for part in range(ways)
        ]
    ).astype(np.int32)
    pages = jax.tree.map(lambda x: x + 9.0, cache.empty_pages(config, 1, ways * held, PAGE))
    run = jax.jit(functools.partial(module.apply, method="paged"))
    none_B, begin, found = jnp.zeros(ROWS, jnp.int32), 0, []
    for length in lengths:
        padding = max(width - length, 0)
        at_T = np.pad(np.arange(begin, begin + length), (0, padding), constant_values=-1)
        at_BT = jnp.broadcast_to(jnp.asarray(at_T), (ROWS, length + padding))
        view = cache.PageView(jnp.asarray(table_BM), at_BT, none_B, none_B)
        x_BtD = jnp.pad(x_BTD[:, begin : begin + length], ((0, 0), (0, padding), (0, 0)))
        out, pages = run(variables, x_BtD, at_BT, pages, jnp.int32(0), view)
        found.append(out[:, :length])
        begin += length
    return jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("lengths", [(64,), (32, 32), (40, 24), (8, 56)], ids=str)
def test_pieces_of_any_length_give_expanded_attention_of_the_whole_row(layer, lengths, monkeypatch):
    config, module, variables = layer
    forms = {"_expanded": 0, "_absorbed": 0, "_picked": 0}
    for name in forms:
        form = getattr(paged, name)

        def noted(*args, name=name, form=form):
            forms[name] += 1
            return form(*args)

        monkeypatch.setattr(paged, name, noted)
    x_BTD = draw(1, ROWS, LENGTH, config.width)
    layout = cache.plain_layout(jnp.full((ROWS,), LENGTH), LENGTH)
    wanted_BTD, _ = module.apply(variables, x_BTD, layout, method="expanded")
    got_BTD = over_pages(layer, x_BTD, *lengths)
    np.testing.assert_allclose(got_BTD, wanted_BTD, rtol=1e-4, atol=2e-5)
    assert bool(forms["_picked"]) == bool(config.index_topk)
    if not config.index_topk:
        assert forms["_expanded"]  # long pieces are expanded


def test_where_a_prompt_is_cut_changes_no_bit_of_it(layer):
    """In calls of one shape; another shape's products may round otherwise."""
    config, _, _ = layer
    x_BTD = draw(2, ROWS, LENGTH, config.width)
    one = over_pages(layer, x_BTD, *[16] * 4, width=16)
    other = over_pages(layer, x_BTD, 4, *[16] * 3, 8, 4, width=16)
    np.testing.assert_array_equal(one, other)


def test_devices_that_split_rows_each_have_pages_of_their_own(layer):
    config, _, _ = layer
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2), jax.devices()[:2])
    x_BTD = draw(3, ROWS, LENGTH, config.width)
    alone = over_pages(layer, x_BTD, 56, 8)
    with jax.set_mesh(mesh):
        together = over_pages(layer, x_BTD, 56, 8, mesh=mesh)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_lines_that_are_kept_wider_than_they_are_change_nothing(layer):
    """As those of released models are: 512 + 64 in 640."""
    narrow, _, _ = layer
    index = dict(index_head_width=136) if narrow.index_topk else {}
    config = dataclasses.replace(narrow, kv_latent_width=124, head_rope_width=8, **index)
    assert cache.empty_pages(config, 1, 3, PAGE).lines_LNZX.shape[-1] == 256
    module = mla.LatentAttention(config, attention.attend_densely, slots=8)
    x_BTD = draw(4, ROWS, LENGTH, config.width)
    layout = cache.plain_layout(jnp.full((ROWS,), LENGTH), LENGTH)
    made = module.init(jax.random.key(0), x_BTD, layout, method="expanded")
    variables = {"params": jax.tree.map(lambda x: x + 0.1, flax.core.meta.unbox(made)["params"])}
    wanted_BTD, _ = module.apply(variables, x_BTD, layout, method="expanded")
    got_BTD = over_pages((config, module, variables), x_BTD, 40, 23, 1)
    np.testing.assert_allclose(got_BTD, wanted_BTD, rtol=1e-4, atol=2e-5)
