"""What does R_meta buy? Two verifiers from one start, one rewarded with it and one without.

    mathv2-train --config=configs/without_meta.py --workdir=runs/without_meta   # 14 min on a core

As configs/quick.py, with a longer cold start on analysts who invent issues more often: in half of
the flawed proofs, so that an analysis can reach the right score for a wrong reason, and in a tenth
of the sound ones. From `verifier-0`, which has been rewarded for its scores alone,

- `verifier-meta` goes on with R_meta, on D_v and D_mv together (the recipe), and
- `verifier-score` as long, on the same, still for its scores alone.

`generator-meta` and `generator-score` are then trained alike, each against its verifier. Both arms
answer the same test set; experiments/arms.py compares the answers, pooled over seeds.
"""

import ml_collections

from configs import quick

COLD_START_STEPS = 1_300
INVENT_FLAWED, INVENT_SOUND = 0.5, 0.1  # quick's analysts: 0.2 and 0.06
VERIFIER_STEPS = 60
GENERATOR_STEPS = 20
NUM_AUTOLABEL = 200
ARMS = dict(meta="meta", score=None)  # the judge of each verifier's analyses


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    stage = c.stage.to_dict()
    c.world.writers = dict(invent_flawed=INVENT_FLAWED, invent_sound=INVENT_SOUND)

    def answer(verifier: str, generator: str) -> dict:
        return dict(
            stage["after"], verifier=verifier, generator=generator, num_autolabel=NUM_AUTOLABEL
        )

    stage["sft"]["sft"]["steps"] = COLD_START_STEPS
    stage["before"] = answer("sft", "sft")
    first = c.stages[: c.stages.index("meta") + 1]
    stages = {name: stage[name] for name in first}
    for arm, judge in ARMS.items():
        name = f"verifier-{arm}"
        stages[name] = quick.longer(stage["verifier-1"], VERIFIER_STEPS, judge=judge)
        stages[f"probe-{arm}"] = dict(kind="probe", verifier=name)
    for arm in ARMS:
        judge = f"verifier-{arm}"
        stages[f"generator-{arm}"] = quick.longer(
            stage["generator-1"], GENERATOR_STEPS, init=judge, judge=judge
        )
    for arm in ARMS:
        stages[f"after-{arm}"] = answer(f"verifier-{arm}", f"generator-{arm}")
    stages["probe-score"]["predecessor"] = "none"  # a later probe must say which it follows
    c.stages, c.stage = tuple(stages), stages
    c.before, c.after = "before", "after-meta"
    return c
