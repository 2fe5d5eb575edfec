#!/usr/bin/env bash
# What the real files hold, and what the data pipeline costs: about 6 minutes on two idle cores.
#
#   bash experiments/data/run.sh FILES     # a folder with graded/*.jsonl and problems/*.jsonl
#
# Needs the extras [data] and [experiments].
set -euo pipefail
files="$(realpath "${1:?usage: bash experiments/data/run.sh FILES}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
here=experiments/data work=runs/data python=.venv/bin/python
rm -rf "$work"
mkdir -p "$work"

bash tools/import_real.sh "$files" "$work/records"
"$python" "$here/tokenizer.py" --records="$work/records" --out="$work/tokenizer.model"
"$python" -m mathv2_jax.cli.records --records="$work/records" --tokenizer="$work/tokenizer.model" \
  --statistics="$here/statistics.json" --figure="$here/statistics.png" | tee "$here/statistics.txt"
"$python" tools/bench_data.py --out="$here/pipeline.json"

# How long steps wait for their data.
no_table=(--config.before= --config.after=)
"$python" -m mathv2_jax.cli.train --config=configs/quick.py --workdir="$work/quick" \
  --config.stages=rule-drills,source-drills,sft "${no_table[@]}"
"$python" -m mathv2_jax.cli.train --config=configs/olympiad.py --config.data="$work/records" \
  --workdir="$work/olympiad" --config.stages=sft --config.stage.sft.sft.steps=20 "${no_table[@]}"
"$python" "$here/waits.py" "$work/quick" "$work/olympiad" --out="$here/waits.json"
