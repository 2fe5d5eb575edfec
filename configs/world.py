"""The full miniature: does retraining the verifier pay, and what does R_meta buy?

    mathv2-train --config=configs/world.py --workdir=runs/world --config.seed=0

As configs/quick.py, with a longer cold start and one property more: human writers seldom use a
rule that is not given, and no drill shows one, so the first verifier, taught by what humans wrote,
often overlooks such steps, and a generator alone with it learns to take them. After a first
iteration there are several ways to go on, each with as many generator steps as the others:

- `loop-2`: the verifier is retrained on the generator's newest proofs (auto-labelled), then the
  generator goes on against it: the paper's outer iteration;
- `fixed-2`: the same but for the retraining: the consolidated generator (`rejection-1`) goes on
  against the verifier it already has;
- `alone-2`: no iteration at all: `generator-1` goes on against the verifier it already has.

And the ablation of R_meta: `score-verifier` is trained as `verifier-1` is, D_mv included, but
rewarded for its scores only; `score-1` is a generator against it, beside `generator-1`.

Each arm answers the same test set; experiments/arms.py compares the answers, pooled over seeds.
"""

import ml_collections

from configs import quick

FIRST_STEPS, NEXT_STEPS = 40, 60  # of the generator, in the first iteration and in the second
COLD_START_STEPS = 1_300
RETRAINING_STEPS = 60
WRITERS = dict(false_rule=0.02, skipped=0.25, unsupported=0.2, wrong_end=0.2)
NUM_AUTOLABEL = 200  # the arms differ in their generators


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    stage = c.stage.to_dict()

    def longer(name: str, steps: int, **changes) -> dict:
        return dict(stage[name], rl=dict(stage[name]["rl"], steps=steps), **changes)

    def answer(verifier: str, generator: str) -> dict:
        return dict(
            stage["after"],
            verifier=verifier,
            generator=generator,
            num_autolabel=NUM_AUTOLABEL,
        )

    c.world.writers = WRITERS
    c.world.drill_misquoted = 0.0
    stage["sft"]["sft"]["steps"] = COLD_START_STEPS
    stage["generator-1"] = longer("generator-1", FIRST_STEPS)
    stage["verifier-2"] = longer("verifier-2", RETRAINING_STEPS)
    stage["loop-2"] = longer("generator-2", NEXT_STEPS)
    stage["fixed-2"] = longer("generator-1", NEXT_STEPS, init="rejection-1")
    stage["alone-2"] = longer("generator-1", NEXT_STEPS, init="generator-1")
    stage["score-verifier"] = dict(stage["verifier-1"], judge=None)
    stage["probe-score"] = dict(stage["probe-1"], verifier="score-verifier")
    stage["score-1"] = dict(stage["generator-1"], init="score-verifier", judge="score-verifier")
    stage["before"] = answer("sft", "sft")
    stage["after-1"] = answer("verifier-1", "generator-1")
    stage["after-loop"] = answer("verifier-2", "loop-2")
    stage["after-fixed"] = answer("verifier-1", "fixed-2")
    stage["after-alone"] = answer("verifier-1", "alone-2")
    stage["after-score"] = answer("score-verifier", "score-1")
    del stage["generator-2"], stage["after"]
    first = c.stages[: c.stages.index("generator-1") + 1]
    retrain = ("autolabel-1", "rejection-1", "verifier-2", "probe-2", "loop-2")
    others = ("fixed-2", "alone-2", "score-verifier", "probe-score", "score-1")
    answers = ("after-1", "after-loop", "after-fixed", "after-alone", "after-score")
    c.stages = (*first, *retrain, *others, *answers)
    c.stage = stage
    c.before, c.after = "before", "after-loop"
    return c
