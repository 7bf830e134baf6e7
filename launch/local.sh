#!/usr/bin/env bash
# Installs the project into a virtual environment and runs it: on this machine, CPU or GPU.
#
#   launch/local.sh sweep --config=configs/quickstart.py --workdir=runs/quickstart
#   EXTRA=cuda launch/local.sh train --config=configs/seal_fashion_mnist.py:seal --workdir=runs/seal
#
# The arguments are those of `python -m seal_jax`; paths are relative to the repository. The exit code
# is the command's: 75 means that a signal stopped it after it had saved a checkpoint, and the same
# command goes on from there. This script does not repeat it; launch/supervise.sh does:
#
#   launch/supervise.sh launch/local.sh train --config=... --workdir=...
#
#   PYTHON  the interpreter that makes the environment, 3.11 or newer; default python3
#   VENV    the environment; default .venv
#   EXTRA   what to install: train, cuda or tpu; default train
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
extra=${EXTRA:-train}

if [[ $# -eq 0 ]]; then
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "launch/local.sh"
  exit 0
fi
if [[ ! -x $venv/bin/python ]]; then
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "local.sh: PYTHON=$python is older than Python 3.11" >&2
    exit 2
  fi
  "$python" -m venv "$venv"
fi
# Installed once for each set of requirements; the code itself is used where it lies.
wanted="$extra $(cksum <pyproject.toml)"
if [[ $(cat "$venv/.seal_jax" 2>/dev/null || true) != "$wanted" ]]; then
  "$venv/bin/python" -m pip install --quiet --editable ".[$extra]"
  echo "$wanted" >"$venv/.seal_jax"
fi
# exec: a signal to this script reaches the training itself.
exec "$venv/bin/python" -m seal_jax "$@"
