"""The benchmark beside other projects: what it measures, what it refuses, and what it has them do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# One image, two classes: the student's logits are its two biases, which begin with 0; the teacher's are 4 ln 3 and 0.
SCRIPT = """
import sys
import torch
from torch import nn
from torch.nn import functional as F
assert sys.argv[1:] == ["--word"] and __name__ == "__main__"
student, teacher = nn.Linear(1, 2), nn.Linear(1, 2)
with torch.no_grad():
    student.weight.zero_(), student.bias.zero_(), teacher.weight.zero_()
    teacher.bias.copy_(torch.tensor([4 * torch.tensor(3.0).log(), 0.0]))
optimizer = torch.optim.SGD(student.parameters(), 0.1)
images, target = torch.zeros(1, 1), torch.tensor([0])
while True:
    logits = student(images)
    with torch.no_grad():
        known = teacher(images)
    soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(known / 4, 1), reduction="batchmean")
    loss = nn.CrossEntropyLoss()(logits, target) + 16 * soft
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.fixture
def bench() -> Any:
    import bench_peers

    return bench_peers


def test_a_script_is_watched_from_outside(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log.json"
    script.write_text(SCRIPT)
    words = [sys.executable, str(ROOT / "scripts" / "peers" / "watch.py"), str(log), "2", "2", str(script), "--word"]
    assert subprocess.run(words, check=False).returncode == 0
    found = json.loads(log.read_text())
    assert len(found["steps"]) == 2 and found["batches"] == [1, 1] and found["workers"] == 0
    first, second = found["steps"]
    # KL((3/4, 1/4) || (1/2, 1/2)) = ln 2 - H(3/4), 16 times.
    kd = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert first["ce"] == pytest.approx(math.log(2)) and first["kd"] == pytest.approx(kd)
    assert first["loss"] == pytest.approx(math.log(2) + kd) and second["loss"] < first["loss"]
    assert second["seconds"] > first["seconds"] and second["cpu"] >= first["cpu"] > 0
    assert 50 * 2**20 < found["peak_bytes"] < 2**32


def test_the_rate_is_that_of_the_usual_window(bench: Any) -> None:
    ends = [100.0 + 7 * step for step in range(8)]  # the slow beginning
    for seconds in (1.0, 1.0, 5.0):  # of a step in each of three windows
        ends += [ends[-1] + seconds * step for step in range(1, 5)]
    assert bench.rate(ends, 32) == pytest.approx(32)


GOOD = {"seconds": 0.0, "cpu": 0.0, "loss": 3.0, "ce": 2.0, "kd": 1.0}


def falling(**changed: Any) -> dict[str, Any]:
    steps = [{**GOOD, "loss": 3.0 - step / 10, "ce": 2.0 - step / 10, **changed} for step in range(6)]
    return {"batches": [32] * 6, "steps": steps}


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ({**falling(), "batches": [32, 31]}, "expected 32"),
        (falling(kd=None), "no teacher"),
        (falling(kd=0.5), "expected ce + kd"),
        (falling(loss=4.0, ce=2.0, kd=2.0), "the same"),
        (falling(loss=3.0, ce=2.0), "does not fall"),
        ({**falling(), "steps": falling()["steps"][::-1]}, "does not fall"),
    ],
)
def test_another_job_is_refused(log: dict[str, Any], words: str, bench: Any) -> None:
    peer = bench.Peer("other", "float32", lambda _: [])
    bench.check(peer, falling(), 32)
    with pytest.raises(SystemExit, match=f"other.*{words.replace('+', '.')}"):
        bench.check(peer, log, 32)


def test_the_fastest_other_project_counts(bench: Any) -> None:
    chosen = [bench.Peer(name, "float32", lambda _: []) for name in ("ours", "slow", "fast")]
    rates = {"ours": (60.0, 60.0), "slow": (20.0, 20.0), "fast": (40.0, 50.0)}
    found = {name: [bench.Found(rate, 1.0, 1.0, {}) for rate in pair] for name, pair in rates.items()}
    (row,) = bench.questions(chosen, found)
    assert row["fast"] == "ours" and row["slow"] == "fast" and row["ratio"] == pytest.approx((60 / 40 + 60 / 50) / 2)


def test_a_peer_is_kept_with_its_medians(bench: Any) -> None:
    log = {"workers": 4, "threads": 2, "peak_bytes": 7, "bytes_with_workers": 9}
    runs = [bench.Found(rate, start, 1.5, log) for rate, start in ((10.0, 3.0), (20.0, 5.0), (30.0, 4.0))]
    row = bench.row_of(bench.Peer("other", "bf16", lambda _: [], "abc"), runs)
    assert (row["images_per_second"], row["first_step_seconds"], row["first_step_cpu_seconds"]) == (20.0, 4.0, 1.5)
    assert (row["peak_bytes"], row["workers"], row["commit"], row["each"]) == (7, 4, "abc", [10.0, 20.0, 30.0])


def test_each_command_names_the_same_job(bench: Any, tmp_path: Path) -> None:
    from peers import commands

    job = commands.Job(tmp_path / "photos", tmp_path, classes=3, img_size=64, batch_size=8)
    job.prepare()
    for number, peer in enumerate(
        [
            commands.ours(job, "ours", "float32"),
            commands.timm(job, tmp_path, "timm", "float32"),
            commands.trainer(job, "Trainer", "float32"),
        ]
    ):
        script, *words = peer.words(tmp_path / str(number))
        line = " ".join(words)
        assert str(job.folder) in words and f"{job.lr}" in words and "64" in words and "8" in words, line
        assert str(job.weights) in line or "local-dir:" in line
        assert peer.name == "timm" or Path(script).exists()
    distill = commands.torchdistill(job, tmp_path, "torchdistill")
    _, _, config, *_ = distill.words(tmp_path / "last")
    text = Path(config).read_text()
    assert "$" not in text and distill.commit == "unknown"
    plain = yaml.safe_load(text.replace("!import_call", "").replace("!import_get", ""))
    assert plain["train"]["train_data_loader"]["kwargs"]["batch_size"] == 8
    assert plain["models"]["teacher_model"]["src_ckpt"] == str(job.weights)
    assert json.loads((tmp_path / "timm-resnet18" / "config.json").read_text())["num_classes"] == 3


def test_the_table_has_the_fastest_of_each_number_type_first(bench: Any, tmp_path: Path) -> None:
    row = {"commit": None, "first_step_seconds": 9.0, "peak_bytes": 2**30, "workers": 2, "quartiles": [1.0, 2.0]}
    peers = [
        {**row, "name": "slow", "numbers": "float32", "images_per_second": 10.0},
        {**row, "name": "half", "numbers": "bf16", "images_per_second": 90.0},
        {**row, "name": "fast", "numbers": "float32", "images_per_second": 20.0},
    ]
    ratio = {"what": "training: fast / slow", "ratio": 2.0, "quartiles": [1.9, 2.1]}
    file = tmp_path / "peers.json"
    file.write_text(json.dumps({"command": "python x", "peers": peers, "rows": [ratio]}))
    text = bench.table(file)
    assert [line.split(" ")[1] for line in text.splitlines()[2:5]] == ["fast", "slow", "half"]
    assert "| 20.0 | 1.0 to 2.0 | 9.0 | 1024 | 2 |" in text and "- training: fast / slow: 2.00 (1.90 to 2.10)" in text
