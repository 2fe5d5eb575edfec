#!/usr/bin/env bash
# Starts one command on every worker of a Cloud TPU, follows worker 0, and leaves with its exit code.
#
#   bash tools/launch_tpu.sh --name=NAME --zone=ZONE [options] -- \
#     mathv2-train --config=configs/FILE.py --workdir=gs://BUCKET/RUN
#
# The commit that is checked out here goes to the workers, which install it; uncommitted changes do
# not. The workdir must be one that all workers share. Given again after a worker was lost, the same
# command goes on with the run; --restarts does so by itself.
#
#   --name=NAME --zone=ZONE [--project=PROJECT]    the TPU VM, or the queued resource
#   --type=TYPE         v5p-2048, v6e-16, v5litepod-256: make it first, unless it is there
#   --queue             with --type: as a queued resource, and wait for it
#   --slices=N          with --type and --queue: N slices, as NAME-0 to NAME-(N-1)
#   --spot              with --type: cheaper, and may be taken away
#   --runtime=VERSION   with --type: the TPU VM's software; default: that of the type
#   --restarts=N        how often to start again after a failure, such as a lost worker; default 0
#   --no_install        the workers have this commit installed
#   --follow            make and start nothing, only follow the run that is there
#   --stop              send SIGTERM to the run on every worker: it saves and leaves
#   --dry_run           print the commands, quoted for a shell, and run none
#   --help              print this
#
# Exit codes: that of the run on worker 0; 2 for bad usage, and 1 where the workers fail it.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=tools/command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

REMOTE="mathv2_jax" # the checkout in a worker's home
BUNDLE="mathv2_jax.bundle"
name="" zone="" project="" type="" slices=1 runtime="" restarts=0
queue=false spot=false install=true start=true stop=false dry_run=false
command=()

while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --queue) queue=true ;;
    --spot) spot=true ;;
    --no_install) install=false ;;
    --follow) start=false install=false ;;
    --stop) stop=true ;;
    --dry_run) dry_run=true ;;
    --help | -h)
      usage
      exit
      ;;
    --)
      shift
      command=("$@")
      break
      ;;
    *) bad_usage "$1 is none of the options that --help lists; the command stands after --" ;;
  esac
  shift
done

[[ -n "$name" && -n "$zone" ]] || bad_usage "--name=NAME and --zone=ZONE must be given"
[[ "$slices" =~ ^[1-9][0-9]*$ ]] || bad_usage "--slices=$slices: give a positive number"
[[ "$restarts" =~ ^[0-9]+$ ]] || bad_usage "--restarts=$restarts: give a number"
if ((${#command[@]} == 0)) && $start && ! $stop; then
  bad_usage "no command: give it after --, such as -- mathv2-train --config=FILE --workdir=gs://BUCKET/RUN"
fi
$start || ((restarts == 0)) || bad_usage "--restarts=$restarts with --follow: what only follows starts nothing"
((slices == 1)) || $queue || bad_usage "--slices=$slices needs --queue: slices come as one queued resource"

where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# Runs a command, or prints it.
run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Runs a shell line on every worker of every slice at once; fails where one of them does.
everywhere() {
  local node failed=0 jobs=()
  for node in "${nodes[@]}"; do
    if $dry_run; then
      run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1"
    else
      gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" </dev/null &
      jobs+=($!)
    fi
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return "$failed"
}

# Prints the TPU VM software for an accelerator type, as cloud.google.com/tpu/docs/runtimes has it.
runtime_for() {
  case "$1" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) bad_usage "--type=$1: its software is not known here; name it with --runtime=VERSION" ;;
  esac
}

create() {
  [[ -n "$runtime" ]] || runtime="$(runtime_for "$type")"
  local options=("--accelerator-type=$type" "--runtime-version=$runtime")
  ! $spot || options+=(--spot)
  if $queue; then
    if ((slices > 1)); then
      options+=("--node-count=$slices" "--node-prefix=$name")
    else
      options+=("--node-id=$name")
    fi
    if $dry_run || ! state >/dev/null 2>&1; then
      run gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
    fi
    wait_for_queue
  elif $dry_run || ! gcloud compute tpus tpu-vm describe "$name" "${where[@]}" >/dev/null 2>&1; then
    run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "${options[@]}"
  fi
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)"
}

wait_for_queue() {
  local found
  if $dry_run; then
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      --format="value(state.state)"
    return
  fi
  while true; do
    found="$(state)"
    case "$found" in
      ACTIVE) return ;;
      FAILED | SUSPENDED) die "the queued resource $name is $found; delete it to ask again" ;;
    esac
    say "the queued resource $name is $found; looking again in 30 s"
    sleep "${MATHV2_QUEUE_SECONDS:-30}"
  done
}

# Fails where a worker has a run, whose code and devices are not to be taken from it.
require_free() {
  everywhere "
    if [ -e $REMOTE/run.pid ] && kill -0 \$(cat $REMOTE/run.pid) 2>/dev/null; then
      echo 'a run is still there: follow it with --follow, or end it with --stop' >&2
      exit 1
    fi"
}

# Puts this commit on every worker, with its environment.
install() {
  local node bundle commit
  commit="$(git -C "$ROOT" rev-parse HEAD)"
  bundle="$(mktemp -d)/$BUNDLE"
  [[ -z "$(git -C "$ROOT" status --porcelain --untracked-files=no)" ]] ||
    say "note: uncommitted changes do not go to the workers"
  run git -C "$ROOT" bundle create --quiet "$bundle" HEAD
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$bundle" "$node:$BUNDLE" "${where[@]}" --worker=all
  done
  # The software of these TPU VMs is Ubuntu 22.04, whose own Python is 3.10.
  everywhere "set -e
    command -v python3.11 >/dev/null || {
      sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv
    }
    [ -d $REMOTE/.git ] || git clone -q $BUNDLE $REMOTE
    cd $REMOTE
    git fetch -q ../$BUNDLE HEAD
    git checkout -q $commit
    PYTHON=python3.11 bash -c 'source tools/environment.sh && make_environment tpu'"
}

# Starts the command on every worker, out of the connection's reach.
begin() {
  local line flags=":"
  line="trap : TERM; $(run_line "${command[@]}")" # it outlives what it is to note the end of
  if [[ -z "$type" ]]; then
    say "note: without --type=TYPE the flags for XLA (mathv2-compile --xla_flags) are not set"
  else
    flags="LIBTPU_INIT_ARGS=\"\$(mathv2-compile --topology=$type --xla_flags)\"
    export LIBTPU_INIT_ARGS"
  fi
  everywhere "set -e
    cd $REMOTE
    export PATH=\"\$PWD/.venv/bin:\$PATH\"
    rm -f run.code
    $flags
    nohup setsid bash -c $(printf '%q' "$line; echo \$? >run.code") >run.log 2>&1 </dev/null &
    echo \$! >run.pid"
}

# Shows what worker 0 says until its command ends, and returns that one's exit code.
follow() {
  run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command="
    cd $REMOTE
    tail -n +1 --pid=\$(cat run.pid) -s 1 -F run.log
    exit \$(cat run.code || echo 1)"
}

# Whether worker 0 can be asked, and says that its run has ended.
ended() {
  run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command="
    cd $REMOTE && { [ -e run.code ] || ! kill -0 \$(cat run.pid); }" 2>/dev/null
}

# As follow, again after a broken connection; a worker that stays out of reach is lost.
follow_to_its_end() {
  local code=0 tries
  for ((tries = 1; tries <= 10; tries++)); do
    code=0
    follow || code=$?
    if $dry_run || ended; then return "$code"; fi
    say "worker 0 has no end to its run, and the connection is gone; trying again"
    sleep "${MATHV2_RETRY_SECONDS:-15}"
  done
  return 255
}

# As begin; workers that are being made anew are waited for.
begin_again() {
  local tries
  for ((tries = 1; tries <= 20; tries++)); do
    everywhere "cd $REMOTE && kill -KILL -\$(cat run.pid) 2>/dev/null; true" && begin && return
    say "not every worker can be started; trying again"
    sleep "${MATHV2_RETRY_SECONDS:-15}"
  done
  die "the workers cannot be started"
}

if $stop; then
  everywhere "cd $REMOTE && kill -TERM -\$(cat run.pid)"
  exit
fi
[[ -z "$type" ]] || ! $start || create
! $start || require_free
! $install || install
! $start || begin
for ((attempt = 0; ; attempt++)); do
  code=0
  follow_to_its_end || code=$?
  # 2 is bad input, which stays bad; 75 was asked for.
  if ((code == 0 || code == 2 || code == 75 || attempt >= restarts)); then break; fi
  say "ended with code $code; starting again ($((attempt + 1)) of $restarts)"
  begin_again
done
exit "$code"
