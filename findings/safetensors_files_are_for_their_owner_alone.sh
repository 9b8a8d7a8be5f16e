#!/usr/bin/env bash
# A model that was saved as safetensors cannot be read by another user, who is told that it is not there.
#
# Seen with safetensors 0.8.0, numpy 2.2.6, x86-64 Linux.
# Guess: `save_file` makes a file as `open` does, by the umask: rw-r--r-- under the usual 022, as `config.json` beside it.
#   A user who may not read it gets a PermissionError.
# Seen: the file is rw------- whatever the umask says, so a container or a server that runs as another user than who
#   trained finds every file of a model readable but this one; and `load_file` tells that user FileNotFoundError, "No
#   such file or directory", of a file that `ls` shows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.2.6
chmod 755 "$folder"
"$folder/venv/bin/python" - "$folder" <<'PY'
import os
import stat
import sys

import numpy
from safetensors.numpy import load_file, save_file

os.umask(0o022)
folder = sys.argv[1]
plain, tensors = f"{folder}/config.json", f"{folder}/model.safetensors"
with open(plain, "w") as file:
    file.write("{}")
save_file({"a": numpy.zeros(2)}, tensors)
modes = [stat.filemode(os.stat(path).st_mode) for path in (plain, tensors)]
if os.geteuid() == 0:
    os.seteuid(65534)  # nothing is closed to root
else:
    os.chmod(tensors, 0)
told = []
for read in (lambda: open(tensors, "rb"), lambda: load_file(tensors)):
    try:
        read()
    except OSError as error:
        told.append(type(error).__name__)
seen = (modes, told, os.path.exists(tensors))
print(*seen)
expected = (["-rw-r--r--", "-rw-------"], ["PermissionError", "FileNotFoundError"], True)
sys.exit("the behaviour has changed" if seen != expected else 0)
PY
