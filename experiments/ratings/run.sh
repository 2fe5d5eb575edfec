#!/usr/bin/env bash
# The ratings that the released DeepSeek-Math-V2 gave its own proofs, against experts' grades.
#
#   bash experiments/ratings/run.sh FILE     # graded/deepseek_math_v2.jsonl of the public files
set -euo pipefail
file="$(realpath "${1:?the file of graded proofs}")"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
.venv/bin/python -m mathv2_jax.cli.evaluate --graded="$file" --rating=auto_rating --out=runs/ratings
cp runs/ratings/evaluation.json experiments/ratings/result.json
cp runs/ratings/evaluation.md experiments/ratings/table.md
cp runs/ratings/calibration.png experiments/ratings/calibration.png
