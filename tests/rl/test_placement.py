"""Parameter sets on devices, on hosts and on disk."""

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mathv2_jax import sharding
from mathv2_jax.rl import placement


@pytest.fixture
def arrays():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    at = NamedSharding(mesh, PartitionSpec("fsdp"))
    return {"x": jax.device_put(np.arange(32.0, dtype=np.float32).reshape(8, 4), at)}


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def test_arrays_go_to_the_hosts_and_come_back_laid_out_as_they_were(arrays):
    away = placement.to_host(arrays)
    assert kinds(away) == {"pinned_host"} and away["x"].sharding.spec == PartitionSpec("fsdp")
    back = placement.to_devices(away)
    assert kinds(back) == {"device"}
    assert back["x"].sharding == arrays["x"].sharding
    chex.assert_trees_all_equal(back, arrays)


@pytest.mark.parametrize(
    ("where", "loads"), [(placement.RESIDENT, 1), (placement.HOST, 1), (placement.LOADED, 2)]
)
def test_a_set_is_on_its_devices_while_in_use_and_loaded_as_its_placement_says(
    arrays, where, loads
):
    loaded = []

    def load():
        loaded.append(1)
        return jax.tree.map(lambda x: x + 0, arrays)

    held = placement.ParameterSet(load, where)
    for _ in range(2):
        with held.in_use() as found:
            assert kinds(found) == {"device"}
            chex.assert_trees_all_equal(found, arrays)
    assert len(loaded) == loads
    waiting = {placement.RESIDENT: {"device"}, placement.HOST: {"pinned_host"}}
    assert kinds(held._kept) == waiting.get(where, set())


@pytest.mark.parametrize("field", ["judge", "reference", "optimizer"])
def test_a_place_that_is_none_is_refused(field):
    with pytest.raises(ValueError, match=f"runtime.placement.{field} = 'cloud'"):
        placement.PlacementConfig(**{field: "cloud"})


def test_moments_are_never_loaded():
    with pytest.raises(ValueError, match="'loaded' is none of resident, host"):
        placement.PlacementConfig(optimizer="loaded")
