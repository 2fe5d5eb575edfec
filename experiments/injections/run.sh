#!/usr/bin/env bash
# How right a run's last verifier is, as verifier and as meta-verifier, and how far texts that talk to
# their judge move it. About three minutes on 2 idle cores.
#
#   bash experiments/injections/run.sh RUN [WORKDIR]     # RUN: a finished workdir of configs/refine.py
set -euo pipefail
run="$(realpath "${1:?a finished workdir of configs/refine.py}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
at="$(realpath -m "${2:-runs/injections}")"
here=experiments/injections
.venv/bin/python -m experiments.injections.graded --workdir="$run" --out="$at"

evaluate() {
  local name="$1"
  shift
  # The texts that are put after a proof are long in this world's small vocabulary.
  .venv/bin/python -m mathv2_jax.cli.evaluate --engine="checkpoint:$run#verifier-1" \
    --out="$at/$name" --config.engine.context=896 "$@"
  cp "$at/$name/evaluation.md" "$here/$name.md"
}

evaluate verifier --graded="$at/proofs.jsonl" --injections
evaluate meta-verifier --graded_analyses="$at/analyses.jsonl"
