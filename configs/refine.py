"""A world for searches that refine: longer chains, careful analysts, and a generator that repairs.

    mathv2-train --config=configs/refine.py --workdir=runs/refine    # half an hour on two cores

As configs/quick.py, with a longer cold start in which half of the flawed proofs are mended, and no
second verifier: retrained as there it was refused by its probe (mean error 0.153 after 0.105). The
generator is trained on refinements as on proofs, first of what world writers wrote, as the verifier
met it in training, and then of its own. experiments/search searches with what comes of it.
"""

import ml_collections

from configs import quick

DIALS = dict(num_letters=14, depth=(2, 6), distractors=(3, 6))
ANALYSTS = dict(overlook=0.03, invent_flawed=0.05, invent_sound=0.02, redraw=0.03, misjudge=0.05)
COLD_START_STEPS = 2_500
GENERATOR_STEPS = 40


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
    stage["sft"]["sft"].update(steps=COLD_START_STEPS, row_length=416)
    for settings in stage.values():
        if settings["kind"] == "rl":
            settings["rl"]["row_length"] = 832

    def generator(init: str, attempts_from: str) -> dict:
        """Half of its tasks are refinements of what an earlier stage wrote."""
        mixture = dict(generator=0.5, refiner=0.5)
        made = quick.longer(stage["generator-1"], GENERATOR_STEPS, init=init, mixture=mixture)
        return made | dict(judge="verifier-1", attempts_from=(attempts_from,))

    stage["generator-1"] = generator("verifier-1", "verifier-1")
    stage["generator-2"] = generator("generator-1", "generator-1")
    stage["after"] = dict(stage["after"], verifier="verifier-1")
    c.stage = stage
    first = c.stages[: c.stages.index("generator-1") + 1]
    c.stages = (*first, "generator-2", "after")
    return c
