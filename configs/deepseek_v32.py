"""DeepSeek-V3.2 in every stage of the recipe, on 1,024 chips of TPU v5p. Compiled, never run.

    mathv2-compile --config=configs/deepseek_v32.py --topology=v5p:8x8x16

To train, the experts lie 4 a chip over 64 chips; every matrix is stored 16 ways apart and gathered
for use. To sample, 16 replicas of 64 chips hold bfloat16 matrices, each split 4 ways, and 16
experts on every 4 chips.
"""

from typing import Any

import ml_collections

from configs import olympiad
from configs.models import deepseek_v32


def get_config() -> ml_collections.ConfigDict:
    mesh = dict(data=1, fsdp=16, expert=64)
    c = on_pod(deepseek_v32.model(), 1024, mesh, prompt=1024, answer=3072)
    c.runtime.sampling = dict(replicas=16, data=1, expert=16, tensor=4)
    c.runtime.placement = dict(reference="host")
    # 4,096 tokens of prompts at once on every four chips: more do not fit beside judge and policy.
    c.engine.update(param_dtype="bfloat16", rows=8 * 64, chunks=8 * 16)
    return c


def on_pod(
    model: dict[str, Any],
    chips: int,
    mesh: dict[str, int],
    prompt: int,
    answer: int,
    moments: str = "float32",
) -> ml_collections.ConfigDict:
    """The stages of configs/olympiad.py, with a row of `prompt` + `answer` tokens for each chip.

    Or for the chips that share it (`context`). Parameters are float32, computation is
    bfloat16, every layer is recomputed. Experts are those of the rollout: in bfloat16 the trainer
    would choose others now and then.
    """
    rows = chips // mesh.get("context", 1)
    c = olympiad.get_config()
    # Layers of multi-token prediction are left out: no stage here trains them.
    c.model = model | dict(
        num_mtp_layers=0,
        param_dtype="float32",
        compute_dtype="bfloat16",
        remat="full",
        logprob_chunk=1024,
    )
    c.tokenizer = dict(directory="give --config.tokenizer.directory")
    limit = dict(max_tokens=answer)
    c.roles = dict(templates="olympiad", generator=limit, verifier=limit, meta_verifier=limit)
    c.engine = dict(
        rows=8 * rows, context=prompt + answer, page=64, chunk=512, chunks=rows, steps=64
    )
    c.real.max_prompt_tokens = c.real.max_example_tokens = prompt
    for stage in c.stage.values():
        for loop in ("sft", "rl"):
            if loop in stage:
                stage[loop].update(rows=rows, row_length=prompt + answer)
                stage[loop].optimizer.moments = moments
        if "rl" in stage:
            stage.rl.update(groups=max(1, rows // 2), samples=8, keep_routing=True)
    c.runtime.mesh = mesh
    c.runtime.expert_buffer = 2.0
    c.runtime.attention = "blocks"
    return c
