#!/usr/bin/env bash
# Rollouts beside transformers' generate and its continuous batching: about 40 minutes on two idle
# cores. Needs the extra [hf].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
.venv/bin/python tools/bench_rollout.py --rows=32,64,128 --batches=16,64,256 --continuous=64,256 \
  --generate_part=256 --out=experiments/rollout/result.json
