"""The Hugging Face hub as far as `datasets` asks it: one public dataset of a few files, on a real socket."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40


@contextmanager
def fake_hub(name: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serves the dataset `name`; gives the address for HF_ENDPOINT."""

    class Handler(_Handler):
        dataset = name
        contents = files

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    dataset = ""
    contents: Mapping[str, bytes] = {}

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        file = path.partition("/resolve/")[2].partition("/")[2]
        if f"/datasets/{self.dataset}/" not in f"{path}/":
            self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        elif file in self.contents:
            content = self.contents[file]
            tag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            self._send(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        elif file or ("/tree/" in path and not self._tree(path)):
            self._send(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(json.dumps(self._tree(path) if "/tree/" in path else self._info()).encode(), 200, {})

    do_HEAD = do_GET  # noqa: N815

    def _tree(self, path: str) -> list[dict[str, Any]]:
        """What stands directly in the folder that `.../tree/<commit>/<folder>` names."""
        parent = path.partition("/tree/")[2].partition("/")[2]
        sizes = {name: len(content) for name, content in self.contents.items()}
        folders = {name.rpartition("/")[0] for name in sizes} - {""}
        made = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()]
        made += [{"type": "directory", "path": name, "oid": "0"} for name in folders]
        return [entry for entry in made if str(entry["path"]).rpartition("/")[0] == parent]

    def _info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in self.contents]
        return {"id": self.dataset, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}

    def _send(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
