"""A model of transformers goes through import, training and export, and transformers reads it back.

    python tools/check_round_trip.py [--kinds=v3,v32] [--workdir=DIR]

Of each kind: a tiny DeepseekV3 or DeepseekV32 model with random weights, saved by transformers with
a byte-level tokenizer and a chat template; mathv2-convert --from_hf; mathv2-train from it, one
supervised and one RL stage of configs/smoke.py; mathv2-convert --to_hf --verify of what each stage
left; then AutoModelForCausalLM loads the last and answers a prompt. Exit code 0 where all of that
went well and every stage has changed the weights. Nothing is learned in so few steps: no answer can
be read, so no reward differs, and what the RL stage trains is the verifier head and, by the balance
loss, the routers and what they read.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BOS, EOS, USER, ASSISTANT = "<｜bos｜>", "<｜eos｜>", "<｜User｜>", "<｜Assistant｜>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
VOCAB = 420
PROMPT = [{"role": "user", "content": "Given: A. Rules: (1) A implies B. Show: B."}]
SETTINGS = {
    "model": "{}",
    "tokenizer": "{}",
    "stages": "sft,verifier-0",
    "stage.sft.init": "fresh",
    "stage.sft.sft.steps": "12",
    "before": "",
    "after": "",
    "world.num_demonstrations": "200",
    "engine.context": "384",
    "stage.verifier-0.rl.row_length": "512",
    "stage.verifier-0.rl.steps": "2",
    "stage.verifier-0.rl.auxiliary.balance": "0.01",
}


def texts() -> list[str]:
    """What the tokenizer is made from: demonstrations of the world."""
    from mathv2_jax.text import prompts
    from mathv2_jax.world import corpus

    sizes = corpus.WorldConfig(num_demonstrations=200, num_drills=8, num_problems=8)
    made = corpus.make_corpus(
        dataclasses.replace(sizes, num_graded_proofs=8, num_graded_analyses=8, num_test=8),
        0,
        prompts.load("world"),
    )
    return [text for d in made.demonstrations for text in (d.user, d.assistant)]


def released(at: pathlib.Path, kind: str) -> int:
    """Saves the tiny model and its tokenizer as transformers does; its number of parameters."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        show_progress=False,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(texts(), trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )
    fast.chat_template = TEMPLATE
    fields: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        max_position_embeddings=1024,
        num_nextn_predict_layers=0,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=10000.0,
            factor=4.0,
            original_max_position_embeddings=256,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    if kind == "v3":
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields))
    else:
        fields |= dict(index_topk=64, index_n_heads=2, index_head_dim=16)
        model = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**fields))
    model.save_pretrained(at)
    fast.save_pretrained(at)
    return sum(p.numel() for p in model.parameters())


def run(*words: object) -> str:
    """A command's output; RuntimeError with the end of its errors where it fails."""
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}"
        )
    return done.stdout


def weights(at: pathlib.Path) -> dict[str, Any]:
    """Every tensor in a folder, those of the verifier head too."""
    import safetensors.torch

    found: dict[str, Any] = {}
    for path in at.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def changed(before: pathlib.Path, after: pathlib.Path) -> str:
    """How many tensors differ, and how far; RuntimeError where the names do, or nothing does."""
    old, new = weights(before), weights(after)
    if set(old) != set(new):
        raise RuntimeError(f"{before} and {after} have other tensors: {set(old) ^ set(new)}")
    moved = {n: float((new[n].float() - x.float()).abs().max()) for n, x in old.items()}
    number = sum(value > 0 for value in moved.values())
    if not number:
        raise RuntimeError(f"{after} is {before}: nothing was trained")
    return f"{number} of {len(moved)} tensors moved, by up to {max(moved.values()):.2g}"


def answer(at: pathlib.Path) -> str:
    """What the reference library says with the folder's model, tokenizer and template."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(at, local_files_only=True)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(at, local_files_only=True)
    ids = tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    said = out[0, ids["input_ids"].shape[1] :]
    if not len(said):
        raise RuntimeError(f"{at} generated nothing")
    return f"{type(model).__name__} generated {len(said)} tokens: {tokenizer.decode(said)!r}"


def check(at: pathlib.Path, kind: str) -> None:
    """One kind, from start to end, in the empty folder `at`."""
    began = time.monotonic()
    count = released(at / "released", kind)
    print(f"{kind}: {count:,} parameters by transformers, vocabulary of {VOCAB}", flush=True)
    convert, imported = "mathv2_jax.cli.convert", at / "imported"
    run(convert, f"--from_hf={at / 'released'}", f"--checkpoint={imported}")
    exact = at / "again"
    print("  " + run(convert, f"--to_hf={exact}", f"--checkpoint={imported}", "--dtype=float32",
                     "--verify").splitlines()[0], flush=True)  # fmt: skip
    old, new = weights(at / "released"), weights(exact)
    ours = {name for name in new if name.startswith("verifier_head.")}
    if set(old) != set(new) - ours or not all((old[n] == new[n]).all() for n in old):
        raise RuntimeError("import and export have changed the model")
    print(f"  import, then export: all {len(old)} tensors are bit for bit the same", flush=True)
    settings = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    run(
        "mathv2_jax.cli.train",
        "--config=configs/smoke.py",
        f"--config.start={imported}",
        f"--workdir={at / 'run'}",
        *settings,
    )
    before = exact
    for stage in SETTINGS["stages"].split(","):
        after = at / f"hf-{stage}"
        words = (f"--checkpoint={at / 'run'}", f"--stage={stage}", "--dtype=float32", "--verify")
        printed = run(convert, f"--to_hf={after}", *words)
        print(f"  {stage}: {changed(before, after)}; {printed.splitlines()[0]}", flush=True)
        before = after
    print(f"  {answer(before)}; {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    """Prints the figures of each kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default="v3,v32")
    parser.add_argument("--workdir", type=pathlib.Path, help="kept; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for kind in arguments.kinds.split(","):
            at = (arguments.workdir or pathlib.Path(temporary)).resolve() / kind
            at.mkdir(parents=True)
            check(at, kind)
    return 0


if __name__ == "__main__":
    sys.exit(main())
