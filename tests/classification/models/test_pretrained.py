"""Published weights without a network: from the cache of the hub, or refused at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

NAME, REPO = "mobilenetv3_small_050", "models--timm--mobilenetv3_small_050.lamb_in1k"
SCRIPT = f"""
import torch
from classification.models import build
from classification.models.pretrained import load_pretrained
network = build("timm:{NAME}", 1000)
print(load_pretrained(network, "timm:{NAME}", option="--teacher-resume"))
print(float(network.conv_stem.weight.double().sum()))
"""


def load(cache: Path) -> subprocess.CompletedProcess[str]:
    """Load the weights in a process that has a cache, and a hub where nobody listens."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)


def test_weights_in_the_cache_are_loaded_without_asking_the_hub(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model(NAME).state_dict()
    (tmp_path / REPO / "refs").mkdir(parents=True)
    (tmp_path / REPO / "refs" / "main").write_text("c0ffee")
    (tmp_path / REPO / "snapshots" / "c0ffee").mkdir(parents=True)
    (tmp_path / REPO / "blobs").mkdir()
    save_file(state, tmp_path / REPO / "blobs" / "d1gest")  # as the hub's cache has it: a link to a file without suffix
    (tmp_path / REPO / "snapshots" / "c0ffee" / "model.safetensors").symlink_to("../../blobs/d1gest")
    found = load(tmp_path)
    assert found.returncode == 0, found.stderr
    assert "Retry" not in found.stderr
    assert float(found.stdout.splitlines()[-1]) == float(state["conv_stem.weight"].double().sum())
    (tmp_path / REPO / "blobs" / "d1gest").write_bytes(b"broken")
    assert f"cannot be read ({tmp_path / REPO / 'blobs' / 'd1gest'}" in load(tmp_path).stderr


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    found = load(tmp_path)
    *_, last = found.stderr.splitlines()
    assert "UserError: the pretrained weights of timm:mobilenetv3_small_050 cannot be downloaded" in last
    assert last.endswith("give a file by --teacher-resume") and "Retry" not in found.stderr
