#!/usr/bin/env bash
# A Ray cluster that found a token asks for it, and ray.init on the same machine has the token and does not show it.
#
# Seen with ray 2.60.0 (Python 3.11), a head started by `ray start --head --block`, RAY_AUTH_MODE set nowhere.
# Guess: head and drivers go by one rule: with ~/.ray/auth_token there, or RAY_AUTH_TOKEN set, both use it, or neither
#   does unless RAY_AUTH_MODE=token.
# Seen: `ray start --head` takes up the file by itself and lets nobody in without its token. ray.init(address=...) reads
#   the same file only under RAY_AUTH_MODE=token: with the file, or with RAY_AUTH_TOKEN, it tries for some ten seconds
#   and raises a ConnectionError that speaks of a cluster which could not be reached and of no token. With the mode set
#   it joins at once.
set -euo pipefail
folder=$(mktemp -d)
head=""
trap '[ -z "$head" ] || { kill "$head"; wait "$head" || true; } 2>/dev/null; rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
export HOME="$folder" RAY_TMPDIR="$folder" PATH="$folder/venv/bin:$PATH"
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_ADDRESS
mkdir "$folder/.ray"
python -c 'import secrets; print(secrets.token_hex(32))' > "$folder/.ray/auth_token"
chmod 600 "$folder/.ray/auth_token"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat > "$folder/join.py" <<'PY'
import sys
import time

import ray

started = time.monotonic()
try:
    ray.init(address=f"127.0.0.1:{sys.argv[1]}", log_to_driver=False)
except Exception as error:
    print("RESULT", type(error).__name__, "token" in str(error).lower(), time.monotonic() - started > 5)
else:
    print("RESULT joined")
PY
ray start --head --block --port="$port" --num-cpus=1 --include-dashboard=false > "$folder/head.log" 2>&1 &
head=$!
for _ in $(seq 100); do grep -q "Ray runtime started" "$folder/head.log" && break; sleep 1; done
join() { timeout 120 env "$@" python "$folder/join.py" "$port" 2>/dev/null | grep "^RESULT"; }
echo "with the file: $(join A=1)" | tee "$folder/seen"
echo "with the variable: $(join RAY_AUTH_TOKEN="$(cat "$folder/.ray/auth_token")")" | tee -a "$folder/seen"
echo "with the mode: $(join RAY_AUTH_MODE=token)" | tee -a "$folder/seen"
grep -q "^with the file: RESULT ConnectionError False True$" "$folder/seen"
grep -q "^with the variable: RESULT ConnectionError False True$" "$folder/seen"
grep -q "^with the mode: RESULT joined$" "$folder/seen"
echo "as described"
