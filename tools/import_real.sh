#!/usr/bin/env bash
# The public files of graded proofs and problems, imported for configs/olympiad.py:
#
#   bash tools/import_real.sh FILES DIR
#
# FILES holds graded/*.jsonl and problems/*.jsonl, DIR is a folder that is not there yet.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
(($# == 2)) || die "usage: bash tools/import_real.sh FILES DIR"
files="$1" records="$2"

import() { "$VENV_PYTHON" -m mathv2_jax.cli.records --records="$records" "$@"; }

# What measures comes first, so that nothing about its problems is learned from.
import --evaluation --from="$files/problems/proofbench.jsonl" \
  --from="$files/problems/usamo2025.jsonl" --from="$files/problems/answerbench.jsonl" \
  --from="$files/graded/deepseek_math_v2.jsonl"
# All critiques that a person judged are about three problems of ProofBench. D_mv has no other
# source, so these three leave the evaluation.
import --withdraw --from="$files/graded/analyses_rprover.jsonl"
import --from="$files/graded/opc.jsonl" --from="$files/graded/mathconverse.jsonl" \
  --from="$files/graded/rprover.jsonl" --from="$files/graded/analyses_opc.jsonl"
# Analyses whose text ends before the score, which stands beside it.
import --field=verdict=score --from="$files/graded/analyses_nemo_gym.jsonl"
import --from="$files/problems/proof_pilot_pool.jsonl" --from="$files/problems/opc.jsonl" \
  --from="$files/problems/brokenmath.jsonl"
