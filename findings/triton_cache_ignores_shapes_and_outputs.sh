#!/usr/bin/env bash
# Triton's response cache gives two prompts the reward of one, and ignores which outputs and parameters a request has.
#
# Seen with the tritonserver of nvidia-pytriton 0.7.0 (server 2.51.0), tritonclient 2.73.0 (Linux x86-64, Python 3.11).
# Guess: with `response_cache { enable: true }` a request gets a stored answer only if it is the same request: the same
#   inputs, of the same shape, the same outputs asked for, the same parameters; or such requests are not cached.
# Seen: only the names and bytes of the inputs count. After [[1, 2, 3, 4, 5, 6]] the two prompts [[1, 2, 3], [4, 5, 6]]
#   get its single reward of 21, of shape [1, 1], and so do three prompts of two ids. Who asks for `reward` and
#   `members` after somebody asked for `reward` alone gets `reward` alone. And a request with the parameter `scale` 3,
#   or without it, gets what `scale` 2 gave. The model is not run for them, and nobody gets an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==1.26.4 nvidia-pytriton==0.7.0 "tritonclient[http]==2.73.0"
mkdir -p "$folder/models/rm/1" "$folder/backends/python"
cat > "$folder/models/rm/config.pbtxt" <<'TEXT'
backend: "python"
max_batch_size: 8
input [{ name: "ids" data_type: TYPE_INT64 dims: [-1] }]
output [
  { name: "reward" data_type: TYPE_FP32 dims: [1] },
  { name: "members" data_type: TYPE_FP32 dims: [2] },
  { name: "calls" data_type: TYPE_INT32 dims: [1] }
]
instance_group [{ kind: KIND_CPU count: 1 }]
response_cache { enable: true }
TEXT
cat > "$folder/models/rm/1/model.py" <<'PY'
import json

import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    """The reward of a prompt is the sum of its ids, times the parameter `scale`."""

    def initialize(self, args):
        self.calls = 0

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        self.calls += 1
        scale = float(json.loads(request.parameters() or "{}").get("scale", 1))
        ids = triton.get_input_tensor_by_name(request, "ids").as_numpy()
        reward = np.float32(scale) * ids.astype(np.float32).sum(axis=1, keepdims=True)
        outputs = {"reward": reward, "members": reward.repeat(2, axis=1)}
        outputs["calls"] = np.full((len(ids), 1), self.calls, dtype=np.int32)
        asked = [triton.Tensor(name, outputs[name]) for name in request.requested_output_names()]
        return triton.InferenceResponse(asked)
PY
cat > "$folder/check.py" <<'PY'
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytriton
import tritonclient.http as triton

folder, package = Path(sys.argv[1]), Path(pytriton.__file__).parent
files = package / "tritonserver"
version = f"{sys.version_info.major}.{sys.version_info.minor}"
stub = files / "python_backend_stubs" / version / "triton_python_backend_stub"
for part in (*(files / "backends" / "python").glob("*.*"), stub):
    if part.is_file():
        shutil.copy(part, folder / "backends" / "python")
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
libraries = [sysconfig.get_config_var("LIBDIR"), str(package.parent / "nvidia_pytriton.libs")]
environment = os.environ | {
    "LD_LIBRARY_PATH": ":".join(libraries),
    "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
}
options = {
    "model-repository": folder / "models",
    "backend-directory": folder / "backends",
    "cache-directory": files / "caches",
    "cache-config": "local,size=1048576",
    "http-address": "127.0.0.1",
    "http-port": port,
    "allow-grpc": 0,
    "allow-metrics": 0,
}
command = [files / "bin" / "tritonserver", *(f"--{name}={value}" for name, value in options.items())]
client = triton.InferenceServerClient(f"127.0.0.1:{port}")


def wait_until_ready(server):
    for _ in range(300):
        try:
            if client.is_model_ready("rm"):
                return
        except Exception:
            pass
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit((folder / "log").read_text())


def ask(ids, outputs=None, **parameters):
    """What the server answers: each output's name and values."""
    tensor = triton.InferInput("ids", np.shape(ids), "INT64")
    tensor.set_data_from_numpy(np.asarray(ids, dtype=np.int64))
    wanted = [triton.InferRequestedOutput(name) for name in outputs or ("reward", "calls")]
    result = client.infer("rm", [tensor], outputs=wanted, parameters=parameters or None)
    answer = {output["name"]: result.as_numpy(output["name"]).tolist() for output in result.get_response()["outputs"]}
    print(ids, outputs or "", parameters or "", "->", answer)
    return answer


with open(folder / "log", "w") as log:
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
try:
    wait_until_ready(server)
    print("tritonserver", client.get_server_metadata()["version"])
    alone = ask([[1, 2, 3], [4, 5, 7]])
    assert alone["reward"] == [[6.0], [16.0]], alone
    one = ask([[1, 2, 3, 4, 5, 6]])
    assert one == {"reward": [[21.0]], "calls": [[2]]}, one
    assert ask([[1, 2, 3], [4, 5, 6]]) == one
    assert ask([[1, 2], [3, 4], [5, 6]]) == one
    assert ask([[7, 8]], ["reward"]) == {"reward": [[15.0]]}
    assert ask([[7, 8]], ["reward", "members"]) == {"reward": [[15.0]]}
    twice = ask([[9]], scale="2")
    assert twice == {"reward": [[18.0]], "calls": [[4]]}, twice
    assert ask([[9]], scale="3") == twice and ask([[9]]) == twice
    statistics = client.get_inference_statistics("rm")["model_stats"][0]["inference_stats"]
    hits, misses = (statistics[name]["count"] for name in ("cache_hit", "cache_miss"))
    print(f"{hits} answers out of the cache, {misses} of the model")
    assert (hits, misses) == (5, 4) and statistics["fail"]["count"] == 0
    print("as stated")
finally:
    server.kill()
    server.wait()
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/check.py" "$folder"
