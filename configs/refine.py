"""A world for searches that refine: long proofs by careless writers, and demonstrations of repair.

mathv2-train --config=configs/refine.py --workdir=runs/refine

"""

import ml_collections

from configs import quick

DIALS = dict(num_letters=13, depth=(6, 10), distractors=(1, 2))
WRITERS = dict(
    skipped=0.04,
    false_rule=0.0,
    unsupported=0.03,
    wrong_end=0.03,
    detours=0.1,
    slips=0.5,
    overlook=0.02,
    invent_flawed=0.05,
    invent_sound=0.02,
    redraw=0.03,
    misjudge=0.05,
)
COLD_START_STEPS = 2_500


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    stage = c.stage.to_dict()
    c.world.update(
        dials=DIALS,
        writers=WRITERS,
        careful_share=0.6,
        refine_share=0.6,
        repair_share=1.0,
        num_demonstrations=60_000,
    )
    for role, tokens in dict(generator=240, verifier=170, meta_verifier=170).items():
        c.roles[role] = dict(max_tokens=tokens)
    c.engine.context = 576
    for name in ("rule-drills", "source-drills"):
        stage[name]["sft"]["row_length"] = 320
    stage["sft"]["sft"].update(steps=COLD_START_STEPS, row_length=576)
    for settings in stage.values():
        if settings["kind"] == "rl":
            settings["rl"]["row_length"] = 1_152
    stage["after"] = dict(stage["after"], verifier="verifier-1", generator="sft")
    c.stage = stage
    c.stages = (*c.stages[: c.stages.index("probe-1") + 1], "after")
    return c
