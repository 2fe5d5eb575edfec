"""Sampling replicas: independent groups of devices, each with its own engine of one parameter set.

A process has the engines of the replicas that hold its devices. Every process of a replica gives
its engine the same requests, so replicas need no word from each other between two loads. Several
replicas of one process answer one after the other.
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
        self._abstract = some.abstract
        self._spread = jax.tree.map(lambda at: NamedSharding(mesh, at.spec), some.shardings)

    def load(self, variables: transformer.Variables, version: str) -> None:
        """Answer with variables of the training mesh from now on; all processes call it."""
        self.unload()
        self.use(self.hand_over(variables), version)

    def hand_over(self, variables: transformer.Variables) -> transformer.Variables:
        """Variables of the training mesh laid out for every replica, in the engines' dtypes.

        One after the other, so that no more than one of them needs room beside what it becomes;
        those that lie so already are the same arrays. All processes call it.
        """
        return jax.tree.map(
            lambda x, wanted, at: jax.device_put(x.astype(wanted.dtype), at),
            variables,
            self._abstract,
            self._spread,
        )

    def use(self, spread: transformer.Variables, version: str) -> None:
        """Answer with what `hand_over` gave; `version` is written into every response."""
        for own in self.engines.values():
            own.load(sharding.part_of(spread, own.shardings), version)

    def unload(self) -> None:
        """Let go of the variables."""
        for own in self.engines.values():
            own.unload()

    def share(self, replica: int, total: int) -> range:
        """The replica's places among 0 .. total - 1: a run of them, as even as may be."""
        return range(replica * total // self.count, (replica + 1) * total // self.count)
