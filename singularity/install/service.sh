#!/bin/sh
# Installs Conch with what the training service uses, from the sources beside this folder, into /opt/conch/venv. Training
# is in one process: no DeepSpeed, no compiler.
set -eu
here=$(dirname "$0")
. "$here/pip-settings.sh"
venv=/opt/conch/venv

python3 -m venv "$venv"
"$venv/bin/pip" install --constraint "$here/constraints.txt" torch
"$venv/bin/pip" install --constraint "$here/constraints.txt" "$here/source[service]"
# What does not start shows here, not in the first run.
CONCH_SERVICE_KEY=key "$venv/bin/python" -c 'import conch.service.app, conch.service.server, conch.service.runs.trainer'
"$venv/bin/python" -m conch.service --help >/dev/null
