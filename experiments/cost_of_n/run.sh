#!/usr/bin/env bash
# One prompt of 2,000 tokens answered n times, beside n such prompts: two minutes on two idle
# cores. The figure wants: pip install -e ".[experiments]".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
.venv/bin/python experiments/cost_of_n/measure.py --out=experiments/cost_of_n/result.json
