#!/usr/bin/env bash
# configs/quick.py at three seeds, one after another: about 9 minutes each on 2 idle cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
workdir="${1:-runs/seeds}"
.venv/bin/python experiments/run_sweep.py --sweep=configs/sweeps/seeds.py --workdir="$workdir"
cp "$workdir/results.json" experiments/quick_seeds/result.json
