#!/usr/bin/env bash
# configs/world.py at three seeds, one after another (their times are in notes.md), then the arms
# compared and the hacking curves drawn. The figure wants: pip install -e ".[experiments]".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
workdir="${1:-runs/world}"
here=experiments/world
runs="$workdir/world-seed0,$workdir/world-seed1,$workdir/world-seed2"
.venv/bin/python experiments/run_sweep.py --sweep=configs/sweeps/world.py --workdir="$workdir"
.venv/bin/python experiments/arms.py --workdirs="$runs" --arms=after-alone,after-fixed,after-loop --out="$here/loop.json"
.venv/bin/python experiments/arms.py --workdirs="$runs" --arms=after-1,after-score --out="$here/meta.json"
for seed in 0 1 2; do
  .venv/bin/python experiments/curves.py --workdir="$workdir/world-seed$seed" \
    --stages=generator-1,alone,loop-2,loop-3 --out="$here/curve-seed$seed.json"
done
