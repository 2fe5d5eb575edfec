"""FLOPs: of a model by the published counts, of programs by what they plainly do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from configs.models import deepseek_v3, deepseek_v32, tiny_v3, tiny_v32
from mathv2_jax import sharding
from mathv2_jax.model import cache, grouped, heads, picked, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import counting, measure


def test_a_token_of_deepseek_v3_costs_two_flops_for_each_activated_parameter():
    """36.6 B of the 671 B are active, without the embedding; 1.70 G more are the indexers'."""
    for module, activated in ((deepseek_v3, 36.6), (deepseek_v32, 37.5)):
        terms = counting.model_flops(ModelConfig(**module.model()), 1, 1, longest=163840)
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
    topk = config.index_topk
    one, both, last = (
        counting.model_flops(config, 3, 1, past=past, longest=longest)
        for past, longest in ((4, 300), (200, 300), (4, 5))
    )
    key = config.head_key_width + config.head_rope_width + config.head_value_width
    per_key = 2 * 3 * config.num_heads * key * config.num_layers
    assert one.attention == last.attention == 5 * per_key and topk > 5
    assert both.attention == min(201, topk) * per_key
    scores = 2 * 3 * config.index_heads * config.index_head_width * config.num_layers
    assert both.indexer == 201 * scores and one.indexer == 5 * scores


@pytest.mark.parametrize("longest", [None, 40])
def test_what_is_fed_in_pieces_costs_what_it_costs_at_once(longest):
    """A piece's sequences become longer than they are, so an indexer is told how long."""
    config = ModelConfig(**tiny_v32.model() | dict(index_topk=6))
    whole = counting.model_flops(config, 2, 13, longest=longest or 13)
    first = counting.model_flops(config, 2, 4, longest=longest or 13)
    second = counting.model_flops(config, 2, 9, past=4, longest=longest or 13)
    for name, value in dataclasses.asdict(whole).items():
        assert getattr(first, name) + getattr(second, name) == value, name
    assert first.indexer > 0


def test_an_indexer_that_picks_everything_costs_nothing():
    config = ModelConfig(**tiny_v32.model() | dict(index_topk=6))
    few, many = (counting.model_flops(config, 2, n) for n in (6, 7))
    assert few.indexer == few.indexer_projections == 0.0
    assert many.indexer > 0 and many.indexer_projections > 0


def test_products_are_told_apart_by_the_pass_that_they_are_of():
    """Of y = f(f(x)) with f recomputed: two products forward, two anew, and two for each back."""
    w = jnp.ones((4, 4))

    def loss(w):
        f = jax.checkpoint(lambda x: jnp.sin(x @ w))
        with jax.named_scope("dense"):
            return jnp.sum(f(f(jnp.ones((4, 4)))))

    found = counting.executed(jax.make_jaxpr(jax.grad(loss))(w))
    one = 2 * 4**3
    passes = {counting.FORWARD: 2 * one, counting.ANEW: 2 * one, counting.BACKWARD: 3 * one}
    assert found.by_pass == {"dense_layers": passes}


def step_of(remat):
    """(FLOPs of the model's terms, executed ones by pass) of a gradient."""
    config = ModelConfig(**tiny_v32.model() | dict(num_mtp_layers=0, remat=remat))
    kernels = transformer.Kernels(experts=grouped.ragged)
    shapes = transformer.unboxed(transformer.boxed_abstract(config))
    tokens_BT = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def loss(variables, tokens_BT):
        return jnp.sum(forward(config, kernels, variables, tokens_BT))

    executed = counting.executed(jax.jit(jax.grad(loss)).trace(shapes, tokens_BT).jaxpr)
    terms = counting.model_flops(config, 2, 16).trained(aligned=False)
    return dataclasses.asdict(terms), executed.by_pass


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_is_executed_beyond_the_models_flops_is_named_in_full(remat):
    terms, by_pass = step_of(remat)
    found = measure.excess(terms, by_pass, trained=True)
    executed = sum(sum(passes.values()) for passes in by_pass.values())
    named = sum(sum(passes.values()) for passes in found.values())
    assert named == pytest.approx(executed - sum(terms.values()), rel=1e-9)
    for part in ("attention_projections", "dense_layers"):
        over = found.get(part, dict.fromkeys(counting.PASSES, 0.0))
        assert over[counting.FORWARD] == pytest.approx(0.0, abs=1.0), part
        again = over[counting.ANEW] / terms[part]
        assert again == 0.0 if remat == "none" else 0.2 < again <= 1 / 3, part
    # Dense attention is over the square, of which about a half is seen.
    square = found["attention"]
    assert square[counting.FORWARD] > 0 and square[counting.BACKWARD] > 0
