#!/usr/bin/env bash
# Runs the tests in the same environment as the quickstart, completed with the test tools:
#
#   bash tools/test.sh [pytest arguments, paths relative to the repository root]
#
# Two workers unless -n says otherwise. tools/test_py312.sh runs the same on Python 3.12.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment test
make_libtpu
cd "$ROOT"
say "running the tests on Python $(python_version "$VENV_PYTHON")"
exec "$VENV_PYTHON" -m pytest -n 2 "$@"
