#!/usr/bin/env bash
# Import and export of a synthetic 4 GB checkpoint beside a plain copy: needs 16 GB of disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
workdir="${1:-runs/bench_convert}"
mkdir -p "$workdir"
.venv/bin/python tools/bench_convert.py --gigabytes=4 --repeats=3 --workdir="$workdir" \
  --out=experiments/convert/result.json
