"""configs/quick.py shrunk to seconds a stage, for tests and tools.

    mathv2-train --config=configs/smoke.py --workdir=runs/smoke

The world is at its easiest and the cold start just long enough for the formats: most answers can
be read, and rewards differ inside a group, so every stage has something to do. Nothing else is
learned. Unlike there, experts grade what auto-labelling left undecided.
"""

import ml_collections

from configs import quick

SUPERVISED_STEPS = {"rule-drills": 3, "source-drills": 3, "sft": 90, "rejection-1": 4}
RL_STEPS = 3


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    c.world.update(
        dials=dict(num_letters=12, depth=(1, 2), distractors=(1, 2)),
        num_drills=40,
        num_demonstrations=1_200,
        num_problems=60,
        num_graded_proofs=60,
        num_graded_analyses=40,
        num_probe=16,
        num_validation=8,
        num_test=24,
    )
    c.model.update(width=32, num_layers=2, dense_width=64)
    c.model.update(head_key_width=16, head_rope_width=8, head_value_width=16)
    c.model.update(expert_width=16, num_experts=4)
    c.engine = dict(rows=32, context=200, chunks=8)
    c.roles.generator.max_tokens = 72
    stage = {name: _shrunk(name, stage) for name, stage in c.stage.to_dict().items()}
    stage["experts-1"] = dict(kind="experts", undecided_from="autolabel-1", num_proofs=8)
    stage["verifier-2"]["proofs"] = (*stage["verifier-2"]["proofs"], "experts-1")
    c.stage = stage
    after = c.stages.index("autolabel-1") + 1
    c.stages = (*c.stages[:after], "experts-1", *c.stages[after:])
    c.runtime.save_every = 2
    return c


def _shrunk(name: str, stage: dict) -> dict:
    stage = dict(stage)
    if "sft" in stage:
        rate = dict(learning_rate=1e-2, final_share=0.1)
        stage["sft"] = dict(stage["sft"], rows=8, row_length=256, optimizer=rate)
        stage["sft"]["steps"] = SUPERVISED_STEPS[name]
    if "rl" in stage:
        stage["rl"] = dict(stage["rl"], steps=RL_STEPS, groups=4, samples=4, rows=4, row_length=384)
    smaller = {
        "rejection": dict(allow_empty=True),
        "autolabel": dict(
            num_candidates=16, num_proofs=8, rule=dict(num_analyses=4, num_meta=1, num_valid=2)
        ),
        "probe": dict(tolerance_se=1e6),
        "answer": dict(num_autolabel=8),
    }
    return stage | smaller.get(stage["kind"], {})
