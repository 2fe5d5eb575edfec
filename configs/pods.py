"""What configs of models on pods share: the stages of configs/olympiad.py, one row a chip."""

from typing import Any

import ml_collections

from configs import olympiad


def get_config(
    model: dict[str, Any], chips: int, mesh: dict[str, int], prompt: int, answer: int
) -> ml_collections.ConfigDict:
    """Rows of `prompt` + `answer` tokens; float32 parameters and moments, bfloat16 computation."""
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
    c.engine = dict(rows=8 * chips, prompt_buckets=(prompt,), answer_buckets=(answer,))
    c.real.max_prompt_tokens = c.real.max_example_tokens = prompt
    for stage in c.stage.values():
        for loop in ("sft", "rl"):
            if loop in stage:
                stage[loop].update(rows=chips, row_length=prompt + answer)
        if "rl" in stage:
            stage.rl.update(groups=chips // 2, samples=8)
    c.runtime.mesh = mesh
    c.runtime.expert_buffer = 2.0
    c.runtime.attention = "blocks"
    return c
