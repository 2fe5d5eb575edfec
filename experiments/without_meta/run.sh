#!/usr/bin/env bash
# configs/without_meta.py at three seeds, each run bound to one core and two of them at once, then
# both arms compared: about 30 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
workdir="${1:-runs/without_meta}"
runs="$workdir/without-meta-seed0,$workdir/without-meta-seed1,$workdir/without-meta-seed2"

sweep() {
  local core="$1" only="$2"
  taskset -c "$core" .venv/bin/python experiments/run_sweep.py \
    --sweep=configs/sweeps/without_meta.py --workdir="$workdir" --only="$only"
}

sweep 0 without-meta-seed0,without-meta-seed2 &
first=$!
sweep 1 without-meta-seed1
wait "$first"
.venv/bin/python experiments/arms.py --workdirs="$runs" --arms=after-meta,after-score \
  --out=experiments/without_meta/result.json
