#!/usr/bin/env bash
# Starts one command on every worker of TPU slices in a GKE cluster, through XPK (pip install xpk):
#
#   bash tools/launch_gke.sh --cluster=CLUSTER --workload=NAME --type=v5p-2048 [options] -- \
#     mathv2-train --config=configs/FILE.py --workdir=gs://BUCKET/RUN
#
# XPK puts this folder into an image over a plain Python one; each worker makes its environment at
# its start. A worker that is lost restarts its slice --restarts times, and the run goes on.
#
#   --zone=ZONE --project=PROJECT     of the cluster; default: gcloud's own
#   --slices=N                        default 1
#   --restarts=N                      default 10
#   --grace=SECONDS                   between a node's notice and its end; default 600
#   --image=IMAGE                     default python:3.12
#   --dry_run                         print the command, quoted for a shell
#   --help                            print this
#
# Exit codes: that of xpk; 2 for bad usage.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=tools/command_line.sh
source "$(dirname "${BASH_SOURCE[0]}")/command_line.sh"

cluster="" workload="" type="" slices=1 restarts=10 image="python:3.12" dry_run=false
CODES="1,75" # a process that lost another, and one that was asked to stop as its node was drained
grace=600    # a step, and a save after it
options=() command=()
while (($#)); do
  case "$1" in
    --cluster=*) cluster="${1#*=}" ;;
    --workload=*) workload="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --grace=*) grace="${1#*=}" ;;
    --zone=* | --project=*) options+=("$1") ;;
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
[[ -n "$cluster" && -n "$workload" && -n "$type" ]] ||
  bad_usage "--cluster=CLUSTER, --workload=NAME and --type=TYPE must be given"
((${#command[@]})) ||
  bad_usage "no command: give it after --, such as -- mathv2-train --config=FILE --workdir=gs://BUCKET/RUN"

line="$(run_line "${command[@]}")"
inside="bash -c 'source tools/environment.sh && make_environment tpu' && "
inside+="export PATH=\"\$PWD/.venv/bin:\$PATH\" && "
inside+="LIBTPU_INIT_ARGS=\"\$(mathv2-compile --topology=$type --xla_flags)\" && "
inside+="export LIBTPU_INIT_ARGS && exec $line"
whole=(xpk workload create "--cluster=$cluster" "--workload=$workload" "--tpu-type=$type"
  "--num-slices=$slices" "--max-restarts=$restarts" "--restart-on-exit-codes=$CODES"
  "--termination-grace-period-seconds=$grace" "--base-docker-image=$image"
  "--script-dir=$ROOT" "${options[@]}" "--command=$inside")
if $dry_run; then
  printf '%q ' "${whole[@]}"
  echo
else
  exec "${whole[@]}"
fi
