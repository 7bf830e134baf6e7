#!/usr/bin/env bash
# Run as root by every host of a TPU slice when the machine is taken away, before its services end: the training
# is told at once, and has until the machine is gone to save.

home=${SEAL_HOME:-/opt/seal_jax}
touch "$home/taken"
if [[ -e $home/pid ]] && pid=$(<"$home/pid") && kill -TERM "$pid" 2>/dev/null; then
  while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
fi
exit 0
