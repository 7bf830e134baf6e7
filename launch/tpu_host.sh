#!/usr/bin/env bash
# Run as root by every host of a TPU slice when it boots. `tpu.py` puts the values of the job before this line:
# name, zone, project, folder, data and the array words.
# shellcheck disable=SC2154

set -uo pipefail # without -e: what is at the end is done whatever happened before
home=${SEAL_HOME:-/opt/seal_jax}
mkdir -p "$home/data" "$home/code" && cd "$home" || exit 1
rm -f pid stop taken # of an earlier boot; what is written from here on counts
exec >>run.log 2>&1
export HOME=${HOME:-/root} # a script that runs at boot has none

attribute() {
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
worker=$(attribute agent-worker-number)
slice=$(attribute tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p")

# A machine that is taken away runs tpu_shutdown.sh, which leaves the file "taken", and sends SIGTERM to all
# processes: the training saves, and this waits for it.
signalled=0
taken=0
trap 'signalled=1 taken=1' TERM

prepare() {
  # The hosts' own Python may be older than 3.11: uv brings one along.
  gcloud storage cp "$folder/code.tar.gz" . && tar -xzf code.tar.gz -C code &&
    curl -LsSf https://astral.sh/uv/install.sh | sh &&
    "$HOME/.local/bin/uv" venv --quiet --allow-existing --python=3.12 venv &&
    "$HOME/.local/bin/uv" pip install --quiet --python=venv/bin/python "./code[tpu,gcs]" || return
  # Records are read from the local disk: array_record does not read from buckets.
  if [[ -n $data ]]; then gcloud storage cp --recursive "$data" data/ || return; fi
}

code=1
if prepare; then
  if [[ -n $data ]]; then export TFDS_DATA_DIR=$home/data; fi
  # A new slice need not compile again.
  export JAX_COMPILATION_CACHE_DIR=$folder/xla
  code=75
  if [[ ! -e stop ]]; then
    (cd code && exec launch/supervise.sh ../venv/bin/python -m seal_jax "${words[@]}") &
    echo $! >pid
    # One that came before there was a pid has signalled nobody.
    if [[ -e stop ]]; then kill -TERM $!; fi
    while true; do
      signalled=0
      wait $!
      code=$?
      # A signal ends `wait` early, with a code that is not the command's.
      if [[ $signalled -eq 0 ]]; then break; fi
    done
    rm -f pid
  fi
fi

if [[ -e taken ]]; then taken=1; fi
gcloud storage cp run.log "$folder/log-slice${slice:-0}-worker${worker:-0}.txt"
# Ended, but not by itself or by `stop`: the machine is being taken away, and another one goes on.
if [[ ($taken -eq 1 || $code -eq 75) && ! -e stop ]]; then exit "$code"; fi
if [[ ${slice:-0} == 0 && ${worker:-0} == 0 ]]; then
  echo "$code" | gcloud storage cp - "$folder/state"
  gcloud compute tpus queued-resources delete "$name" --zone="$zone" ${project:+--project="$project"} \
    --force --quiet --async ||
    echo "the machines could not be given back: python -m launch tpu delete $name --zone=$zone"
fi
exit "$code"
