#!/bin/sh
# Installs Conch with everything that training uses, from the sources beside this folder, into /opt/conch/venv.
set -eu
here=$(dirname "$0")
. "$here/pip-settings.sh"
venv=/opt/conch/venv

if ! python3 -c 'import ensurepip' 2>/dev/null; then
    apt-get update
    apt-get install -y --no-install-recommends python3-venv python3-dev build-essential git
    rm -rf /var/lib/apt/lists/*
fi
python3 -m venv "$venv"
export DS_BUILD_OPS=0 # DeepSpeed builds the few operators that it uses at run time
"$venv/bin/pip" install --constraint "$here/constraints.txt" torch
"$venv/bin/pip" install --constraint "$here/constraints.txt" "$here/source[serve,deepspeed,tensorboard,wandb]"
"$venv/bin/python" -c 'import conch.api, deepspeed, torch; print("torch", torch.__version__)'
