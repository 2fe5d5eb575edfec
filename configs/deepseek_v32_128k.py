"""DeepSeek-V3.2 on rows of 131,072 tokens, 16 chips a row, on 256 chips of TPU v5p. Never run.

    mathv2-compile --config=configs/deepseek_v32_128k.py --topology=v5p:4x8x8

Queries are split over the chips of a row; the latents of its keys, which are small, are on all of
them, and of those each query gathers the 2,048 that its indexer picks. Two replicas of
128 chips sample: on half as many there is no room for their matrices beside policy and judge
(experiments/pods/notes.md).
"""

import ml_collections

from configs import deepseek_v32
from configs.models import deepseek_v32 as model


def get_config() -> ml_collections.ConfigDict:
    mesh = dict(data=1, expert=16, context=16)
    # Moments as DeepSeek-V3 keeps them: in float32 training takes 5 GiB more than a chip has.
    c = deepseek_v32.on_pod(
        model.model(), 256, mesh, prompt=1024, answer=130_048, moments="bfloat16"
    )
    c.runtime.attention = "auto"
    c.runtime.sampling = dict(replicas=2, data=1, expert=16, tensor=8)
    c.runtime.placement = dict(reference="host", judge="host")
    c.engine.update(param_dtype="bfloat16", rows=32)
    return c
