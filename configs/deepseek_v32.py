"""DeepSeek-V3.2 in every stage of the recipe, on 1,024 chips of TPU v5p. Compiled, never run.

    mathv2-compile --config=configs/deepseek_v32.py --topology=v5p:8x8x16
    mathv2-train --config=configs/deepseek_v32.py --config.data=DIR --config.start=IMPORTED \
      --config.tokenizer.directory=HF_DIR --workdir=gs://...

The stages are those of configs/olympiad.py, with rows of 4,096 tokens, one a chip. Parameters and
moments are float32, computation is bfloat16, every layer is recomputed in its backward pass. The
experts lie 4 a chip over 64 chips, all else is split 1,024 ways and gathered for use.
"""

import ml_collections

from configs import olympiad
from configs.models import deepseek_v32

CHIPS, FSDP, EXPERT = 1024, 16, 64
PROMPT, ANSWER = 1024, 3072  # tokens


def get_config() -> ml_collections.ConfigDict:
    c = olympiad.get_config()
    # The layer of multi-token prediction is left out: no stage here trains it.
    c.model = deepseek_v32.model() | dict(
        num_mtp_layers=0,
        param_dtype="float32",
        compute_dtype="bfloat16",
        remat="full",
        logprob_chunk=1024,
    )
    c.tokenizer = dict(directory="give --config.tokenizer.directory")
    limit = dict(max_tokens=ANSWER)
    c.roles = dict(templates="olympiad", generator=limit, verifier=limit, meta_verifier=limit)
    c.engine = dict(rows=8 * CHIPS, prompt_buckets=(PROMPT,), answer_buckets=(ANSWER,))
    c.real.max_prompt_tokens = c.real.max_example_tokens = PROMPT
    for stage in c.stage.values():
        for loop in ("sft", "rl"):
            if loop in stage:
                stage[loop].update(rows=CHIPS, row_length=PROMPT + ANSWER)
        if "rl" in stage:
            stage.rl.update(groups=512, samples=8)
    c.runtime.mesh = dict(data=1, fsdp=FSDP, expert=EXPERT)
    c.runtime.expert_buffer = 2.0
    c.runtime.attention = "blocks"
    return c
