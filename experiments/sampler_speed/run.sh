#!/usr/bin/env bash
# One config by the sampler before pages and by the one of now, at the same time, each bound to a core.
#
#   bash experiments/sampler_speed/run.sh [CONFIG] [WORKDIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
config="${1:-configs/quick.py}"
workdir="$(realpath -m "${2:-runs/sampler_speed}")"
before=f1b9da4^ # the last commit whose sampler decodes a batch to its end
python="$PWD/.venv/bin/python"
name="$(basename "$config" .py)"
mkdir -p "$workdir"
[[ -d "$workdir/source" ]] || git worktree add --detach "$workdir/source" "$before"

# Each imports the package that stands beside its config.
train() {
  (cd "$2" && PYTHONPATH="$2" taskset -c "$1" "$python" -m mathv2_jax.cli.train \
    --config="$config" --workdir="$workdir/$name-$3" >"$workdir/$name-$3.log" 2>&1)
}
train 0 "$workdir/source" before &
first=$!
train 1 "$PWD" now
wait "$first"
"$python" experiments/sampler_speed/times.py --before="$workdir/$name-before" \
  --now="$workdir/$name-now" --out="experiments/sampler_speed/$name.json"
