"""A world for searches that refine: longer chains, careful analysts, demonstrations of repair.

mathv2-train --config=configs/refine.py --workdir=runs/refine

"""

import ml_collections

from configs import quick

DIALS = dict(num_letters=14, depth=(2, 6), distractors=(3, 6))
ANALYSTS = dict(overlook=0.03, invent_flawed=0.05, invent_sound=0.02, redraw=0.03, misjudge=0.05)
COLD_START_STEPS = 2_500
GENERATOR_STEPS = 40
# What a refiner is shown in each of the generator's stages: attempts of world writers as the
# verifier met them in training, then its own, as it and its verifier saw them.
ATTEMPTS = {"generator-1": "verifier-1", "generator-2": "generator-1"}


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    stage = c.stage.to_dict()
    c.world.update(refine_share=0.5, repair_share=1.0, writers=ANALYSTS, num_demonstrations=60_000)
    c.world.dials = DIALS
    for role, tokens in dict(generator=160, verifier=110, meta_verifier=110).items():
        c.roles[role] = dict(max_tokens=tokens)
    c.engine.context = 416
    for name in ("rule-drills", "source-drills"):
        stage[name]["sft"]["row_length"] = 320
    for name in ("sft", "rejection-1"):
        stage[name]["sft"]["row_length"] = 416
    stage["sft"]["sft"]["steps"] = COLD_START_STEPS
    for name, settings in stage.items():
        if settings["kind"] == "rl":
            settings["rl"]["row_length"] = 832
        if name in ATTEMPTS:
            settings["mixture"] = dict(generator=0.5, refiner=0.5)
            settings["attempts_from"] = (ATTEMPTS[name],)
            settings["rl"]["steps"] = GENERATOR_STEPS
    c.stage = stage
    return c
