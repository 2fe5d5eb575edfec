"""A world for searches that refine: a proof takes several attempts, each goes on from the last.

    mathv2-train --config=configs/refine.py --workdir=runs/refine    # 20 minutes on two cores

As configs/quick.py, with chains of 4 to 7 steps and writers who stop after a step more often than
not, so that a first proof is hardly ever whole (a model that imitates them is right in 1 of 100),
and a longer cold start in which flawed proofs are mended. No second verifier: retrained as in
configs/quick.py it was refused by its probe in an earlier form of this world. Half of the
generator's tasks are refinements, first of what the verifier met in training, then of its own.
experiments/search searches with what comes of it.
"""

import ml_collections

from configs import quick

DIALS = dict(num_letters=14, depth=(4, 7), distractors=(2, 4))
PROVERS = dict(stops=0.6, skipped=0.1, false_rule=0.08, unsupported=0.07, wrong_end=0.0)
ANALYSTS = dict(overlook=0.03, invent_flawed=0.05, invent_sound=0.02, redraw=0.03, misjudge=0.05)
COLD_START_STEPS = 3_000
GENERATOR_STEPS = 40


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    stage = c.stage.to_dict()
    c.world.update(refine_share=0.6, repair_share=1.0, num_mended=4, careful_share=0.7)
    c.world.update(dials=DIALS, writers=PROVERS | ANALYSTS, num_demonstrations=60_000)
    for role, tokens in dict(generator=136, verifier=104, meta_verifier=104).items():
        c.roles[role] = dict(max_tokens=tokens)
    c.engine.context = 320
    for name in ("rule-drills", "source-drills"):
        stage[name]["sft"]["row_length"] = 320
    stage["sft"]["sft"].update(steps=COLD_START_STEPS, row_length=320)
    for settings in stage.values():
        if settings["kind"] == "rl":
            settings["rl"]["row_length"] = 640

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
