"""The whole recipe on real, human-graded proofs, with settings so small that nothing is learned.

    bash tools/import_real.sh FILES DIR
    mathv2-train --config=configs/olympiad.py --config.data=DIR --workdir=runs/olympiad

FILES holds `graded/*.jsonl` and `problems/*.jsonl`, as data/README of the real data describes them;
DIR is what mathv2-records makes of them.
The stages are those of configs/quick.py, with a few steps each at sequences of 4,096 tokens. It
shows that real files go through every stage and what the records look like; a model of this size
cannot prove anything. There is no exact judge for this data: `metrics` in summary.json is null,
and the answer stages report the agreement with human labels, by scale.
"""

import ml_collections

from configs import quick

PROMPT, ANSWER = 4096, 256  # tokens

# Which labels may be learned from together (theirs, ours). The target scale is full marks.
SCALE_PAIRS = {
    # "Would earn 5 of 7 or more" is taken for a 1, so small slips pass: too lenient for I_v, where
    # they are a 0.5; the public labels do not say which of the accepted proofs have them.
    "opc-5-of-7": ((0.0, 0.0), (1.0, 1.0)),
    # "Completely correct" in one reader's eyes is a 1, anything less a 0: noisy, few rows.
    "one-reader-6-of-6": ((0.0, 0.0), (1.0, 1.0)),
    # A person's second look at proofs that had full marks: upheld or not.
    "disputed-gold": ((0.0, 0.0), (1.0, 1.0)),
}


def get_config() -> ml_collections.ConfigDict:
    c = quick.get_config()
    c.world = None
    c.real = dict(
        # Without problems that ask for an answer, not for a proof: answerbench and brokenmath.
        sources=(
            *("proof_pilot_pool", "opc", "opc_solved", "mathconverse", "rprover"),
            *("deepseek_math_v2", "proofbench", "usamo2025"),
        ),
        scales=dict(pairs=SCALE_PAIRS),
        num_probe=2,
        num_test=2,
        max_prompt_tokens=PROMPT,
        max_example_tokens=PROMPT,
    )
    c.tokenizer = dict(vocab_size=2048, max_texts=2_000)
    c.model.update(width=32, num_layers=2, dense_width=64, embedding_taps=0)
    c.model.update(head_key_width=16, head_rope_width=8, head_value_width=16)
    c.model.update(expert_width=16, num_experts=4, logprob_chunk=1024)
    c.model.update(max_position=PROMPT + ANSWER)
    limit = dict(max_tokens=ANSWER)
    c.roles = dict(templates="olympiad", generator=limit, verifier=limit, meta_verifier=limit)
    c.engine = dict(rows=8, context=PROMPT + ANSWER, page=64, chunk=256, chunks=4)
    drills = ("rule-drills", "source-drills")  # the proof world's
    c.stages = tuple(name for name in c.stages if name not in drills)
    c.stage = {name: _shrunk(c.stage[name].to_dict()) for name in c.stages}
    c.stage.sft.init = "fresh"
    c.runtime.save_every = 2
    return c


def _shrunk(stage: dict) -> dict:
    stage = dict(stage)
    for loop in ("sft", "rl"):
        if loop in stage:
            stage[loop] = dict(stage[loop], steps=3, rows=1, row_length=PROMPT + ANSWER)
    if "rl" in stage:
        stage["rl"].update(groups=2, samples=2)
    smaller = {
        "rejection": dict(allow_empty=True),
        "autolabel": dict(
            num_candidates=8, num_proofs=4, rule=dict(num_analyses=4, num_meta=1, num_valid=2)
        ),
        "probe": dict(tolerance_se=1e6),  # three steps say nothing about drift
        "answer": dict(num_autolabel=2),
    }
    return stage | smaller.get(stage["kind"], {})
