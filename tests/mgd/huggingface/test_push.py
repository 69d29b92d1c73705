"""push_to_hub of the trainer, to a hub of a few lines on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification

from mgd.huggingface import DistillationTrainer
from tests.hub import REPO, Hub, serve
from tests.mgd.huggingface.tiny import Images, arguments, difference, mobilenet, vit


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        # HF_ENDPOINT would do the same, but is read once, when huggingface_hub is imported.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.url))
        yield server


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
