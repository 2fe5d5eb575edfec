"""configs/quick.py shrunk until nothing is learned: every stage in seconds, for tests and tools.

mathv2-train --config=configs/smoke.py --workdir=runs/smoke
"""

import ml_collections

from configs import quick

STEPS = 4


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    c.world.update(
        num_drills=100,
        num_demonstrations=300,
        num_problems=60,
        num_graded_proofs=60,
        num_graded_analyses=40,
        num_probe=16,
        num_validation=8,
        num_test=24,
    )
    c.model.update(width=32, num_layers=3, dense_width=32, expert_width=16, num_experts=4)
    c.engine = dict(rows=32, prompt_buckets=(144,), answer_buckets=(96,))
    c.stage = {name: _shrunk(stage) for name, stage in c.stage.to_dict().items()}
    c.runtime.save_every = 2
    return c


def _shrunk(stage: dict) -> dict:
    stage = dict(stage)
    for loop in ("sft", "rl"):
        if loop in stage:
            stage[loop] = dict(stage[loop], steps=STEPS)
    if "rl" in stage:
        stage["rl"].update(groups=4, samples=4, rows=4, row_length=512)
    smaller = {
        "rejection": dict(allow_empty=True),
        "autolabel": dict(num_candidates=16, num_proofs=8),
        "probe": dict(tolerance_se=1e6),
        "answer": dict(num_autolabel=8),
    }
    return stage | smaller.get(stage["kind"], {})
