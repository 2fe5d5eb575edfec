#!/usr/bin/env bash
# The programs of an RL step, compiled for TPU pods that are not there: an hour on two cores, for a
# nightly job. What was compiled from the same sources before is not compiled again (runs/pods).
#
#   bash experiments/pods/run.sh [NAME...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tools/environment.sh
source tools/environment.sh
make_environment package
make_libtpu
here=experiments/pods
export PYTHONPATH="$PWD:$LIBTPU"
mkdir -p runs/pods
wanted=" $* "

compile() {
  local name="$1" stamp code=0
  shift
  [[ "$wanted" == "  " || "$wanted" == *" $name "* ]] || return 0
  stamp="$({
    echo "$*" "$(cat "$LIBTPU/complete")"
    git ls-files mathv2_jax configs tools/constraints-* | xargs sha256sum
  } | sha256sum)"
  if [[ "$(cat "runs/pods/$name.stamp" 2>/dev/null)" == "$stamp" ]]; then
    say "$name: compiled before from these sources"
    return
  fi
  say "$name: $*"
  "$VENV_PYTHON" -m mathv2_jax.cli.compile --json="runs/pods/$name.json" "$@" || code=$?
  # 1: something does not fit, which is a result; so is a crash, but before the last figures.
  ((code <= 1)) || die "$name: mathv2-compile ended with $code"
  "$VENV_PYTHON" -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1]))["phases"])' \
    "runs/pods/$name.json" || die "$name: mathv2-compile ended before all was compiled"
  mv "runs/pods/$name.json" "$here/$name.json"
  echo "$stamp" >"runs/pods/$name.stamp"
}

compile deepseek_v32 --config=configs/deepseek_v32.py --topology=v5p:8x8x16
compile deepseek_v32_128k --config=configs/deepseek_v32_128k.py --topology=v5p:4x8x8
compile deepseek_v32_128k_on_128 --config=configs/deepseek_v32_128k.py --topology=v5p:4x4x8 \
  --programs=gradients,update --config.runtime.mesh.expert=4 --config.runtime.mesh.context=32 \
  --config.stage.generator-2.rl.rows=4 --config.runtime.sampling.replicas=1
compile moonlight_16b --config=configs/moonlight_16b.py --topology=v6e:4x4
# The setting of MaxText's published figure: DeepSeek-V3, 8,192 tokens, 512 chips.
compile deepseek_v3_8k --config=configs/deepseek_v32.py --topology=v5p:8x8x8 \
  --programs=gradients,update --config.runtime.sampling=None --config.runtime.mesh.fsdp=8 \
  --config.model.index_topk=0 --config.model.index_heads=0 --config.model.index_head_width=0 \
  --config.stage.generator-2.rl.rows=512 --config.stage.generator-2.rl.row_length=8192
