"""The mesh, the one table from logical to mesh axes, and shardings for a tree of parameters.

Parameters name logical axes where they are declared; nothing else in the project names a mesh axis.
Unlike Flax's own resolver this one raises on an unknown axis and on a mesh axis used twice.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
REPLICAS = "replicas"  # the further axis of a mesh of sampling replicas

LOGICAL_TO_MESH: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "time": ("context",),
    "layers": (),
    # Not over expert too: shares of less than a tile (7 rows a chip) XLA sums and does not gather.
    "embed": ("fsdp", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "head_width": (),
    "q_latent": (),
    "kv_latent": (),
    "latent_in": ("fsdp", "context"),  # of what is expanded from a latent
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "norm": (),
    "score": (),
}

# In `constrain`: the compiler lays this dimension out as it likes.
FREE = PartitionSpec.UNCONSTRAINED

# Logical axes that are split to share out memory, not work.
STORED_APART = ("embed", "latent_in")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at one place) takes what is left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all `devices`; ValueError where the sizes do not multiply to their number.

    Chips of a TPU are placed so that neighbours on an axis are linked, and several slices along
    `data` only, since what joins them is slow; ValueError where its size does not let them.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(found))
    if found[0].platform == "tpu":
        arranged = _on_torus(found, sizes)
    else:
        arranged = np.asarray(found).reshape(sizes)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _on_torus(found: Sequence[Any], sizes: Sequence[int]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in found})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, found, allow_split_physical_axes=True)
    data, *others = sizes
    if data % slices:
        raise ValueError(
            f"mesh data={data}: {slices} slices lie along data, so its size must be a multiple of "
            "their number"
        )
    apart = (slices, *(1 for _ in others))
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others), apart, found, allow_split_physical_axes=True
    )


def mesh_sizes(config: MeshConfig, number: int) -> list[int]:
    """The sizes of the axes of a mesh of `number` devices; ValueError where they do not fit."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    text = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ValueError(f"mesh {text}: sizes are positive, with -1 at one axis at most")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and number % known == 0:
        sizes[sizes.index(-1)] = number // known
    if math.prod(sizes) != number:
        raise ValueError(
            f"mesh {text} does not fit {number} devices: the product of the sizes must be "
            "their number; set one axis to -1 to fill it"
        )
    return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(MeshConfig):
    """Replicas, groups of devices that sample apart from each other, and the mesh of each."""

    replicas: int = 1


def make_sampling_mesh(config: SamplingConfig | None, mesh: Mesh) -> Mesh:
    """A mesh of the devices of `mesh`, whose first axis, REPLICAS, counts the sampling replicas.

    Without a config all of `mesh` is one replica. ValueError where the sizes do not fit.
    """
    if config is None:
        return _sampling_mesh(mesh.devices[None])
    groups = replica_groups(mesh.devices.flat, config.replicas)
    sizes = mesh_sizes(config, len(groups[0]))
    return _sampling_mesh(np.asarray(groups).reshape(len(groups), *sizes))


def replica_groups(devices: Iterable[Any], replicas: int) -> list[list[Any]]:
    """The devices of each replica, which holds whole processes, or is held by one.

    In the order of `devices` where that does it, so that one program may hand over; else by their
    processes. ValueError where a replica would be neither.
    """
    found = list(devices)
    where = f"runtime.sampling.replicas = {replicas}"
    if replicas < 1 or len(found) % replicas:
        raise ValueError(
            f"{where}: {len(found)} devices cannot be split so; give a divisor of their number"
        )
    size = len(found) // replicas
    owners: set[int] = set()
    for order in (found, sorted(found, key=lambda device: device.process_index)):
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        owners = next(filter(None, (_cut_processes(group, order) for group in groups)), set())
        if not owners:
            return groups
    raise ValueError(
        f"{where}: a replica would have a part of the devices of processes {sorted(owners)}: give "
        "a number that splits no process, or splits every one"
    )


def _cut_processes(group: Sequence[Any], devices: Sequence[Any]) -> set[int]:
    """The processes that a group of more than one has a part of; empty where it cuts none."""
    owners = {device.process_index for device in group}
    whole = sum(device.process_index in owners for device in devices)
    return owners if len(owners) > 1 and whole > len(group) else set()


def _sampling_mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, (REPLICAS, *MESH_AXES), axis_types=(AxisType.Auto,) * devices.ndim)


def replica_mesh(sampling: Mesh, replica: int) -> Mesh:
    """The mesh of one of the replicas of a `make_sampling_mesh`."""
    devices = sampling.devices[replica]
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * devices.ndim)


def partition_spec(axes: Sequence[Any], where: str) -> PartitionSpec:
    """The mesh axes for logical `axes`; ValueError names `where` and the axis at fault."""
    used: dict[str, str] = {}
    entries: list[Any] = []
    for axis in axes:
        if axis is None or axis is FREE:
            entries.append(axis)
            continue
        if axis not in LOGICAL_TO_MESH:
            raise ValueError(
                f"{where}: unknown logical axis {axis!r}; the table has {sorted(LOGICAL_TO_MESH)}"
            )
        mesh_axes = LOGICAL_TO_MESH[axis]
        for mesh_axis in mesh_axes:
            if mesh_axis in used:
                raise ValueError(
                    f"{where}: axes {used[mesh_axis]!r} and {axis!r} both go to mesh axis "
                    f"{mesh_axis!r}; an array may use it once"
                )
            used[mesh_axis] = axis
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*entries)


def mesh_axes(axes: Sequence[str], mesh: Any) -> tuple[str, ...]:
    """The mesh axes of more than one device that logical `axes` are split over."""
    return tuple(a for name in axes for a in LOGICAL_TO_MESH[name] if mesh.shape[a] > 1)


def ways(axis: str) -> int:
    """In how many parts logical `axis` is split by the mesh in force; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[a] for a in LOGICAL_TO_MESH[axis])


def time_axis(length: int) -> str | None:
    """How `shard_map` takes a dimension of `length` times: split, or whole where it is not even."""
    return None if length % ways("time") else "time"


def laid_out(tree: Any, where: Any) -> Any:
    """The tree's shapes, each to lie where the same place of `where` says."""
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where
    )


def _names(leaf: Any, where: str) -> tuple[str | None, ...]:
    if not isinstance(leaf, nn.Partitioned):
        raise ValueError(f"{where} has no logical axes: declare it with them")
    return tuple(leaf.names)  # pyright: ignore[reportReturnType] - flax types names as Any


def shardings_for(abstract_tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of boxed (`nn.with_logical_partitioning`) abstract arrays.

    Every leaf must carry a logical axis per dimension, and each sharded dimension be divisible by
    its mesh axes; the ValueError names the parameter.
    """

    def resolve(path: Any, leaf: Any) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        names, shape = _names(leaf, where), leaf.value.shape
        if len(names) != len(shape):
            raise ValueError(
                f"{where}: {len(names)} logical axes {names} for {len(shape)} dimensions {shape}"
            )
        spec = partition_spec(names, where)
        for size, entry in zip(shape, spec, strict=True):
            over = (entry,) if isinstance(entry, str) else (entry or ())
            ways = math.prod(mesh.shape[a] for a in over)
            if size % ways:
                raise ValueError(
                    f"{where}: dimension {size} cannot be split {ways} ways over {over}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        resolve, abstract_tree, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over the batch's mesh axes."""
    return NamedSharding(mesh, partition_spec(("batch",), "batch"))


def own_rows(mesh: Mesh, rows: int) -> list[int]:
    """Those of a batch's rows that devices of this process hold."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for part in parts if part for row in range(*part[0].indices(rows))})


def batch_ways(mesh: Mesh) -> int:
    """In how many parts a batch's rows are split."""
    return math.prod(mesh.shape[a] for a in LOGICAL_TO_MESH["batch"])


def put(tree: Any, where: Any) -> Any:
    """Host arrays onto the devices of `where`, a tree of shardings like `tree`, or one for all.

    Of several processes each gives the same arrays, and sends its own devices their parts only.
    """
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, tree)
    if all(at.is_fully_addressable for at in jax.tree.leaves(where)):
        return jax.device_put(tree, where)

    def spread(x: Any, at: NamedSharding) -> jax.Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, at, lambda part: whole[part])

    with jax.transfer_guard_host_to_device("allow"):  # it is asked for here, as in device_put
        return jax.tree.map(spread, tree, where)


def on_host(tree: Any) -> Any:
    """Arrays as NumPy ones, whole, for every process that has a part of them; all of these call."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def any_of(flags: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Flags that any process of the mesh raises, for all of them; each calls with its own."""
    if all(d.process_index == jax.process_index() for d in mesh.devices.flat):
        return flags
    apart = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (mesh.devices.size, *flags.shape)
    raised = jax.make_array_from_callback(shape, apart, lambda _: flags[None])
    return on_host(_any(raised))


@jax.jit
def _any(raised: jax.Array) -> jax.Array:
    return jnp.any(raised, axis=0)


def part_of(tree: Any, where: Any) -> Any:
    """Arrays of a mesh of replicas as those of one, whose shardings are `where`; nothing moves."""

    def part(x: jax.Array, at: NamedSharding) -> jax.Array:
        mine = [s.data for s in x.addressable_shards if s.device in at.device_set]
        return jax.make_array_from_single_device_arrays(x.shape, at, mine)

    return jax.tree.map(part, tree, where)


@contextlib.contextmanager
def computing(mesh: Mesh) -> Iterator[None]:
    """Compiled calls on `mesh` are handed device arrays: an implicit transfer is an error."""
    with jax.set_mesh(mesh), jax.transfer_guard_host_to_device("disallow"):
        yield


def gathered(x: jax.Array, *axes: str | None) -> jax.Array:
    """A parameter made whole along the axes that it is only stored apart by, for its use.

    So a layer's weights travel, and not the much larger activations; and its gradient is summed
    where its parts are stored, not everywhere. Itself without a mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return _gathered(x, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(x, *(None if axis in STORED_APART else axis for axis in axes))


_gathered.defvjp(
    lambda x, axes: (_gathered(x, axes), None),
    lambda axes, _, slope: (constrain(slope, *axes),),
)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """`x` laid out by logical axes under the mesh in force (`jax.set_mesh`); itself without one.

    None keeps a dimension whole on every device, FREE leaves it to the compiler.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, "activation"))
