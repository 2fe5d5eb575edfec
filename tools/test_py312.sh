#!/usr/bin/env bash
# Runs the tests on Python 3.12 with the newest JAX supported (3.11 ends at jax 0.10), in .venv312:
#
#   bash tools/test_py312.sh [pytest arguments]
#
# Takes $PYTHON, python3.12 or pyenv's newest 3.12, whichever is found first.
set -euo pipefail
tools="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

is_python312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }

candidates=("${PYTHON:-python3.12}")
if [[ -z "${PYTHON:-}" ]] && command -v pyenv >/dev/null; then
  version="$(pyenv versions --bare | grep -E '^3\.12\.[0-9]+$' | tail -n 1 || true)"
  [[ -n "$version" ]] && candidates+=("$(pyenv prefix "$version")/bin/python")
fi

for candidate in "${candidates[@]}"; do
  if is_python312 "$candidate"; then
    PYTHON="$candidate" MATHV2_VENV=.venv312 exec bash "$tools/test.sh" "$@"
  fi
done
echo "[test_py312.sh] error: no working Python 3.12 among: ${candidates[*]}; install one, or name it" \
  "with PYTHON" >&2
exit 1
