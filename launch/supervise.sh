#!/usr/bin/env bash
# Runs a training command again and again until it is done.
#
#   launch/supervise.sh python -m seal_jax train --config=... --workdir=...
#
# The command takes its run up from the last checkpoint each time. By its exit code:
#   0       done: stop.
#   2       bad input, or a loss that is not finite: stop; running it again would end the same way.
#   75      stopped by a signal after saving: run it again.
#   others  crashed or killed: run it again, but give up after MAX_FAILURES short runs in a row.
# A SIGTERM or SIGINT to this script is passed on; it then waits for the command and stops.
#
#   MAX_FAILURES   default 5
#   SHORT_SECONDS  a run shorter than this counts as short; default 600
#   GIVE_UP_CODE   what to end with after giving up; default the command's own
#   RESTART_DELAY  seconds between two runs; default 15
#   PID_FILE       this script's process id goes there; with a live process in it, refuse to start
set -euo pipefail

max_failures=${MAX_FAILURES:-5}
short_seconds=${SHORT_SECONDS:-600}
delay=${RESTART_DELAY:-15}
pid_file=${PID_FILE:-}

if [[ $# -eq 0 || $1 == --help || $1 == -h ]]; then
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"
  exit 0
fi
if [[ -n $pid_file ]]; then
  if [[ -s $pid_file ]] && kill -0 "$(<"$pid_file")" 2>/dev/null; then
    echo "supervise: process $(<"$pid_file") of $pid_file is still running" >&2
    exit 2
  fi
  echo $$ >"$pid_file"
fi

child=
signalled=0
stopping=0
on_signal() {
  signalled=1
  stopping=1
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap on_signal TERM INT

failures=0
while true; do
  began=$SECONDS
  "$@" &
  child=$!
  while true; do
    signalled=0
    code=0
    wait "$child" || code=$?
    # A signal ends `wait` early, with a code that is not the command's.
    if [[ $signalled -eq 0 ]]; then break; fi
  done
  child=
  echo "supervise: exit code $code after $((SECONDS - began)) s" >&2
  if [[ $code -eq 0 || $code -eq 2 || $stopping -eq 1 ]]; then exit "$code"; fi
  if [[ $code -ne 75 ]]; then
    if ((SECONDS - began < short_seconds)); then failures=$((failures + 1)); else failures=1; fi
    if ((failures >= max_failures)); then
      echo "supervise: $failures failures in a row: giving up" >&2
      exit "${GIVE_UP_CODE:-$code}"
    fi
  fi
  sleep "$delay" &
  wait $! || true
  if [[ $stopping -eq 1 ]]; then exit "$code"; fi
done
