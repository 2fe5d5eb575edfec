import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mathv2_jax import sharding
from mathv2_jax.model import cache, grouped, heads, transformer
from mathv2_jax.model.config import ModelConfig

# Every dimension that the table shards is even, and no two kinds of width are equal.
TINY = ModelConfig(
    vocab_size=32,
    width=16,
    num_layers=2,
    num_heads=2,
    q_latent_width=16,
    kv_latent_width=8,
    head_key_width=6,
    head_rope_width=4,
    head_value_width=5,
    dense_width=24,
    expert_width=8,
    num_experts=4,
    experts_per_token=2,
    embedding_taps=1,
    logprob_chunk=5,
)


def mesh_of(**sizes):
    return sharding.make_mesh(sharding.MeshConfig(**sizes))


def boxed(shape, *axes):
    return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names=axes)


def test_one_mesh_axis_takes_the_devices_that_are_left():
    mesh = mesh_of(fsdp=2, data=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2, "context": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.devices.ravel().tolist() == jax.devices()
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    assert set(one.shape.values()) == {1}


class Device(NamedTuple):
    process_index: int
    id: int


def processes_of(number, devices):
    return [Device(at % number, at) for at in range(number * devices)]


@pytest.mark.parametrize(("replicas", "owners"), [(1, [3]), (3, [1] * 3), (6, [1] * 6)])
def test_a_replica_holds_whole_processes_or_is_held_by_one(replicas, owners):
    groups = sharding.replica_groups(processes_of(3, 2), replicas)
    assert [len({d.process_index for d in group}) for group in groups] == owners
    assert sorted(d for group in groups for d in group) == sorted(processes_of(3, 2))


@pytest.mark.parametrize(
    ("number", "devices", "replicas", "rule"),
    [
        (3, 2, 2, r"a replica would have a part of the devices of processes \[0, 1\]"),
        (4, 1, 3, "4 devices cannot be split so"),
        (4, 1, 0, "replicas = 0"),
    ],
)
def test_replicas_that_cut_processes_are_refused(number, devices, replicas, rule):
    with pytest.raises(ValueError, match=rule):
        sharding.replica_groups(processes_of(number, devices), replicas)


def test_replicas_have_meshes_of_their_own_and_their_part_of_every_array():
    mesh = mesh_of(fsdp=4, tensor=2)
    config = sharding.SamplingConfig(replicas=2, data=1, tensor=4)
    sampling = sharding.make_sampling_mesh(config, mesh)
    assert dict(sampling.shape) == {
        sharding.REPLICAS: 2,
        **dict(mesh_of(data=2, tensor=4).shape),
        "data": 1,
    }
    second = sharding.replica_mesh(sampling, 1)
    assert second.devices.ravel().tolist() == jax.devices()[4:]
    spec = PartitionSpec(None, "tensor")
    trained = jax.device_put(
        np.arange(64.0).reshape(8, 8), NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    spread = jax.device_put(trained, NamedSharding(sampling, spec))
    own = sharding.part_of({"x": spread}, {"x": NamedSharding(second, spec)})["x"]
    assert own.sharding.device_set == set(jax.devices()[4:])
    np.testing.assert_array_equal(own, trained)


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        (dict(data=-1, fsdp=-1), "data=-1, fsdp=-1.*-1 at one axis at most"),
        (dict(data=8, tensor=0), "tensor=0.*sizes are positive"),
        (dict(data=8, expert=-2), "expert=-2.*sizes are positive"),
        (dict(data=4), "data=4.*does not fit 8 devices"),
        (dict(data=4, fsdp=4), "data=4, fsdp=4.*does not fit 8 devices"),
        (dict(data=-1, tensor=3), "data=-1.*tensor=3.*does not fit 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_its_sizes(sizes, rule):
    with pytest.raises(ValueError, match=rule):
        mesh_of(**sizes)


def test_logical_axes_go_where_the_table_says():
    spec = functools.partial(sharding.partition_spec, where="p")
    batch = ("data", "fsdp", "expert")
    assert spec(("batch", "time", None)) == PartitionSpec(batch, "context", None)
    assert spec((None, sharding.FREE)) == PartitionSpec(None, PartitionSpec.UNCONSTRAINED)
    assert spec(("experts", "embed", "mlp")) == PartitionSpec(
        "expert", ("fsdp", "context"), "tensor"
    )
    assert spec(("norm", "norm")) == PartitionSpec(None, None)
    for mesh_axes in sharding.LOGICAL_TO_MESH.values():
        assert set(mesh_axes) <= set(sharding.MESH_AXES)


@pytest.mark.parametrize(
    ("leaf", "rule"),
    [
        (boxed((4, 4), "embed", "hidden"), "unknown logical axis 'hidden'"),
        (boxed((4, 4), "embed", "batch"), "'embed' and 'batch' both go to mesh axis 'fsdp'"),
        (boxed((4, 4), "vocab", "vocab"), "'vocab' and 'vocab' both go to mesh axis 'tensor'"),
        (boxed((4, 5), "embed", "vocab"), "dimension 5 cannot be split 2 ways over .*tensor"),
        (boxed((4, 6), "embed"), "1 logical axes .* 2 dimensions"),
        (jax.ShapeDtypeStruct((4, 4), jnp.float32), "has no logical axes"),
    ],
)
def test_a_parameter_that_cannot_be_laid_out_is_named(leaf, rule):
    tree = {"layer": {"good": boxed((2, 4), "layers", "embed"), "gate": leaf}}
    with pytest.raises(ValueError, match=rf"^layer/gate.*{rule}"):
        sharding.shardings_for(tree, mesh_of(data=2, fsdp=2, tensor=2))


def test_every_parameter_of_the_model_has_axes_in_the_table():
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    tree = transformer.boxed_abstract(TINY)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    for leaf in leaves:
        assert isinstance(leaf, nn.Partitioned)
        assert set(leaf.names) <= set(sharding.LOGICAL_TO_MESH)
        assert len(leaf.names) == len(leaf.value.shape)
    found: Any = sharding.shardings_for(tree, mesh)
    params, router = found["params"], found["router"]
    both = ("fsdp", "context")
    assert params["embed"].spec == PartitionSpec("tensor", both)
    assert params["unembed"].spec == PartitionSpec(both, "tensor")
    assert params["verifier_head_kernel"].spec == PartitionSpec(both, None)
    experts = params["sparse"]["mlp"]
    assert experts["experts_gate"].spec == PartitionSpec(None, "expert", both, "tensor")
    assert experts["experts_down"].spec == PartitionSpec(None, "expert", "tensor", both)
    assert router["sparse"]["mlp"]["bias"].spec == PartitionSpec(None, None)


def test_each_device_holds_its_share_of_the_big_matrices():
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    tree = transformer.boxed_abstract(TINY)
    held = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) / x.size,
        transformer.unboxed(tree),
        sharding.shardings_for(tree, mesh),
    )["params"]
    routed = held["sparse"]["mlp"]
    assert {routed[f"experts_{name}"] for name in ("gate", "up", "down")} == {1 / 8}
    assert held["embed"] == held["unembed"] == held["dense"]["mlp"]["gate"] == 1 / 4
    attention = held["sparse"]["attention"]
    assert attention["o"] == attention["q_b"] == attention["kv_b"] == 1 / 4


def test_a_constraint_lays_out_under_a_mesh_and_is_nothing_without_one():
    x_BTD = jnp.arange(8 * 2 * 4, dtype=jnp.float32).reshape(8, 2, 4)
    assert sharding.constrain(x_BTD, "batch", "time", None) is x_BTD
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        laid_out = jax.jit(lambda x: sharding.constrain(x, "batch", "time", "vocab"))(x_BTD)
    wanted = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), None, "tensor"))
    assert laid_out.sharding.is_equivalent_to(wanted, 3)
    np.testing.assert_array_equal(laid_out, x_BTD)


def test_batches_are_split_over_data_fsdp_and_expert():
    mesh = mesh_of(fsdp=2, expert=2, tensor=2)
    assert sharding.batch_ways(mesh) == 4
    assert sharding.batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)
    assert sharding.replicated(mesh).shard_shape((8, 3)) == (8, 3)


# N devices = 1.


def drawn_variables():
    """Norm scales about one, everything else about zero, the router's bias too."""
    rng = np.random.default_rng(0)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    shapes = transformer.unboxed(transformer.boxed_abstract(TINY))
    return jax.tree_util.tree_map_with_path(one, shapes)


def drawn_batch():
    """Rows of a prompt with two answers and some padding: tokens, layout, sources, weights."""
    rng = np.random.default_rng(1)
    tokens_BT = rng.integers(0, TINY.vocab_size, (8, 12))
    segments_BT = np.tile([1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0], (8, 1))
    segments_BT[5:, 7:] = 0
    positions_BT = np.tile([0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 0, 0], (8, 1))
    sources_BT = np.tile([0, 0, 1, 2, 3, 4, 5, 3, 7, 8, 10, 11], (8, 1))
    weights_BT = (segments_BT > 1) * rng.standard_normal((8, 12))
    ints = [jnp.asarray(x, jnp.int32) for x in (tokens_BT, positions_BT, segments_BT, sources_BT)]
    tokens, positions, segments, sources = ints
    layout = cache.Layout(positions, segments, jnp.minimum(segments, 1))
    return tokens, layout, sources, jnp.asarray(weights_BT, jnp.float32)


def loss_load_and_grads(experts, variables, batch):
    """A policy-gradient-like sum of both heads, the experts' load, and all gradients."""
    tokens_BT, layout, sources_BT, weights_BT = batch
    positions_BT = layout.positions_BT

    def loss(params):
        out = transformer.apply(
            TINY,
            {**variables, "params": params},
            tokens_BT,
            layout,
            previous_BTW=cache.previous_tokens(tokens_BT, sources_BT, TINY.embedding_taps),
            kernels=transformer.Kernels(experts=experts),
        )
        assert out.routing is not None
        hidden_BTD = jnp.take_along_axis(out.hidden_BTD, sources_BT[..., None], axis=1)
        neighbours_BT3 = (tokens_BT[..., None] + jnp.arange(3)[None, None]) % TINY.vocab_size
        allowed_BT3 = jnp.where(positions_BT[..., None] % 2 == 0, neighbours_BT3, -1)
        found = heads.token_logprobs(
            hidden_BTD, params["unembed"], tokens_BT, allowed_BT3, chunk=TINY.logprob_chunk
        )
        score_B3 = heads.score_logits(
            out.hidden_BTD[:, 3], params["verifier_head_kernel"], params["verifier_head_bias"]
        )
        total = jnp.sum(weights_BT * (found.logprob_BT + 0.1 * found.entropy_BT))
        return total + jnp.sum(jax.nn.log_softmax(score_B3)[:, 0]), out.routing.load_E

    (value, load_LE), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, load_LE, grads


@pytest.fixture(scope="module")
def on_one_device():
    variables, batch = drawn_variables(), drawn_batch()
    found = jax.jit(functools.partial(loss_load_and_grads, grouped.every_expert))(variables, batch)
    return jax.device_get(found)


@pytest.mark.parametrize(
    ("sizes", "experts"),
    [
        (dict(data=2, fsdp=2, expert=1, tensor=2), grouped.sorted_blocks),
        (dict(data=1, fsdp=2, expert=2, tensor=2), grouped.ragged),
        (dict(data=1, fsdp=2, expert=4, tensor=1), grouped.sorted_blocks),
        (dict(data=1, fsdp=2, expert=1, context=4), grouped.ragged),
        (dict(data=1, expert=2, tensor=2, context=2), grouped.sorted_blocks),
    ],
    ids=["data-fsdp-tensor", "fsdp-expert-tensor", "expert", "context", "expert-tensor-context"],
)
def test_many_devices_give_the_loss_load_and_gradients_of_one(on_one_device, sizes, experts):
    mesh = mesh_of(**sizes)
    shardings = sharding.shardings_for(transformer.boxed_abstract(TINY), mesh)
    variables = jax.device_put(drawn_variables(), shardings)
    batch = jax.device_put(drawn_batch(), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(loss_load_and_grads, experts))
        value, load_LE, grads = step(variables, batch)
    wanted_value, wanted_load_LE, wanted_grads = on_one_device
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    np.testing.assert_array_equal(load_LE, wanted_load_LE)
    wanted = dict(jax.tree_util.tree_leaves_with_path(wanted_grads))
    for path, got in jax.tree_util.tree_leaves_with_path(grads):
        error = np.linalg.norm(np.asarray(got) - wanted[path])
        size = np.linalg.norm(wanted[path])
        assert size > 0 and error < 1e-5 * size, f"{jax.tree_util.keystr(path)}: {error / size}"


def test_a_host_array_does_not_slip_into_a_compiled_call() -> None:
    double, here = jax.jit(lambda x: x + x), np.ones(2, np.float32)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    with sharding.computing(mesh):
        put = jax.device_put(here, sharding.replicated(mesh))
        assert double(put).tolist() == [2.0, 2.0]
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            double(here)
