"""FLOPs: of a model by the published counts, of programs by what they plainly do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import deepseek_v3, deepseek_v32, tiny_v3, tiny_v32
from mathv2_jax import sharding
from mathv2_jax.model import cache, grouped, heads, picked, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import counting


def test_a_token_of_deepseek_v3_costs_two_flops_for_each_activated_parameter():
    """36.6 B of the 671 B are active, without the embedding; 1.70 G more are the indexers'."""
    for module, activated in ((deepseek_v3, 36.6), (deepseek_v32, 37.5)):
        terms = counting.model_flops(ModelConfig(**module.model()), 1, 1)
        matrices = terms.total - terms.attention - terms.indexer
        assert matrices / 2e9 == pytest.approx(activated, abs=0.05)


@pytest.mark.parametrize(("topk", "length"), [(0, 9), (4, 9), (9, 9), (20, 9)])
def test_attention_is_over_each_tokens_keys_but_no_more_than_are_picked(topk, length):
    config = ModelConfig(**tiny_v32.model() | dict(index_topk=topk or 5))
    if not topk:
        config = ModelConfig(**tiny_v3.model())
    terms = counting.model_flops(config, 3, length)
    pairs = sum(min(t + 1, topk or length) for t in range(length))
    key = config.head_key_width + config.head_rope_width
    each = 2 * config.num_heads * (key + config.head_value_width) * config.num_layers
    assert terms.attention == 3 * pairs * each
    scores = 2 * config.index_heads * config.index_head_width * config.num_layers
    assert terms.indexer == 3 * length * (length + 1) / 2 * scores * (0 < topk < length)


def forward(config, kernels, variables, tokens_BT):
    lengths_B = jnp.full((tokens_BT.shape[0],), tokens_BT.shape[1])
    layout = cache.plain_layout(lengths_B, tokens_BT.shape[1])
    out = transformer.apply(config, variables, tokens_BT, layout, kernels=kernels)
    return heads.logits(out.hidden_BTD, variables["params"]["unembed"])


@pytest.mark.parametrize("base", [tiny_v3, tiny_v32], ids=["v3", "v32"])
def test_a_forward_pass_executes_what_its_model_has_by_parts(base):
    """All but attention, which is over the whole square here, and the indexer likewise."""
    config = ModelConfig(**base.model() | dict(num_mtp_layers=0))
    kernels = transformer.Kernels(experts=grouped.ragged)
    shapes = transformer.unboxed(transformer.boxed_abstract(config))
    tokens_BT = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    traced = jax.jit(functools.partial(forward, config, kernels)).trace(shapes, tokens_BT)
    found = counting.executed(traced.jaxpr)
    wanted = dataclasses.asdict(counting.model_flops(config, 2, 16))
    square = 2 * 16 * 16 * 2 * config.num_layers
    key = config.head_key_width + config.head_rope_width + config.head_value_width
    wanted["attention"] = square * config.num_heads * key
    wanted["routed_experts"] += (  # the weighted sum of a token's experts
        2 * 2 * 16 * config.num_sparse_layers * config.experts_per_token * config.width
    )
    if config.index_topk:  # and the sum over its heads
        wanted["indexer"] = square * config.index_heads * (config.index_head_width + 1)
    assert not found.unknown
    assert {n: x for n, x in wanted.items() if x} == pytest.approx(dict(found.whole))


def test_a_loop_counts_by_its_length_and_one_without_is_named():
    def looped(x):
        y, _ = jax.lax.scan(lambda c, _: (c @ x, None), x, length=7)
        return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ x, y)

    found = counting.executed(jax.make_jaxpr(looped)(jnp.ones((4, 4))))
    assert found.per_chip(2) == {counting.OTHER: (7 + 1) * 2 * 4**3 / 2}
    assert len(found.unknown) == 1


def test_a_samplers_loops_are_told_apart_by_their_scopes():
    loops = counting.Loops(turns=64.0, blocks=4.5)
    assert loops.length("jit(decode)/while") == 64.0
    within = "jit(decode)/while/body/sparse/attention.paged/attend/while"
    assert loops.length(within) == loops.length(within.replace("attend", "index")) == 4.5
    assert counting.Loops(blocks=4.5).length("jit(prefill)/while") is None


@pytest.mark.parametrize("remat", ["none", "full", "dots", "dots_no_batch"])
def test_what_an_indexer_picks_is_never_picked_again_in_a_backward_pass(remat):
    config = ModelConfig(**tiny_v32.model() | dict(num_mtp_layers=0, remat=remat))
    kernels = transformer.Kernels(gathers=picked.always)
    shapes = transformer.unboxed(transformer.boxed_abstract(config))
    tokens_BT = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def loss(variables, tokens_BT):
        return jnp.sum(forward(config, kernels, variables, tokens_BT))

    once, again = (
        counting.executed(jax.jit(f).trace(shapes, tokens_BT).jaxpr).per_chip(1)
        for f in (loss, jax.grad(loss))
    )
    assert again["indexer"] == once["indexer"] > 0
    assert again["attention"] >= 3 * once["attention"] > 0


def test_what_each_device_does_is_not_shared_out():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=8))
    spec = jax.sharding.PartitionSpec("data")

    def mapped(x, y):
        own = jax.shard_map(lambda a: a @ a.T, mesh=mesh, in_specs=spec, out_specs=spec)(x)
        return own, x @ y

    found = counting.executed(jax.make_jaxpr(mapped)(jnp.ones((16, 4)), jnp.ones((4, 5))))
    assert found.per_chip(8) == {counting.OTHER: 2 * 2 * 2 * 4 + 2 * 16 * 4 * 5 / 8}


def test_what_a_map_over_one_axis_leaves_to_the_compiler_is_shared_out():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, context=4))
    spec = jax.sharding.PartitionSpec(None, "context")

    def mapped(x):
        product = jax.shard_map(
            lambda a: a.T @ a, in_specs=spec, out_specs=spec, axis_names={"context"}
        )
        return jax.jit(product)(x)

    with jax.set_mesh(mesh):
        found = counting.executed(jax.make_jaxpr(mapped)(jnp.ones((16, 8))))
    assert found.per_chip(8) == {counting.OTHER: 2 * 16 * 2 * 2 / 2}


def test_a_grouped_product_and_its_gradients_do_not_count_by_the_number_of_groups():
    def flops(num_experts):
        weights = grouped.ExpertWeights(
            jnp.ones((num_experts, 6, 5)),
            jnp.ones((num_experts, 6, 5)),
            jnp.ones((num_experts, 5, 6)),
        )

        def total(x_ND, weights):
            ids_NA = jnp.zeros((8, 2), jnp.int32)
            return jnp.sum(grouped.ragged(x_ND, ids_NA, jnp.ones((8, 2)), weights))

        program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(jnp.ones((8, 6)), weights)
        # The weighted sum of each token's experts is a product too.
        return counting.executed(program).per_chip(1)[counting.OTHER]

    assert flops(4) == flops(16) == pytest.approx(3 * 3 * 2 * 16 * 6 * 5, rel=0.1)


def test_decoding_attends_to_the_past_and_itself():
    config = ModelConfig(**tiny_v32.model())
    one = counting.decode_flops(config, 3, 4)
    both = counting.decode_flops(config, 3, 200)
    key = config.head_key_width + config.head_rope_width + config.head_value_width
    per_key = 2 * 3 * config.num_heads * key * config.num_layers
    assert one.attention == 5 * per_key
    assert both.attention == min(201, config.index_topk) * per_key
    scores = 2 * 3 * config.index_heads * config.index_head_width * config.num_layers
    assert both.indexer == 201 * scores and config.index_topk > 4 and one.indexer == 0
    assert np.isfinite(both.total)
