"""The full miniature: does retraining the verifier pay?

    mathv2-train --config=configs/world.py --workdir=runs/world --config.seed=0   # 21 min on a core

As configs/quick.py, with a longer cold start and a blind spot: the analysts whom the model imitates
let most proofs pass that stop short of the goal, although they write down that another letter was
shown, and none of the proofs that experts graded for D_v has this fault to unlearn it from. So the
first verifier passes most of them too, and a generator that is left alone with it learns to stop
early. After a first, short generator stage there are two ways to go on, with as many generator
steps each:

- `loop-2`, `loop-3`: the outer iteration of the paper, twice. The generator's newest proofs are
  graded by experts the first time, as in the paper's early iterations, and auto-labelled the
  second. The verifier is retrained on D_v and all of them, from the SFT model each time: what the
  verifier before it has given up saying, no label could reward. The generator is consolidated with
  its verifier by rejection fine-tuning, and goes on against the new one.
- `fixed`: the same but for the retraining: the consolidated generator goes on against the verifier
  it already has.

Each arm answers the same test set; experiments/arms.py compares the answers, pooled over seeds.
"""

import ml_collections

from configs import quick

FIRST_STEPS = 20  # of the generator, against the first verifier
NEXT_STEPS = 30  # of the generator, in each iteration that follows
ITERATIONS = (2, 3)
COLD_START_STEPS = 1_300
RETRAINING_STEPS = 90  # of each verifier, from the SFT model
FRESH_SHARE = 1 / 3  # of these steps: D_v is seen as often as by the first verifier
NUM_CANDIDATES = 480  # of the newest proofs; 99 labels a verifier learned by heart (seed 11)
NUM_GRADED = 400  # by experts, as many as auto-labelling decides of its candidates
CONDONE = 0.7  # of the proofs that stop short of the goal, where analysts see it
NUM_AUTOLABEL = 200  # the arms differ in their generators


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    stage = c.stage.to_dict()

    def answer(verifier: str, generator: str) -> dict:
        return dict(
            stage["after"],
            verifier=verifier,
            generator=generator,
            num_autolabel=NUM_AUTOLABEL,
        )

    c.world.writers = dict(condone=CONDONE)
    c.world.graded_wrong_end = 0.0
    stage["sft"]["sft"]["steps"] = COLD_START_STEPS
    stage["generator-1"] = quick.longer(stage["generator-1"], FIRST_STEPS)
    retrained, labels, generator = [], [], "generator-1"
    for i in ITERATIONS:
        before = dict(verifier=f"verifier-{i - 1}", probe=f"probe-{i - 1}")
        rejection = f"rejection-{i - 1}"
        if i == ITERATIONS[0]:
            name = f"experts-{i - 1}"
            labelling = dict(kind="experts", proofs_from=generator, num_proofs=NUM_GRADED)
        else:
            name = f"autolabel-{i - 1}"
            labelling = dict(
                stage["autolabel-1"],
                proofs_from=generator,
                judge=before["verifier"],
                num_candidates=NUM_CANDIDATES,
                num_proofs=NUM_CANDIDATES,
            )
        labels.append(name)
        iteration = {
            name: labelling,
            rejection: dict(
                stage["rejection-1"],
                init=generator,
                samples_from=(before["verifier"], generator),
            ),
            f"verifier-{i}": quick.longer(
                stage["verifier-2"],
                RETRAINING_STEPS,
                init="sft",
                judge=before["verifier"],
                proofs=("proofs", *labels),
                fresh_share=FRESH_SHARE,
            ),
            f"probe-{i}": dict(
                stage["probe-2"], verifier=f"verifier-{i}", predecessor=before["probe"]
            ),
            f"loop-{i}": quick.longer(
                stage["generator-2"], NEXT_STEPS, init=rejection, judge=f"verifier-{i}"
            ),
        }
        stage |= iteration
        retrained += iteration
        generator = f"loop-{i}"
    as_many = NEXT_STEPS * len(ITERATIONS)
    stage["fixed"] = quick.longer(stage["generator-1"], as_many, init="rejection-1")
    stage["before"] = answer("sft", "sft")
    stage["after-1"] = answer("verifier-1", "generator-1")
    stage["after-loop"] = answer(f"verifier-{ITERATIONS[-1]}", generator)
    stage["after-fixed"] = answer("verifier-1", "fixed")
    del stage["generator-2"], stage["after"]
    first = c.stages[: c.stages.index("generator-1") + 1]
    c.stages = (*first, *retrained, "fixed", "after-1", "after-loop", "after-fixed")
    c.stage = stage
    c.before, c.after = "before", "after-loop"
    return c
