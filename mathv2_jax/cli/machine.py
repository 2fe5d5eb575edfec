"""What a run computes on: the mesh of its devices, and the kernels that their platform has."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from mathv2_jax import sharding
from mathv2_jax.model import attention, exchange, grouped, picked, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import chips, counting
from mathv2_jax.stages import iterate
from mathv2_jax.stages import run as run_lib

AUTO = "auto"
EXPERTS: Mapping[str, grouped.Experts] = {
    "sorted_blocks": grouped.sorted_blocks,
    "ragged": grouped.ragged,
    "megablox": grouped.megablox,
    "every_expert": grouped.every_expert,
}
# How whole rows are attended to, and which of a model with an indexer gather what it picks.
ATTENTION: Mapping[str, tuple[attention.Attend, picked.Gathers]] = {
    AUTO: (attention.attend_by_length, picked.where_cheaper),
    "dense": (attention.attend_densely, picked.never),
    "blocks": (attention.attend_in_blocks, picked.never),
    "gathered": (attention.attend_by_length, picked.always),
}


def share_of_peak(
    model: ModelConfig, kind: str, number: int, rows: int, length: int, seconds: float
) -> float | None:
    """Model FLOPs of training on rows, forward and backward, over what the devices could do.

    Rows count as one sequence each (pods/counting.py has the terms). The devices are so many of a
    `device_kind`; None where its peak is not in pods/chips.py.
    """
    chip = chips.of_device(kind)
    if chip is None:
        return None
    flops = counting.model_flops(model, rows, length).trained(aligned=False).total
    return flops / (seconds * chip.bf16_flops * number)


def choose_experts(name: str, platform: str, model: ModelConfig) -> grouped.Experts:
    """The experts' product by its name; `auto` is the quickest on JAX's `platform`.

    The kernels for TPUs take widths that are multiples of a tile's; `ragged` takes all.
    """
    if name == AUTO:
        if platform == "tpu" and not (model.width % 128 or model.expert_width % 128):
            return grouped.megablox
        return grouped.sorted_blocks if platform == "cpu" else grouped.ragged
    if name == "megablox" and platform != "tpu":
        raise ValueError(
            f"config.runtime.model_kernels = {name!r} is of kernels for TPUs, and the platform is "
            f"{platform!r}; give {AUTO!r} or another of {[AUTO, *EXPERTS]}"
        )
    return EXPERTS[name]


def make_kernels(
    runtime: run_lib.RuntimeConfig, platform: str, model: ModelConfig
) -> transformer.Kernels:
    """The kernels that `runtime` names, or that suit JAX's `platform` and the model."""
    attend, gathers = ATTENTION[runtime.attention]
    return transformer.Kernels(
        attend=attend,
        gathers=gathers,
        slots=64 if platform == "cpu" else 512,
        rows=8 if platform == "cpu" else 0,
        experts=choose_experts(runtime.model_kernels, platform, model),
        exchange=exchange.choose(platform, runtime.expert_buffer),
    )


def make_mesh(
    config: sharding.MeshConfig,
    stages: Iterable[iterate.Stage],
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """A mesh of all `devices`; ValueError names a stage whose rows it does not divide."""
    mesh = sharding.make_mesh(config, devices)
    ways = sharding.batch_ways(mesh)
    for stage in stages:
        for loop in ("sft", "rl"):
            rows = getattr(getattr(stage, loop, None), "rows", ways)
            if rows % ways:
                raise ValueError(
                    f"config.stage.{stage.name}.{loop}.rows = {rows} cannot be split {ways} ways, "
                    "over the mesh's axes data, fsdp and expert: give a multiple, or "
                    "another config.runtime.mesh"
                )
    return mesh
