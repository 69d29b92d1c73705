from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from classification import main_base, main_mgd
from classification.errors import UserError
from classification.runs.metrics import Journal
from tests.classification.runs.test_metrics import events
from tests.classification.test_main import options, records


class Noted:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.told.append(dict(record))

    def step(self, record: Mapping[str, Any], number: int) -> None:
        self.told.append((number, dict(record)))

    def close(self) -> None:
        self.told.append("closed")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_every_tracker_is_told_of_epochs_and_steps(tmp_path: Path) -> None:
    noted = Noted()
    journal = Journal(tmp_path, trackers=[noted])
    journal.write_step({"epoch": 0, "step": 2, "loss": 1.5}, 2)
    journal.write({"epoch": 0, "train_loss": 1.0})
    journal.close()
    assert noted.told == [(2, {"epoch": 0, "step": 2, "loss": 1.5}), {"epoch": 0, "train_loss": 1.0}, "closed"]
    assert lines(tmp_path) == [{"epoch": 0, "step": 2, "loss": 1.5}]


def test_steps_behind_the_checkpoint_are_dropped_and_damaged_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    places = [(0, 2), (0, 4), (1, 2), (1, 4), (2, 2)]
    path.write_text("".join(json.dumps({"epoch": e, "step": s}) + "\n" for e, s in places) + '{"epo')
    Journal(tmp_path, 1, 3, trackers=[]).close()
    assert [(line["epoch"], line["step"]) for line in lines(tmp_path)] == places[:3]
    path.write_text('{"epoch": 0}\n')
    with pytest.raises(UserError, match="is not a record of a step; remove the line"):
        Journal(tmp_path, 1, trackers=[])


def test_a_run_logs_its_steps(distil: list[str], tmp_path: Path) -> None:
    words = options(distil, distiller="mgd+kd", log_steps="2", epochs="1")
    assert main_mgd.main(words) == 0
    folder = Path(distil[-1])
    found = lines(folder)
    assert [(line["epoch"], line["step"]) for line in found] == [(0, 2), (0, 4)]
    (epoch,) = records(folder)
    weights = {name: epoch[f"train_{name}_weighted"] / epoch[f"train_{name}"] for name in ("ce", "mgd", "kd")}
    for line in found:
        total = sum(weights[name] * line[name] for name in weights)
        assert line["loss"] == pytest.approx(total, rel=1e-5) and line["learning_rate"] == 0.05
    tags = [(event.step, value.tag) for event in events(folder) for value in event.summary.value]
    assert {(2, "steps/loss"), (4, "steps/mgd"), (4, "steps/learning_rate")} <= set(tags)


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed")
def test_trackio_that_is_missing_is_named(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_base.main([str(photos), "--track", "trackio", "--output", str(tmp_path / "run")]) == 2
    assert "pip install 'matching-guided-distillation[track]'" in capsys.readouterr().err


def test_trackio_takes_a_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from classification.runs.tracking import Trackio

    tracker = Trackio(tmp_path / "run-7", {"lr": 0.1, "taps": None})
    tracker.step({"epoch": 0, "step": 2, "loss": 1.5}, 2)
    tracker.epoch({"epoch": 0, "train_loss": 1.0})
    tracker.close()
    (run,) = trackio.Api().runs("mgd")
    assert run.name == "run-7"
