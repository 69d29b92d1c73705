"""A hub of Hugging Face of a few lines on this machine, which keeps what is pushed to it."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "someone/student"


class Hub(ThreadingHTTPServer):
    """Takes a repository, and keeps the files of its commits and the tokens that came with them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            found: object = {"url": f"{self.server.url}/{REPO}"}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            found = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{self.server.url}/{REPO}/commit/c0ffee", "commitOid": "c0ffee"}
        else:
            found = {}
        self._send(found)

    def do_GET(self) -> None:
        self._send({"id": REPO, "sha": "c0ffee", "siblings": []})

    def _send(self, found: object) -> None:
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub for the time of a test."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
