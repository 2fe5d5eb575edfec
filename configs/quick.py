"""The embedded default: the whole recipe in the proof world, in minutes on two cores.

    mathv2-train --config=configs/quick.py --workdir=runs/quick

Cold start on imperfect demonstrations, verifier on scores, meta-verifier, verifier with R_meta,
generator against the frozen verifier, auto-labelling, rejection fine-tuning, and one more round.
"""

import ml_collections

from mathv2_jax.world import demonstrations, judge


def model() -> dict:
    """A DeepSeek-V3 shape of about 0.3 M parameters."""
    return dict(
        width=64,
        num_layers=4,
        num_dense_layers=1,
        num_heads=2,
        kv_latent_width=64,
        head_key_width=32,
        head_rope_width=16,
        head_value_width=32,
        dense_width=128,
        expert_width=32,
        num_experts=8,
        experts_per_token=2,
        routed_scaling=1.0,
        embedding_taps=3,
    )


def adam(rate: float, **fields) -> dict:
    return dict(learning_rate=rate, **fields)


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data = ""
    c.world = dict(
        dials=dict(depth=(2, 4), distractors=(2, 4)),
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
        verifier=dict(max_tokens=32),
        meta_verifier=dict(max_tokens=32),
    )
    c.engine = dict(rows=128, prompt_buckets=(64, 96, 128), answer_buckets=(32, 80))
    rl = dict(groups=16, samples=8, rows=16, row_length=320, optimizer=adam(3e-4, warmup_steps=3))
    cold = dict(steps=1_000, rows=8, row_length=256, optimizer=adam(2e-3, final_share=0.1))
    again = dict(steps=60, rows=8, row_length=256, optimizer=adam(3e-4))
    label = dict(rule=dict(num_analyses=4, num_meta=1, num_valid=2), num_candidates=256)
    generator_rl = rl | dict(row_length=480)

    def verifier(name: str, init: str, judge: str | None, meta: float, **more) -> dict:
        mixture = dict(verifier=1.0, **({"meta_verifier": meta} if meta else {}))
        steps = dict(steps=30)
        return dict(
            kind="rl", name=name, init=init, judge=judge, mixture=mixture, rl=rl | steps, **more
        )

    c.stages = (
        dict(kind="sft", name="sft", sft=cold),
        dict(kind="answer", name="before", verifier="sft", generator="sft"),
        verifier("verifier-0", "sft", None, 0.0),
        dict(
            kind="rl",
            name="meta",
            init="sft",
            mixture=dict(meta_verifier=1.0),
            rl=rl | dict(steps=15),
        ),
        verifier("verifier-1", "verifier-0", "meta", 0.33),
        dict(kind="probe", name="probe-1", verifier="verifier-1"),
        dict(
            kind="rl",
            name="generator-1",
            init="verifier-1",
            judge="verifier-1",
            mixture=dict(generator=1.0),
            rl=generator_rl | dict(steps=30),
        ),
        dict(
            kind="autolabel",
            name="autolabel-1",
            proofs_from="generator-1",
            judge="verifier-1",
            num_proofs=192,
            **label,
        ),
        dict(
            kind="rejection",
            name="rejection-1",
            init="generator-1",
            samples_from=("verifier-1", "generator-1"),
            min_reward=0.9,
            sft=again,
        ),
        verifier("verifier-2", "rejection-1", "verifier-1", 0.33, proofs=("proofs", "autolabel-1")),
        dict(kind="probe", name="probe-2", verifier="verifier-2", predecessor="probe-1"),
        dict(
            kind="rl",
            name="generator-2",
            init="verifier-2",
            judge="verifier-2",
            mixture=dict(generator=1.0),
            rl=generator_rl | dict(steps=30),
        ),
        dict(kind="answer", name="after", verifier="verifier-2", generator="generator-2"),
    )
    c.before, c.after = "before", "after"
    c.runtime = dict(save_every=50, mesh=dict(data=1))
    return c
