# shellcheck shell=bash
# Sourced by the launchers, after environment.sh: their help, their usage errors, and the run's line.

# Prints the script's own header, up to its first line that is no comment.
usage() { sed -n '2,/^[^#]/ { /^#/ s/^# \{0,1\}//p; }' "$0"; }

# A mistake of whoever calls: one line, exit code 2. `die` is for what fails later.
bad_usage() {
  say "error: $*"
  exit 2
}

# Prints a command quoted for a shell. One of mathv2-train finds its cluster by itself, unless it
# says how it is to meet the others.
run_line() {
  local word last="" trains=false meets=false
  for word in "$@"; do
    case "$word" in
      mathv2-train | */mathv2-train) trains=true ;;
      mathv2_jax.cli.train) [[ "$last" != -m ]] || trains=true ;;
      --coordinator=* | --coordinator) meets=true ;;
    esac
    last="$word"
  done
  printf '%q ' "$@"
  ! $trains || $meets || printf -- --coordinator=auto
}
