"""push_to_hub of the trainer, to a hub of a few lines on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification

from mgd.huggingface import DistillationTrainer
from tests.mgd.huggingface.tiny import Images, arguments, difference, mobilenet, vit

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # HF_ENDPOINT would do the same, but is read once, when huggingface_hub is imported.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.url))
    yield server
    server.shutdown()
    server.server_close()


def test_the_student_alone_arrives_and_can_be_loaded(hub: Hub, tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        student_model=mobilenet(1),
        teacher_model=vit(0),
        args=arguments(
            tmp_path / "run", num_train_epochs=1, hub_model_id=REPO, hub_token="hf_secret", save_strategy="epoch"
        ),
        train_dataset=Images(),
        terms={"ce": 1, "mgd": None},
    )
    trainer.train()
    trainer.push_to_hub()
    assert hub.tokens == {"Bearer hf_secret"}
    assert {"config.json", "model.safetensors", "README.md", "training_args.bin"} <= set(hub.files)
    assert not [name for name in hub.files if "terms" in name or "checkpoint" in name]
    assert b"hf_secret" not in b"".join(content for name, content in hub.files.items() if name != "training_args.bin")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(hub.files[name])
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(trainer.model, torch.nn.Module)
    assert difference(again.state_dict(), dict(trainer.model.state_dict())) == 0
