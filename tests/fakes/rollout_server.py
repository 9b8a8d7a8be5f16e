"""A rollout server without a model, on a real socket: every completion is the prompt's ids and the seed.

What it says is `conch.rollouts.protocol`, written down here once more in plain JSON.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeRolloutServer:
    """Answers on `address`. events: what it was asked, in order: `weights 3`, `generate 3`, `refused 3`;
    of adapters `base 3` and `adapter 3`.

    lora: adapters that it takes, a `LoraCapacity` in plain JSON.
    before_look: called before it tells its health.
    before_line: called before each completion is sent, with its number since the start; an exception breaks
        the connection off.
    says_version: version of the policy in each completion; None tells the truth.
    requests: bodies of what it was asked to sample.
    secret: what every request must bring; "" asks for none.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        max_model_len: int = 64,
        max_num_seqs: int = 8,
        lora: dict[str, Any] | None = None,
        secret: str = "",
        before_look: Callable[[], object] = lambda: None,
    ) -> None:
        self.events: list[str] = []
        self.secret = secret
        self.weights: dict[str, Any] | None = None
        self.base: str | None = None
        self.files: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.is_stopped = False
        self.before_look = before_look
        self.before_line: Callable[[int], None] = lambda _number: None
        self.says_version: int | None = None
        self.weights_answer: tuple[int, Any] | None = None
        self.lines = 0
        self.looks = 0
        self.most_rows = 0
        self._rows = 0
        self._health: dict[str, Any] = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "workers": 1,
            "device": "cpu",
        }
        self._health["lora"] = lora
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.address = f"127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Nobody answers any more; a connection in use is broken off by an exception of `before_line`."""
        self.is_stopped = True
        self._http.shutdown()
        self._http.server_close()

    def refusal(self, authorization: str | None) -> tuple[int, Any] | None:
        """What a request without the secret is answered."""
        if not self.secret or authorization == f"Bearer {self.secret}":
            return None
        self.events.append("stranger")
        return 401, {"detail": "the server refuses the secret"}

    def health(self) -> dict[str, Any]:
        return {"weights": self.weights, "base": self.base, **self._health}

    def take_weights(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.weights_answer is not None:
            return self.weights_answer
        weights, part = body["weights"], body["part"]
        if part == "adapter" and self.base != weights["source"]:
            return 409, {"detail": "its base is not here"}
        if part != "adapter":
            self.base = weights["source"] if part == "base" else None
        self.weights = None if part == "base" else weights
        self.events.append(f"{'weights' if part == 'whole' else part} {weights['version']}")
        self.files.append(body["path"])
        return 200, self.health()

    def lines_for(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        version = self.says_version if self.says_version is not None else body["weights"]["version"]
        return [
            {
                "prompt_index": prompt_index,
                "seed_index": seed_index,
                "token_ids": [*prompt["token_ids"], seed % 1000],
                "logprobs": [-0.5] * (len(prompt["token_ids"]) + 1),
                "text": "x",
                "finish_reason": "length",
                "version": version,
            }
            for prompt_index, prompt in enumerate(body["prompts"])
            for seed_index, seed in enumerate(prompt["seeds"])
        ]

    def holds(self, body: dict[str, Any]) -> bool:
        """Whether it can sample what is requested; waits for weights that may come later."""
        wanted, or_later = body["weights"], body.get("or_later", False)
        while or_later and not self.is_stopped:
            weights = self.weights
            if weights is not None and weights["source"] != wanted["source"]:
                return False
            if weights is not None and weights["version"] >= wanted["version"]:
                return True
            time.sleep(0.002)
        return wanted == self.weights

    def sending(self, rows: int) -> None:
        with self._lock:
            self._rows += rows
            self.most_rows = max(self.most_rows, self._rows)

    def next_line(self) -> int:
        with self._lock:
            self.lines += 1
            return self.lines


def _handler(server: FakeRolloutServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.looks += 1
            server.before_look()
            self._reply(*server.refusal(self.headers["authorization"]) or (200, server.health()))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            refusal = server.refusal(self.headers["authorization"])
            if refusal or self.path == "/weights":
                self._reply(*refusal or server.take_weights(body))
                return
            version = body["weights"]["version"]
            server.requests.append(body)
            if not server.holds(body):
                server.events.append(f"refused {version}")
                self._reply(409, {"detail": f"version {version} is not here"})
                return
            server.events.append(f"generate {version}")
            self._stream(server.lines_for(body), is_newest=body.get("or_later", False))

        def _stream(self, lines: list[dict[str, Any]], *, is_newest: bool) -> None:
            self.send_response(200)
            self.end_headers()
            server.sending(len(lines))
            try:
                for line in lines:
                    server.before_line(server.next_line())
                    if is_newest and server.says_version is None and server.weights is not None:
                        line["version"] = server.weights["version"]
                    self.wfile.write(json.dumps(line).encode() + b"\n")
                    self.wfile.flush()
            except ConnectionError:
                self.close_connection = True
            finally:
                server.sending(-len(lines))

        def _reply(self, status: int, content: Any) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    return Handler
