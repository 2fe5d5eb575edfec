#!/usr/bin/env bash
# configs/world.py at three seeds, each run bound to one core and two of them at once (one core does
# about 3/4 of the work of two, and a run's last bits depend on how many it has), then the arms
# compared and the hacking curves drawn. The figure wants: pip install -e ".[experiments]".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
workdir="${1:-runs/world}"
here=experiments/world
runs="$workdir/world-seed0,$workdir/world-seed1,$workdir/world-seed2"

sweep() {
  local core="$1" only="$2"
  taskset -c "$core" .venv/bin/python experiments/run_sweep.py --sweep=configs/sweeps/world.py \
    --workdir="$workdir" --only="$only"
}

sweep 0 world-seed0,world-seed2 &
first=$!
sweep 1 world-seed1
wait "$first"
.venv/bin/python experiments/arms.py --workdirs="$runs" \
  --arms=after-fixed,after-1,after-loop --out="$here/loop.json"
for seed in 0 1 2; do
  .venv/bin/python experiments/curves.py --workdir="$workdir/world-seed$seed" \
    --stages=generator-1,fixed,loop-2,loop-3 --out="$here/curve-seed$seed.json"
done
