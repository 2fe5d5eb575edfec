"""Moonlight 16B in every stage of the recipe, on 16 chips of TPU v6e. Compiled, never run.

    mathv2-compile --config=configs/moonlight_16b.py --topology=v6e:4x4

Judge, reference and moments wait on the hosts; two replicas of 8 chips sample from bfloat16.
"""

import ml_collections

from configs import deepseek_v32
from configs.models import moonlight_16b_a3b


def get_config() -> ml_collections.ConfigDict:
    mesh = dict(data=1, fsdp=2, expert=8)
    # Moments as DeepSeek-V3 keeps them: in float32 training leaves 0.04 GiB of a chip.
    c = deepseek_v32.on_pod(
        moonlight_16b_a3b.model(), 16, mesh, prompt=1024, answer=3072, moments="bfloat16"
    )
    c.runtime.sampling = dict(replicas=2, data=1, expert=8)
    c.runtime.placement = dict(judge="host", reference="host", optimizer="host")
    c.engine.update(param_dtype="bfloat16", rows=8 * 8)
    return c
