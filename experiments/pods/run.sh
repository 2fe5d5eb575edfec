#!/usr/bin/env bash
# The programs of an RL step, compiled for TPU pods that are not there: about an hour on two cores.
# libtpu, the one that this JAX pins, goes into runs/libtpu and not into the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=experiments/pods
pinned="$(.venv/bin/python -c '
import importlib.metadata as m
print(next(r.partition(";")[0].strip() for r in m.requires("jax") if r.startswith("libtpu")))')"
[[ -d runs/libtpu ]] || .venv/bin/python -m pip install --quiet --no-deps --target runs/libtpu "$pinned"
export PYTHONPATH="$PWD:$PWD/runs/libtpu"

compile() {
  local name="$1"
  shift
  # 1: something does not fit, which is a result.
  .venv/bin/python -m mathv2_jax.cli.compile --json="$here/$name.json" "$@" || [[ $? == 1 ]]
}

compile deepseek_v32 --config=configs/deepseek_v32.py --topology=v5p:8x8x16
compile moonlight_16b --config=configs/moonlight_16b.py --topology=v6e:4x4
