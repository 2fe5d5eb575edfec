#!/usr/bin/env bash
# Training steps beside transformers + torch at three sizes, on two cores: about 20 idle minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"  # for both: one process
.venv/bin/python tools/bench_step.py --repeats=7 --seconds=4 --out=experiments/step_speed/result.json
