#!/bin/sh
# Makes NVIDIA's Triton image able to run converted models: adds their packages to the Python of its python back end.
set -eu
here=$(dirname "$0")
. "$here/pip-settings.sh"

export PIP_BREAK_SYSTEM_PACKAGES=1 # the image is the environment; its python back end runs this very Python
if ! python3 -m pip --version >/dev/null 2>&1; then
    apt-get update
    apt-get install -y --no-install-recommends python3-pip
    rm -rf /var/lib/apt/lists/*
fi
python3 -m pip install --constraint "$here/constraints.txt" --requirement "$here/model-requirements.txt"
sh "$here/check-server.sh"
