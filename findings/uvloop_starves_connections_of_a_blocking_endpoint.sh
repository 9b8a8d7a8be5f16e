#!/usr/bin/env bash
# Under uvloop an endpoint that computes in the event loop answers its first connections at once and the last ones never.
#
# Seen with uvicorn 0.54.0, fastapi 0.165.0, uvloop 0.23.0 (Python 3.11): `async def` endpoint that takes 20 ms, 48 callers
#   with a connection each that stays open, 8 requests one after the other.
# Guess: the server answers in turn, so that each request waits for about 47 others, 1 s, and the slowest little more;
#   uvloop is the same, a little faster.
# Seen: by asyncio's loop so, median 1.08 s and p99 1.13 s. By uvloop, which uvicorn takes by itself where it is installed
#   (`uvicorn[standard]`), median 0.16 s and p99 7.6 s of a total of 9 s: the first request of half of the callers waits 3.9 s.
#   The total is the same. uvloop takes in one new connection for each turn of its loop and answers all that it has in
#   that turn, so the more callers it has the longer the next one waits; asyncio takes all that knock at once.
#   A median of such a server says how long the lucky ones wait: benchmarks that compare medians favour it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvicorn==0.54.0 fastapi==0.165.0 uvloop==0.23.0 httptools==0.9.0
cat > "$folder/server.py" <<'PY'
import sys
import time

import uvicorn
from fastapi import FastAPI

app = FastAPI()


@app.post("/score")
async def score(body: dict) -> dict:
    time.sleep(0.02)  # a model's forward pass, where many write it
    return {"rewards": [1.0]}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), loop=sys.argv[1], log_level="warning")
PY
cat > "$folder/ask.py" <<'PY'
import http.client
import socket
import subprocess
import sys
import threading
import time

CALLERS, REQUESTS = 48, 8


def waits(loop):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, sys.argv[1], loop, str(port)])
    seconds, together = [], threading.Barrier(CALLERS)

    def call():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        together.wait()
        for _ in range(REQUESTS):
            started = time.perf_counter()
            connection.request("POST", "/score", b"{}", {"content-type": "application/json"})
            connection.getresponse().read()
            seconds.append(time.perf_counter() - started)

    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        callers = [threading.Thread(target=call) for _ in range(CALLERS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        server.terminate()
        server.wait()
    seconds.sort()
    return seconds[len(seconds) // 2], seconds[int(0.99 * len(seconds))]


for loop in ("asyncio", "uvloop"):
    median, slow = waits(loop)
    print(f"{loop}: median {median:.2f} s, p99 {slow:.2f} s")
    assert (slow < 2 * median) == (loop == "asyncio") and (slow > 10 * median) == (loop == "uvloop")
PY
"$folder/venv/bin/python" "$folder/ask.py" "$folder/server.py"
echo "as stated"
