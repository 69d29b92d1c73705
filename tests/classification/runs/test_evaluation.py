"""evaluation.json: what --evaluate writes, where, and that ranks change nothing in it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from classification import main_base
from classification.errors import UserError
from classification.runs import evaluation
from tests.classification.conftest import CLASSES, SMALL, STUDENT, TEACHER


def test_evaluate_writes_both_networks(photos: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    student = tmp_path / "student" / "best.pth"
    words = [str(photos), "-a", STUDENT, *SMALL, "--epochs", "1", "--output", str(student.parent)]
    assert main_base.main(words) == 0
    pair = ["--student-resume", str(student), "--teacher-resume", str(teacher), "--teacher-arch", TEACHER]
    capsys.readouterr()
    assert main_base.main([str(photos), "-a", STUDENT, *SMALL, "--evaluate", *pair]) == 0
    out = capsys.readouterr().out
    found = json.loads((student.parent / "evaluation.json").read_text())
    assert f"=> written to {student.parent / 'evaluation.json'}" in out and "student minus teacher: " in out
    assert set(found) == {"student", "teacher"} and set(found["student"]["compared"]) == {"teacher"}
    for role, arch in (("student", STUDENT), ("teacher", TEACHER)):
        one = found[role]
        assert one["arch"] == arch and one["images"] == 15 and [c["name"] for c in one["per_class"]] == list(CLASSES)
        assert sum(c["correct"] for c in one["per_class"]) / 15 * 100 == pytest.approx(one["top1"])
        assert f"=> {role} {arch}, {one['parameters'] / 1e6:.2f} M parameters: top-1 {one['top1']:.2f} " in out
        assert f"valid loss {one['loss']:.4f}" in out
    difference = found["student"]["compared"]["teacher"]["top1_difference"]
    assert difference == pytest.approx(found["student"]["top1"] - found["teacher"]["top1"])
    own = tmp_path / "new" / "folder"
    alone = ["--student-resume", str(student), "--output", str(own)]
    assert main_base.main([str(photos), "-a", STUDENT, *SMALL, "--evaluate", *alone]) == 0
    expected = {key: value for key, value in found["student"].items() if key not in ("compared", "latency_ms")}
    again = json.loads((own / "evaluation.json").read_text())
    assert again["student"].pop("compared") == {} and set(again["student"].pop("latency_ms")) == {"1", "32"}
    assert again == {"student": expected}


def test_two_ranks_write_what_one_does(photos: Path, teacher: Path, tmp_path: Path) -> None:
    words = [str(photos), "-a", TEACHER, *SMALL, "--evaluate", "--student-resume", str(teacher)]
    assert main_base.main([*words, "--output", str(tmp_path / "one")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    script = [sys.executable, "-m", "classification.main_base", *words, "--output", str(tmp_path / "two")]
    ranks = [
        subprocess.Popen([*script, "--dist-url", url, "--world-size", "2", "--rank", str(rank)]) for rank in (0, 1)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text())["student"] for name in ("one", "two"))
    for key in ("top1", "top5", "images", "balanced_accuracy", "macro_f1", "per_class"):
        assert one[key] == two[key]
    assert one["ece"] == pytest.approx(two["ece"]) and one["loss"] == pytest.approx(two["loss"])


def test_the_place_of_the_file(tmp_path: Path) -> None:
    assert evaluation.place(None, [None, "", "runs/a/best.pth"]) == Path("runs/a/evaluation.json")
    assert evaluation.place(None, [str(tmp_path)]) == tmp_path / "evaluation.json"
    assert evaluation.place(None, [None]) is None
    assert "give --output" in evaluation.keep({}, None, typed=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*file cannot be made: File exists"):
        evaluation.place(str(tmp_path / "file"), [])


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    evaluation.keep({"student": {"loss": float("nan"), "top1": 1.0}}, tmp_path / "evaluation.json", typed=True)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"student": {"loss": None, "top1": 1.0}}


def scored(correct: list[int], difference: dict[str, Any] | None = None) -> dict[str, Any]:
    shares = {"top1": 50.0, "top5": 100.0, "loss": 1.25, "balanced_accuracy": 40.0, "macro_f1": 30.0, "ece": 2.5}
    counts = [{"name": f"c{index}", "images": 4, "correct": right} for index, right in enumerate(correct)]
    cost = {"parameters": 1234, "megabytes": 0.5, "macs": 2_500_000, "latency_ms": {"1": 1.5, "32": None}}
    where = {"device": "cpu", "threads": 2, "instructions": "AVX2"}
    return {"arch": "net", **shares, "per_class": counts, **cost, **where, "compared": difference or {}}


def test_the_table_sets_networks_side_by_side() -> None:
    both = {"top1_difference": -1.0, "interval": [-3.0, 1.0], "verdict": "UNDECIDED", "agreement": 75.0}
    lines = evaluation.table({"teacher": scored([4, 0]), "student": scored([3, 2], {"teacher": both})})
    assert lines[0].split() == ["student", "teacher"]
    for text in ("loss 1.2500 1.2500", "parameters 1,234 1,234", "MACs, million 2.50 2.50", "batch of 32, ms - -"):
        assert text in [" ".join(line.split()) for line in lines]
    assert lines[-6].startswith("student minus teacher: -1.00 points of top-1 (95 % interval -3.00 to +1.00); both say")
    assert lines[-5].startswith("verdict on student and teacher: UNDECIDED, as the interval contains 0")
    assert [line.split() for line in lines[-3:-1]] == [["c0", "4", "75.0", "100.0"], ["c1", "4", "50.0", "0.0"]]
    assert lines[-1].endswith("ms: medians on cpu, threads: 2, AVX2")


def test_of_many_classes_the_worst_are_printed() -> None:
    lines = evaluation.table({"student": scored([4] * 30 + [1])})
    first = lines.index(next(line for line in lines if line.startswith("the 20 worst of 31 classes")))
    printed = [line.split() for line in lines[first + 1 : -1]]
    assert len(printed) == 20 and printed[0] == ["c30", "4", "25.0"] and printed[1] == ["c0", "4", "100.0"]
