"""DeepSeek-V3.2 in every stage of the recipe, on 1,024 chips of TPU v5p. Compiled, never run.

    mathv2-compile --config=configs/deepseek_v32.py --topology=v5p:8x8x16
    mathv2-train --config=configs/deepseek_v32.py --config.data=DIR --config.start=IMPORTED \
      --config.tokenizer.directory=HF_DIR --workdir=gs://...

The experts lie 4 a chip over 64 chips, all else is split 16 or 1,024 ways and gathered for use.
"""

import ml_collections

from configs import pods
from configs.models import deepseek_v32


def get_config() -> ml_collections.ConfigDict:
    mesh = dict(data=1, fsdp=16, expert=64)
    return pods.get_config(deepseek_v32.model(), 1024, mesh, prompt=1024, answer=3072)
