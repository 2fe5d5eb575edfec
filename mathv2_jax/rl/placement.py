"""Where parameter sets wait while no phase uses them: on the devices, in host memory, on disk."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

RESIDENT, HOST, LOADED = "resident", "host", "loaded"
_ON_HOST = "pinned_host"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Of the sets beside the policy's own parameters, each `resident` on the devices, kept by the
    `host`, or (judge and reference) `loaded` from its checkpoint for the phase that uses it.

    `judge`: used while answers are scored; `reference`: the parameters that the stage began with,
    used for the KL term; `optimizer`: the policy's moments, not used while anything is sampled.
    """

    judge: str = RESIDENT
    reference: str = RESIDENT
    optimizer: str = RESIDENT

    def __post_init__(self):
        for field in dataclasses.fields(self):
            known = (RESIDENT, HOST) if field.name == "optimizer" else (RESIDENT, HOST, LOADED)
            chosen = getattr(self, field.name)
            if chosen not in known:
                raise ValueError(
                    f"runtime.placement.{field.name} = {chosen!r} is none of {', '.join(known)}"
                )


def to_host(tree: Any) -> Any:
    """The arrays in the memory of the hosts of their devices, split as they are."""
    where = jax.tree.map(lambda x: x.sharding.with_memory_kind(_ON_HOST), tree)
    return jax.device_put(tree, where)


def to_devices(tree: Any) -> Any:
    """What `to_host` took, back on the devices."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), tree))


class ParameterSet:
    """Arrays that `load` gives, placed as one of PlacementConfig's words says."""

    def __init__(self, load: Callable[[], Any], placement: str):
        self._load, self._placement = load, placement
        self._kept: Any = None
        if placement == RESIDENT:
            self._kept = load()
        elif placement == HOST:
            self._kept = to_host(load())

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Any]:
        """The arrays on their devices, for the block."""
        if self._placement == RESIDENT:
            yield self._kept
        elif self._placement == HOST:
            yield to_devices(self._kept)
        else:
            yield self._load()
