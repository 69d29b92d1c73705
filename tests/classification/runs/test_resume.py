"""Runs that are interrupted, by a signal or between two steps, and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import main_base, main_mgd
from classification.data.folders import read_folder
from classification.models import build
from classification.options.config import parse
from classification.options.options import recorded
from classification.runs.checkpoint import changed_options, fingerprints
from classification.runs.metrics import Journal
from classification.runs.random_state import random_state, set_random_state
from classification.runs.world import World
from tests.classification.conftest import SMALL, STUDENT, TEACHER
from tests.classification.seams import poison, run_changed
from tests.classification.test_main import options, records, without


@pytest.fixture
def differences() -> Any:
    import torture

    return torture.differences


def into(words: list[str], folder: Path) -> list[str]:
    return options(words, output=str(folder))


def test_states_of_all_generators_are_taken_up() -> None:
    import random

    import numpy as np

    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(1))]

    draws()
    states = random_state(World())
    expected = draws()
    assert draws() != expected
    assert set_random_state(states, World()) and draws() == expected
    assert not set_random_state(states * 2, World())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_finishes_the_step_and_the_run_continues_as_if_uncut(
    number: int, distil: list[str], tmp_path: Path, differences: Any
) -> None:
    words = options(distil, epochs="40", mgd_reducer="rd", distiller="mgd+kd", mgd_update_freq="7", resume="auto")
    command = [sys.executable, "-m", "classification.main_mgd", *options(into(words, tmp_path / "cut"), j="2")]
    started = subprocess.Popen(
        command, text=True, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    journal = tmp_path / "cut" / "metrics.jsonl"
    while not journal.exists() or not journal.read_text():
        assert started.poll() is None, started.communicate()
        time.sleep(0.02)
    os.killpg(started.pid, number)  # as torchrun, systemd and a terminal do: the loading processes get it too
    _, error = started.communicate(timeout=60)
    assert started.returncode == 128 + number, error
    assert "finishing the step" in error and "the state is saved" in error and "Traceback" not in error
    assert len(records(tmp_path / "cut")) < 40
    assert main_mgd.main(into(words, tmp_path / "cut")) == 0
    assert main_mgd.main(into(words, tmp_path / "whole")) == 0
    assert differences(tmp_path / "cut", tmp_path / "whole") == []


def test_a_folder_that_another_run_writes_to_is_left_alone_and_free_as_soon_as_that_is_killed(
    distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(into(distil, tmp_path / "run"), epochs="40", resume="auto", j="1")
    command = [sys.executable, "-m", "classification.main_mgd", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        try:
            while not (tmp_path / "run" / "config.json").exists():
                assert started.poll() is None
                time.sleep(0.02)
            assert main_mgd.main(words) == 2
            refusal = capsys.readouterr().err
            assert f"another process writes to {tmp_path / 'run'} (process {started.pid} on" in refusal
        finally:
            started.kill()  # its loading processes live a little longer
    assert main_mgd.main(options(words, epochs="1", resume_override="1")) == 0


def test_resume_auto_starts_continues_and_ends(
    distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(into(distil, tmp_path / "run"), epochs="1", resume="auto")
    assert main_mgd.main(words) == 0
    assert main_mgd.main(words) == 0 and "is done" in capsys.readouterr().out
    assert main_mgd.main(options(words, epochs="2")) == 0
    assert [line["epoch"] for line in records(tmp_path / "run")] == [0, 1]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["epochs"] == 1 and [r["options"]["epochs"] for r in config["resumed"]] == [2]
    (tmp_path / "run" / "last.pth").unlink()  # as if killed before the first checkpoint
    assert main_mgd.main(options(words, epochs="1")) == 0
    assert [line["epoch"] for line in records(tmp_path / "run")] == [0]
    for path in (tmp_path / "run").iterdir():  # as if killed before config.json
        if path.is_file() and path.name != ".lock":
            path.unlink()
    assert main_mgd.main(options(words, epochs="1")) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert main_mgd.main(into(words, tmp_path / "other")) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": "6"}, "--batch-size 6, was 8"),
        ({"lr": "0.5"}, "--lr 0.5, was 0.05"),
        ({"mgd_reducer": "sp"}, "mgd.reducer sp, was amp"),
        ({"seed": "1"}, "--seed 1, was 0"),
        ({"distiller": "mgd+kd"}, "terms ce+mgd; this run has ce+mgd+kd"),
        ({"term": "mgd.weight=3"}, "--term"),
        ({"teacher": "other"}, "other weights of the teachers"),
        ({"image": "removed"}, "other training images: 1 fewer than then (train/dot/"),
    ],
)
def test_options_that_change_the_result_are_named_and_refused(
    changes: dict[str, str], message: str, distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    photos = tmp_path / "photos"
    shutil.copytree(distil[0], photos)
    words = options([str(photos), *distil[1:]], epochs="1")
    assert main_mgd.main(words) == 0
    last = Path(words[-1]) / "last.pth"
    before = last.read_bytes()
    words = options(words, epochs="2", resume=str(last))
    if "teacher" in changes:
        content = torch.load(words[words.index("--teacher-resume") + 1], weights_only=True)
        content["state_dict"]["linear.bias"] += 1
        torch.save(content, tmp_path / "other.pth")
        words = options(words, teacher_resume=str(tmp_path / "other.pth"))
    elif "image" in changes:
        next((photos / "train" / "dot").iterdir()).unlink()
    else:
        words = options(words, **changes)
    assert main_mgd.main(words) == 2
    assert message in capsys.readouterr().err and last.read_bytes() == before
    if "distiller" not in changes:
        assert main_mgd.main([*words, "--resume-override", "1"]) == 0


def test_more_ranks_than_before_go_on_and_say_so(distil: list[str], tmp_path: Path) -> None:
    words = options(into(distil, tmp_path / "run"), epochs="1", resume="auto")
    assert main_mgd.main(words) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "classification.main_mgd", *options(words, epochs="2")]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "had 1 ranks and has 2 now" in done.stdout and len(records(tmp_path / "run")) == 2


def test_without_a_seed_a_run_continues_with_its_own(distil: list[str], tmp_path: Path, differences: Any) -> None:
    words = options(distil, epochs="3", mgd_assignment="random", mgd_update_freq="1", seed="7", resume="auto")
    assert main_mgd.main(into(words, tmp_path / "whole")) == 0
    cut = into(words, tmp_path / "cut")
    at = cut.index("--seed")
    assert main_mgd.main(options(cut, epochs="1")) == 0
    assert main_mgd.main(options([*cut[:at], *cut[at + 2 :]], epochs="2")) == 0
    assert main_mgd.main(cut) == 0
    assert differences(tmp_path / "cut", tmp_path / "whole") == []


def test_a_run_that_continues_needs_the_file_it_started_from_no_more(distil: list[str], tmp_path: Path) -> None:
    start = tmp_path / "start.pth"
    torch.save(build(STUDENT, 3).state_dict(), start)
    words = options(into(distil, tmp_path / "run"), student_resume=str(start), resume="auto")
    assert main_mgd.main(options(words, epochs="1")) == 0
    start.unlink()
    assert main_mgd.main(words) == 0


def test_calibrating_leaves_a_run_as_it_is(short_run: Path, distil: list[str], tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    words = options(distil[:-2], epochs="3", loss_factor="1e4", resume=str(tmp_path / "run" / "last.pth"))
    assert main_mgd.main([*words, "--calibrate", "1"]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_moved_folder_holds_the_same_images_and_other_labels_make_others(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "moved")
    here, there = read_folder(photos).train, read_folder(tmp_path / "moved").train
    images = fingerprints([], here, photos, [])["training images"]
    assert fingerprints([], there, tmp_path / "moved", [])["training images"] == images
    wrong = [(path, 2 - label) for path, label in here]
    assert fingerprints([], wrong, photos, [])["training images"] != images


@pytest.mark.parametrize(
    ("words", "free"),
    [
        ("", True),
        ("--warmup 1", True),
        ("--lr-schedule cosine", False),
        ("--term mgd.decay=linear", False),
        ("--term ce.decay=cosine", False),
        ("--term mgd.warmup=3", True),
    ],
)
def test_more_epochs_are_another_run_where_rates_or_weights_fall_over_all_of_them(words: str, free: bool) -> None:
    before, now = (
        recorded(parse(["DIR", *words.split(), "--epochs", epochs], "main_mgd.py", distillation=True))
        for epochs in ("90", "95")
    )
    changed = changed_options(before, now)
    assert changed == ([] if free else ["--epochs 95, was 90"])


def test_a_teacher_may_lie_elsewhere_when_a_run_continues() -> None:
    before, now = (
        recorded(parse(["DIR", "--teacher-resume", file], "main_mgd.py", distillation=True))
        for file in ("a.pth", "b.pth")
    )
    assert changed_options(before, now) == []
    other = recorded(parse(["DIR", "--teacher-arch", "resnet34"], "main_mgd.py", distillation=True))
    assert any(change.startswith("the teachers") for change in changed_options(before, other))


def test_peers_go_on_as_if_uncut(
    distil: list[str],
    tmp_path: Path,
    differences: Any,
) -> None:
    words = without(distil, "--teacher-arch", "--teacher-resume", "--loss-factor")
    words = options(words, distiller="dml", resume="auto")
    assert main_mgd.main(into(words, tmp_path / "whole")) == 0
    assert main_mgd.main(options(into(words, tmp_path / "cut"), epochs="1")) == 0
    assert main_mgd.main(into(words, tmp_path / "cut")) == 0
    assert differences(tmp_path / "cut", tmp_path / "whole") == []
    peers = [torch.load(tmp_path / n / "peer1.pth", weights_only=True)["state_dict"] for n in ("whole", "cut")]
    assert all(torch.equal(value, peers[1][name]) for name, value in peers[0].items())


def test_steps_left_out_before_a_cut_count_after_it(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(photos), "-a", STUDENT, *SMALL, "--output", str(tmp_path / "run"), "--resume", "auto"]
    for epochs, status in (("1", 0), ("2", 1)):
        more = ["--epochs", epochs, "--skip-nonfinite", "1"]
        assert run_changed([*words, *more], partial(poison, steps={2}), main_base) == status
    assert "epoch 2/2, step 2" in capsys.readouterr().err


def test_a_run_killed_between_its_record_and_its_checkpoint_has_each_epoch_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Journal.write

    def killed(self: Journal, record: dict[str, Any]) -> None:
        write(self, record)
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    words = [str(photos), "-a", STUDENT, *SMALL, "--output", str(tmp_path / "run"), "--resume", "auto", "--epochs", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", killed)
        assert main_base.main(words) == 130
    # Were the checkpoint written first, a kill before the record would lose it.
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["resume"]["epoch"] == 1
    assert main_base.main(words) == 0
    assert [line["epoch"] for line in records(tmp_path / "run")] == [0, 1, 2]


def test_labels_that_the_first_epochs_of_a_run_had_are_those_it_continues_with(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    words = [str(root), "-a", TEACHER, *SMALL, "--output", str(tmp_path / "run"), "--resume", "auto", "--epochs"]
    assert main_base.main([*words, "1"]) == 0
    for split in ("train", "valid"):
        (root / split / "bar").rename(root / split / "zebra")
    assert main_base.main([*words, "2", "--resume-override", "1"]) == 2
    assert "is from a run with classes ['bar', 'dot', 'sky']; this run has ['dot'" in capsys.readouterr().err
