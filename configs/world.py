"""The full miniature: does retraining the verifier pay, and what does R_meta buy?

    mathv2-train --config=configs/world.py --workdir=runs/world --config.seed=0

One cold start and one first iteration as in configs/quick.py, then three ways to go on, each with
as many generator steps as the others:

- `loop-2`: the verifier is retrained on the generator's newest proofs (auto-labelled), then the
  generator goes on against it: the paper's outer iteration;
- `fixed-2`: the generator goes on against the verifier it already has, and is left alone with it;
- `score-1`, `score-2`: a verifier trained on scores only (no R_meta), and a generator against it
  all the way.

Each arm answers the same test set; experiments/arms.py compares the answers, pooled over seeds.
"""

import ml_collections

from configs import quick

GENERATOR_STEPS = 40  # per iteration


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    stage = c.stage.to_dict()

    def longer(name: str, **changes) -> dict:
        return dict(stage[name], rl=dict(stage[name]["rl"], steps=GENERATOR_STEPS), **changes)

    def answer(verifier: str, generator: str) -> dict:
        return dict(stage["after"], verifier=verifier, generator=generator)

    stage["generator-1"] = longer("generator-1")
    stage["loop-2"] = longer("generator-2")
    stage["fixed-2"] = longer("generator-1", init="generator-1")
    stage["score-verifier"] = dict(stage["verifier-1"], judge=None, mixture=dict(verifier=1.0))
    stage["score-1"] = longer("generator-1", init="score-verifier", judge="score-verifier")
    stage["score-2"] = longer("generator-1", init="score-1", judge="score-verifier")
    stage["after-1"] = answer("verifier-1", "generator-1")
    stage["after-loop"] = answer("verifier-2", "loop-2")
    stage["after-fixed"] = answer("verifier-1", "fixed-2")
    stage["after-score"] = answer("score-verifier", "score-2")
    del stage["generator-2"], stage["after"]
    first = c.stages[: c.stages.index("generator-1") + 1]
    retrain = ("autolabel-1", "rejection-1", "verifier-2", "probe-2", "loop-2")
    ablation = ("fixed-2", "score-verifier", "score-1", "score-2")
    answers = ("after-1", "after-loop", "after-fixed", "after-score")
    c.stages = (*first, *retrain, *ablation, *answers)
    c.stage = stage
    c.before, c.after = "before", "after-loop"
    return c
