#!/usr/bin/env bash
# Trains on Cloud TPU: asks for a slice by queued resources, installs on its hosts, runs in the background.
#
#   launch/tpu_vm.sh [--dry-run] STEP [-- ARGUMENTS OF THE TRAINING]
#
#   create    ask for the slice
#   wait      until it is there
#   install   copy the committed code to every host and install it; mount BUCKET
#   run       start the training on every host; it is run again when a signal or a crash ends it
#   up        create, wait, install and run
#   watch     look once a minute, until you end it; after a preemption delete the slice and do `up`
#   status    the state of the request
#   logs      the end of the first host's log
#   stop      let the training save and stop
#   delete    give the slice back
#
# --dry-run prints the commands and runs none. Settings, by environment variables:
#   NAME         of the request and the slice; default seal
#   PROJECT      default: gcloud's
#   ZONE         default us-west4-a
#   ACCELERATOR  v5litepod-8 (default; one host), v5litepod-16 (four hosts), v6e-8 (one host), ...
#   RUNTIME      the TPU software version; default by ACCELERATOR
#   SPOT         1 (default) for a spot slice, 0 for on-demand
#   COMMAND      train (default) or sweep
#   CONFIG       default configs/seal_tiny_imagenet.py:seal_paper
#   BUCKET       a Cloud Storage bucket, mounted at MOUNT on every host; empty for none
#   MOUNT        default /mnt/seal
#   WORKDIR      the run folder; default $MOUNT/runs/$NAME; must be given without a BUCKET
#   DATA_DIR     TFDS_DATA_DIR on the hosts; default $MOUNT/tfds with a BUCKET, else TFDS's own
#
# WORKDIR must be a folder in the file system: a mounted bucket, Filestore or a disk, not gs://. It must
# outlive a preempted slice, so not the hosts' own disk; with several hosts all must see the same.
# Make the bucket with hierarchical namespace, where renaming a folder is one operation: a checkpoint
# counts from the moment its folder is renamed.
#
# For a spot slice set run.steps_per_call so that a call takes seconds: a signal is answered between
# calls. Example, four seeds on eight chips:
#   BUCKET=my-bucket launch/tpu_vm.sh up -- --config.train.seeds=4 --config.run.steps_per_call=76
set -euo pipefail

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
fail() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

dry=
step=
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry=1 ;;
    --) shift && break ;;
    -*) fail "$1 is not an option; see --help" ;;
    *) [[ -z $step ]] || fail "$1: one step at a time; the training's arguments go after --" && step=$1 ;;
  esac
  shift
done
arguments=("$@")

name=${NAME:-seal}
zone=${ZONE:-us-west4-a}
accelerator=${ACCELERATOR:-v5litepod-8}
case $accelerator in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime= ;;
esac
runtime=${RUNTIME:-$runtime}
[[ -n $runtime ]] || fail "RUNTIME must be given for ACCELERATOR=$accelerator"
spot=${SPOT:-1}
command=${COMMAND:-train}
config=${CONFIG:-configs/seal_tiny_imagenet.py:seal_paper}
bucket=${BUCKET:-}
bucket=${bucket#gs://}
mount=${MOUNT:-/mnt/seal}
workdir=${WORKDIR:-$mount/runs/$name}
data_dir=${DATA_DIR:-}
if [[ -z $data_dir && -n $bucket ]]; then data_dir=$mount/tfds; fi
case $workdir in
  *://*) fail "WORKDIR=$workdir must be a folder: mount the bucket (BUCKET=...)" ;;
  /*) ;;
  *) fail "WORKDIR=$workdir must be an absolute path on the hosts" ;;
esac
case $command in
  train | sweep) ;;
  *) fail "COMMAND=$command must be train or sweep" ;;
esac

case $step in
  run | up | watch)
    [[ -n $bucket || -n ${WORKDIR:-} ]] || fail "give BUCKET, or a WORKDIR that outlives the slice"
    ;;
esac

place=(--zone="$zone")
if [[ -n ${PROJECT:-} ]]; then place+=(--project="$PROJECT"); fi

run() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_hosts() { # WORKER SCRIPT
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}
state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'
}

create() {
  local tier=()
  if [[ $spot == 1 ]]; then tier=(--spot); fi
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" "${tier[@]}"
}

wait_for_slice() {
  if [[ -n $dry ]]; then
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format='value(state.state)'
    return
  fi
  local now before=
  while true; do
    now=$(state)
    if [[ $now != "$before" ]]; then echo "$name: $now"; fi
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) fail "the request is $now: see \`$0 status\`" ;;
    esac
    sleep 30
  done
}

install() {
  local archive=/tmp/seal_jax.$$.tar.gz
  run git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:seal_jax.tar.gz" "${place[@]}" --worker=all
  run rm -f "$archive"
  # The hosts' own Python may be older than 3.11: uv brings one along.
  # shellcheck disable=SC2016  # $HOME is the host's
  on_hosts all 'set -e
rm -rf ~/seal_jax && mkdir -p ~/seal_jax ~/seal_logs && tar -xzf ~/seal_jax.tar.gz -C ~/seal_jax
python3 -m pip install --quiet --user uv
~/.local/bin/uv venv --allow-existing --python=3.12 ~/seal_venv
cd ~/seal_jax && ~/.local/bin/uv pip install --python="$HOME/seal_venv/bin/python" ".[tpu]"'
  if [[ -z $bucket ]]; then return; fi
  # No metadata cache: every host must see at once what the others wrote.
  on_hosts all "set -e
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq && sudo apt-get install -y -qq gcsfuse
fi
if ! mountpoint -q $(printf %q "$mount"); then
  sudo mkdir -p $(printf %q "$mount") && sudo chown \"\$(id -u):\$(id -g)\" $(printf %q "$mount")
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 \
    $(printf %q "$bucket") $(printf %q "$mount")
fi"
}

start() {
  local words=(-m seal_jax "$command" --config="$config" --workdir="$workdir" --coordinator=auto)
  local line data=
  line=$(printf '%q ' "${words[@]}" "${arguments[@]}")
  if [[ -n $data_dir ]]; then data="export TFDS_DATA_DIR=$(printf %q "$data_dir")"; fi
  on_hosts all "cd ~/seal_jax && $data
export PID_FILE=\$HOME/seal_logs/pid
nohup bash launch/supervise.sh ~/seal_venv/bin/python $line>>~/seal_logs/run.log 2>&1 </dev/null &"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

# No &&: it would switch off `set -e` inside the functions.
up() {
  create
  wait_for_slice
  install
  start
}

watch() {
  if [[ -n $dry ]]; then
    echo "# once a minute; after SUSPENDED:"
    delete
    up
    return
  fi
  while true; do
    case $(state) in
      SUSPENDED)
        echo "$(date): preempted; asking for another slice"
        delete
        up
        ;;
      FAILED) fail "the request has failed: see \`$0 status\`" ;;
    esac
    sleep 60
  done
}

case $step in
  create) create ;;
  wait) wait_for_slice ;;
  install) install ;;
  run) start ;;
  up) up ;;
  watch) watch ;;
  status) run gcloud compute tpus queued-resources describe "$name" "${place[@]}" ;;
  logs) on_hosts 0 'tail -n 50 ~/seal_logs/run.log' ;;
  # supervise.sh passes the signal on, waits for the checkpoint and does not start again.
  stop) on_hosts all "kill -TERM \"\$(cat ~/seal_logs/pid)\"" ;;
  delete) delete ;;
  '') usage && exit 2 ;;
  *) fail "$step is not a step; see --help" ;;
esac
