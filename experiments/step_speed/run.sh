#!/usr/bin/env bash
# Training steps beside transformers + torch at three sizes, on two idle cores: about 20 minutes. The
# second run has our layers unrolled. Huge pages are for both sides, which share a process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
here=experiments/step_speed
.venv/bin/python tools/bench_step.py --repeats=7 --seconds=4 --out="$here/result.json"
.venv/bin/python tools/bench_step.py --repeats=7 --seconds=4 --unroll --out="$here/unrolled.json"
