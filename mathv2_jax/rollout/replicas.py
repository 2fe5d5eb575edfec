"""Sampling replicas: independent groups of devices, each with its own engine of one parameter set.

A process has the engines of the replicas that hold its devices. Every process of a replica gives
its engine the same requests, so replicas need no word from each other between two loads.
"""

from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh, NamedSharding

from mathv2_jax import sharding
from mathv2_jax.model import transformer
from mathv2_jax.rollout import engine


class Replicas:
    """The engines of one parameter set on a `sharding.make_sampling_mesh`.

    `engines` are those of this process, by their replica; `led` are the replicas that it speaks
    for, as the first of their processes.
    """

    def __init__(self, mesh: Mesh, make_engine: Callable[[Mesh], engine.Engine]):
        self.count = mesh.shape[sharding.REPLICAS]
        engines, led = dict[int, engine.Engine](), list[int]()
        for replica in range(self.count):
            own = sharding.replica_mesh(mesh, replica)
            owners = {device.process_index for device in own.devices.flat}
            if jax.process_index() in owners:
                engines[replica] = make_engine(own)
            if jax.process_index() == min(owners):
                led.append(replica)
        self.engines: Mapping[int, engine.Engine] = engines
        self.led = tuple(led)
        some = next(iter(engines.values()))
        self._spread = jax.tree.map(lambda at: NamedSharding(mesh, at.spec), some.shardings)

    def load(self, variables: transformer.Variables, version: str) -> None:
        """Hand variables of the training mesh over to every replica; all processes call it."""
        for own in self.engines.values():
            own.unload()
        spread = jax.device_put(variables, self._spread)
        for own in self.engines.values():
            own.load(sharding.part_of(spread, own.shardings), version)

    def share(self, replica: int, total: int) -> range:
        """The replica's places among 0 .. total - 1: a run of them, as even as may be."""
        return range(replica * total // self.count, (replica + 1) * total // self.count)
