#!/usr/bin/env bash
# From a fresh clone to a trained prover and its table of results, with nothing but Python 3.11+:
#
#   bash tools/quickstart.sh [WORKDIR [--config.field=value ...]]
#
# Makes .venv in the repository root, installs the package there, trains configs/quick.py in WORKDIR
# (default: runs/quick in the repository) and prints the result table. Run again on the same WORKDIR
# it continues where it stopped; once finished it only shows the table.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ "${1:-}" == -* ]]; then
  sed -n '2,8p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
  [[ "$1" == -h || "$1" == --help ]] && exit 0
  exit 2
fi
workdir="${1:-$ROOT/runs/quick}"

make_environment package
# Arrays in huge pages: a sixth less time on Linux CPUs (README, "Use"). Other systems ignore it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
say "training configs/quick.py in $workdir"
exec "$VENV/bin/mathv2-train" --config="$ROOT/configs/quick.py" --workdir="$workdir" "${@:2}"
