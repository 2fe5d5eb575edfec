#!/usr/bin/env bash
# What attempts, verification and refinement give at test time, in the proof world, by the exact
# judge: the last generator of a run of configs/refine.py writes, its last verifier verifies. About
# half an hour on 2 idle cores.
#
#   bash experiments/search/run.sh RUN [WORKDIR]     # RUN: a finished workdir of configs/refine.py
set -euo pipefail
run="$(realpath "${1:?a finished workdir of configs/refine.py}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
at="$(realpath -m "${2:-runs/search}")"
here=experiments/search
mkdir -p "$at"
head -48 "$run/records/input/test_problems.jsonl" >"$at/problems.jsonl"

search() {
  local name="$1"
  shift
  .venv/bin/python -m mathv2_jax.cli.search --problems="$at/problems.jsonl" --workdir="$at/$name" \
    --config.at_once=48 --config.runtime.progress_every=120 "$@"
}
evaluate() {
  local name="$1"
  shift
  .venv/bin/python -m mathv2_jax.cli.evaluate --judge=world --out="$at/evaluation/$name" "$@"
  cp "$at/evaluation/$name/evaluation.json" "$here/$name.json"
}

for stage in generator-2 sft; do
  search "refine-$stage" --engine="checkpoint:$run#$stage" --config.method=refine \
    --config.refine.verifications=0
  evaluate "refine-$stage" --search="$at/refine-$stage"
done

engines=(--engine="checkpoint:$run#generator-2" --verifier_engine="checkpoint:$run#verifier-2")
search one-shot "${engines[@]}" --config.pool.rounds=0 --config.pool.proofs=128 \
  --config.pool.verifications=8
search pool "${engines[@]}" --config.pool.rounds=6 --config.pool.proofs=16 \
  --config.pool.verifications=8 --config.pool.best=4 --config.pool.analyses=4
evaluate pool --search="$at/pool" --one_shot="$at/one-shot"
for name in pool refine-generator-2; do
  cp "$at/evaluation/$name/curves.png" "$here/$name.png"
done
