#!/usr/bin/env bash
# What attempts, verification and refinement give at test time, in the proof world, by the exact
# judge: the cold start and the last generator of a run of configs/refine.py write, its last verifier
# verifies. About 22 minutes on 2 idle cores.
#
#   bash experiments/search/run.sh RUN [WORKDIR]     # RUN: a finished workdir of configs/refine.py
set -euo pipefail
run="$(realpath "${1:?a finished workdir of configs/refine.py}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
at="$(realpath -m "${2:-runs/search}")"
here=experiments/search
mkdir -p "$at"
head -96 "$run/records/input/test_problems.jsonl" >"$at/problems.jsonl"

search() {
  local name="$1"
  shift
  .venv/bin/python -m mathv2_jax.cli.search --problems="$at/problems.jsonl" --workdir="$at/$name" \
    --config.at_once=96 --config.runtime.progress_every=120 "$@"
}
evaluate() {
  local name="$1"
  shift
  .venv/bin/python -m mathv2_jax.cli.evaluate --judge=world --out="$at/evaluation/$name" "$@"
  cp "$at/evaluation/$name/evaluation.md" "$here/$name.md"
}

# The rounds were chosen on 48 problems of the validation split.
pool=(--config.pool.rounds=4 --config.pool.proofs=16 --config.pool.verifications=8)
pool+=(--config.pool.best=16 --config.pool.analyses=2)
for stage in generator-2 sft; do
  search "refine-$stage" --engine="checkpoint:$run#$stage" --config.method=refine \
    --config.refine.verifications=0
  evaluate "refine-$stage" --search="$at/refine-$stage"
  engines=(--engine="checkpoint:$run#$stage" --verifier_engine="checkpoint:$run#verifier-1")
  search "one-shot-$stage" "${engines[@]}" --config.pool.rounds=0 --config.pool.proofs=256 \
    --config.pool.verifications=8
  search "pool-$stage" "${engines[@]}" "${pool[@]}"
  evaluate "pool-$stage" --search="$at/pool-$stage" --one_shot="$at/one-shot-$stage"
  .venv/bin/python -m experiments.search.repairs --search="$at/pool-$stage" \
    >"$here/repairs-$stage.md"
done
search adaptive "${engines[@]}" "${pool[@]}" --config.pool.adaptive=True --config.pool.wave=2
search filter "${engines[@]}" "${pool[@]}" --config.pool.unverified=0.5 --config.pool.audited=0.5
for name in adaptive filter; do
  evaluate "$name" --search="$at/$name" --one_shot="$at/one-shot-sft"
done
for name in pool-sft pool-generator-2 refine-sft refine-generator-2; do
  cp "$at/evaluation/$name/curves.png" "$here/$name.png"
done
