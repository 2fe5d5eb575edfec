# shellcheck shell=bash
# Sourced by the scripts beside it: the one place that makes the environment they run in.
#
#   make_environment package|tpu|test|dev
#   make_libtpu
#
# makes or completes $VENV (a folder in the repository root) with the versions pinned for its
# Python, installs this package into it in place, and leaves its interpreter's path in $VENV_PYTHON.
# An environment that is complete is left alone: a stamp in it holds a hash of what it was made from.
#
# Read from the environment: PYTHON, the interpreter to build with (default: the first Python >= 3.11
# found); MATHV2_VENV, the folder's name (default .venv).
#
# make_libtpu puts the compiler for TPUs that this JAX pins into $LIBTPU, outside of the packages that
# a run on a CPU would import. To compile for a topology, put $LIBTPU on PYTHONPATH.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/${MATHV2_VENV:-.venv}"
VENV_PYTHON="$VENV/bin/python"
LIBTPU="$VENV/libtpu"

say() { printf '[%s] %s\n' "$(basename "$0")" "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# Prints "3.11" and so on for the interpreter $1; nothing where it does not run or is no Python 3.11+.
python_version() {
  "$1" -c 'import sys
if sys.version_info >= (3, 11):
    print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# Prints the interpreter to build with; versions that have a constraints file of their own come first.
find_python() {
  local candidate version newer=""
  if [[ -n "${PYTHON:-}" ]]; then
    [[ -n "$(python_version "$PYTHON")" ]] || die "PYTHON=$PYTHON is not a working Python 3.11 or newer"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
    version="$(python_version "$candidate")"
    case "$version" in
      "") ;;
      3.11 | 3.12)
        echo "$candidate"
        return
        ;;
      *) newer="${newer:-$candidate}" ;;
    esac
  done
  [[ -n "$newer" ]] || die "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3"
  echo "$newer"
}

# Prints the constraints file for Python $1; a Python newer than those tested takes the newest file.
constraints_for() {
  local own="$ROOT/tools/constraints-py${1/./}.txt"
  if [[ -f "$own" ]]; then echo "$own"; else echo "$ROOT/tools/constraints-py312.txt"; fi
}

# Makes $VENV where there is none that works, or where $PYTHON asks for another version.
make_venv() {
  local python wanted held=""
  [[ -e "$VENV_PYTHON" ]] && held="$(python_version "$VENV_PYTHON")"
  if [[ -n "$held" && (-z "${PYTHON:-}" || "$(python_version "$PYTHON")" == "$held") ]]; then
    return
  fi
  python="$(find_python)"
  wanted="$(python_version "$python")"
  [[ -d "$VENV" ]] && say "remaking $VENV: it holds ${held:-no working Python}, wanted is $wanted"
  say "making $VENV with Python $wanted"
  "$python" -m venv --clear "$VENV" ||
    die "\`$python -m venv\` failed; on Debian and Ubuntu: apt install python$wanted-venv"
}

make_environment() {
  local extra="$1" target level constraints version hash
  local levels
  case "$extra" in
    package) levels=(package) target="." ;;
    tpu) levels=(package tpu) target=".[tpu]" ;;
    test) levels=(package test) target=".[test]" ;;
    dev) levels=(package test dev) target=".[dev]" ;;
    *) die "make_environment: $extra is not one of package, tpu, test, dev" ;;
  esac

  make_venv
  version="$(python_version "$VENV_PYTHON")"
  constraints="$(constraints_for "$version")"
  hash="$(cd "$ROOT" && "$VENV_PYTHON" -c 'import hashlib, pathlib, sys
parts = [sys.argv[1].encode()] + [pathlib.Path(name).read_bytes() for name in sys.argv[2:]]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())' \
    "$ROOT" setup.py requirements.txt pyproject.toml mathv2_jax/__init__.py "$constraints")"
  [[ "$(cat "$VENV/complete-$extra" 2>/dev/null)" == "$hash" ]] && return

  case "$version" in
    3.11 | 3.12) ;;
    *) say "note: tested on Python 3.11 and 3.12; $version takes $(basename "$constraints")" ;;
  esac
  say "installing mathv2_jax ($extra) into $VENV; a first time takes a few minutes"
  (cd "$ROOT" && "$VENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off \
    --constraint "$constraints" --editable "$target") >"$VENV/pip.log" 2>&1 || {
    tail -n 30 "$VENV/pip.log" >&2
    die "pip failed; its whole output is in $VENV/pip.log"
  }
  for level in "${levels[@]}"; do echo "$hash" >"$VENV/complete-$level"; done
  say "environment ready"
}

make_libtpu() {
  local pinned
  pinned="$("$VENV_PYTHON" -c 'import importlib.metadata as m
print(next(r.partition(";")[0].strip() for r in m.requires("jax") if r.startswith("libtpu")))')"
  [[ "$(cat "$LIBTPU/complete" 2>/dev/null)" == "$pinned" ]] && return
  say "installing $pinned into $LIBTPU, 0.2 GB"
  rm -rf "$LIBTPU"
  "$VENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off --no-deps \
    --target "$LIBTPU" "$pinned" >"$VENV/pip.log" 2>&1 || {
    tail -n 30 "$VENV/pip.log" >&2
    die "pip failed; its whole output is in $VENV/pip.log"
  }
  echo "$pinned" >"$LIBTPU/complete"
}
