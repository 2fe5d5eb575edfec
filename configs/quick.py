"""The embedded default: the whole recipe in the proof world, in minutes on two cores.

    mathv2-train --config=configs/quick.py --workdir=runs/quick

Drills in looking things up, cold start on imperfect demonstrations, verifier on scores,
meta-verifier, verifier with R_meta, generator against the frozen verifier, auto-labelling,
rejection fine-tuning, and one more round. About 9 minutes and 2 GB on two cores. Expected from
before to after: verifier accuracy up by .1 or more, faithfulness by .1 or more, the generator's
true score by .1 or more (README.md has the table; seeds differ in how good the cold start is).
"""

import ml_collections

from mathv2_jax.world import demonstrations, judge


def model() -> dict:
    """A DeepSeek-V3 shape of about 0.3 M parameters."""
    return dict(
        width=64,
        num_layers=3,
        num_dense_layers=1,
        num_heads=4,
        kv_latent_width=32,
        head_key_width=32,
        head_rope_width=8,
        head_value_width=16,
        dense_width=128,
        expert_width=32,
        num_experts=8,
        experts_per_token=2,
        routed_scaling=1.0,
        embedding_taps=3,
    )


def adam(rate: float, **fields) -> dict:
    return dict(learning_rate=rate, **fields)


def longer(stage: dict, steps: int, **changes) -> dict:
    """An RL stage with other steps, and with other fields."""
    return dict(stage, rl=dict(stage["rl"], steps=steps), **changes)


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data = ""
    c.world = dict(
        dials=dict(num_letters=10, depth=(2, 3), distractors=(2, 3)),
        num_drills=4_000,
        num_demonstrations=24_000,
        refine_share=0.0,
        num_problems=3_000,
        num_graded_proofs=3_000,
        num_graded_analyses=2_000,
    )
    c.tokenizer = dict(vocab_size=448, whole_phrases=(*judge.PHRASES, *demonstrations.META_PHRASES))
    c.model = model()
    c.roles = dict(
        templates="world",
        generator=dict(max_tokens=80),
        verifier=dict(max_tokens=56),
        meta_verifier=dict(max_tokens=56),
    )
    c.engine = dict(rows=128, context=208)
    rl = dict(groups=16, samples=8, rows=8, row_length=480, optimizer=adam(5e-4, warmup_steps=3))
    drills = dict(steps=400, rows=4, row_length=256, optimizer=adam(3e-3, warmup_steps=30))
    cold = dict(steps=1_000, rows=8, row_length=256, optimizer=adam(2e-3, final_share=0.1))
    again = dict(steps=60, rows=8, row_length=256, optimizer=adam(3e-4))
    rule = dict(num_analyses=4, num_meta=1, num_valid=2)
    # A label is worth more looks than a reward: 4 analyses leave most of a verifier's oversights in
    # the labels, and the next verifier learns them. A rating of 0.5 confirms too: this small a
    # meta-verifier hedges there about issues that are real, and three confirmations make up for it.
    careful = dict(num_analyses=24, num_meta=3, num_valid=3, confirm_at=0.5)

    def verifier(init: str, judge: str | None, meta: float, **more) -> dict:
        mixture = dict(verifier=1.0, **({"meta_verifier": meta} if meta else {}))
        return dict(
            kind="rl", init=init, judge=judge, mixture=mixture, rl=rl | dict(steps=30), **more
        )

    def answer(verifier: str, generator: str) -> dict:
        return dict(
            kind="answer", verifier=verifier, generator=generator, num_autolabel=1_000, rule=rule
        )

    def generator(verifier: str) -> dict:
        mixture = dict(generator=1.0)
        return dict(
            kind="rl",
            init=verifier,
            judge=verifier,
            mixture=mixture,
            rl=rl | dict(steps=16),
        )

    stages = {
        "rule-drills": dict(kind="sft", demonstrations="rule_drills", sft=drills),
        "source-drills": dict(
            kind="sft", init="rule-drills", demonstrations="source_drills", sft=drills
        ),
        "sft": dict(kind="sft", init="source-drills", sft=cold),
        "before": answer("sft", "sft"),
        "verifier-0": verifier("sft", None, 0.0),
        "meta": dict(
            kind="rl", init="sft", mixture=dict(meta_verifier=1.0), rl=rl | dict(steps=30)
        ),
        "verifier-1": verifier("verifier-0", "meta", 0.33),
        "probe-1": dict(kind="probe", verifier="verifier-1"),
        "generator-1": generator("verifier-1"),
        "autolabel-1": dict(
            kind="autolabel",
            proofs_from="generator-1",
            judge="verifier-1",
            num_candidates=160,
            num_proofs=128,
            rule=careful,
        ),
        "rejection-1": dict(
            kind="rejection",
            init="generator-1",
            samples_from=("verifier-1", "generator-1"),
            min_reward=0.9,
            sft=again,
        ),
        "verifier-2": verifier("rejection-1", "verifier-1", 0.33, proofs=("proofs", "autolabel-1")),
        "probe-2": dict(kind="probe", verifier="verifier-2", predecessor="probe-1"),
        "generator-2": generator("verifier-2"),
        "after": answer("verifier-2", "generator-2"),
    }
    c.stages = tuple(stages)  # the recipe: which stages run, in this order
    c.stage = stages
    c.before, c.after = "before", "after"
    c.runtime = dict(save_every=50, mesh=dict(data=1))
    return c
