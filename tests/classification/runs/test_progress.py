"""What is printed: which steps, how a loss is the sum of its terms, how long a run will take, how it ended."""

from __future__ import annotations

import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from classification import main_base, main_mgd
from classification.options.groups import Optimisation
from classification.options.options import make_options
from classification.runs.launch import command
from classification.runs.metrics import accuracy, result, tally
from classification.runs.progress import Progress, last_lines, sum_of
from tests.classification.test_main import options, records, without

EPOCHS = Optimisation(epochs=3)


def test_the_first_step_is_printed_and_later_ones_by_time_or_number() -> None:
    for freq, expected in ((None, [1, 5, 9]), (4, [1, 4, 8])):
        shown = Progress(EPOCHS, freq, iter([100.0 + 2.6 * n for n in range(99)]).__next__)
        told = []
        for step in range(1, 11):
            shown.stepped(2.6)
            told += [step] if shown.due(step) else []
        assert told == expected


def test_the_time_left_is_that_of_steps_behind_the_first_and_of_what_is_beside_them() -> None:
    shown = Progress(EPOCHS, None)
    shown.stepped(50.0)
    assert shown.left(0, 1, 10) == ""  # the first step says nothing
    for _ in range(2):
        shown.stepped(2.0)
    assert shown.left(0, 3, 10) == "ETA 0:00:54"  # 7 + 10 + 10 steps of 2 s
    shown.aside = 1000.0
    assert shown.left(2, 10, 10) == "ETA 0:16:40"  # the last evaluation


def test_top_5_is_told_of_more_than_five_classes_only() -> None:
    values = {"valid_top1": 40.0, "valid_top5": 90.0, "valid_loss": 1.5}
    assert accuracy(values, 5) == "top-1 40.00  valid loss 1.5000"
    assert accuracy(values, 6) == "top-1 40.00  top-5 90.00  valid loss 1.5000"
    assert accuracy(values, 6, errors=True) == "top-1 40.00 (Err@1 60.00)  top-5 90.00 (Err@5 10.00)  valid loss 1.5000"


def test_the_validation_loss_is_the_mean_cross_entropy_of_all_images() -> None:
    logits, target = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 0.0]]), torch.tensor([0, 1, 0])
    found = result(tally(logits[:2], target[:2]) + tally(logits[2:], target[2:]))
    assert found["valid_loss"] == pytest.approx((math.log(2) + math.log(4) + math.log(2)) / 3)
    assert found["valid_top1"] == pytest.approx(200 / 3) and found["valid_top5"] == 100.0


def test_terms_are_printed_weighted() -> None:
    assert sum_of(2.31, {"ce": 1.9, "mgd": 0.41}) == "loss 2.3100 = ce 1.9000 + mgd 0.4100"


def numbers(line: str) -> tuple[float, list[float]]:
    """The loss of a line, and its terms."""
    found = re.search(r"loss ([\d.]+) = ((?:\w+ [\d.]+(?: \+ )?)+)", line)
    assert found, line
    return float(found[1]), [float(word) for word in re.findall(r"[\d.]+(?= \+|$)", found[2])]


def test_lines_of_a_run_count_from_1_add_up_and_end_with_what_to_do_next(
    distil: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = without(options(distil, distiller="mgd+kd", kd_weight="0.5", ema="0.5"), "-p")
    assert main_mgd.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if re.match(r"epoch 1/2  step 1/4  ", line)]
    epochs = [line for line in lines if re.match(r"epoch [12]/2  loss", line)]
    assert len(steps) == 1 and len(epochs) == 2 and not any("epoch 0" in line for line in lines)
    for line in (*steps, *epochs):
        loss, terms = numbers(line)
        assert len(terms) == 3 and sum(terms) == pytest.approx(loss, abs=3e-4)
        assert "top-5" not in line and "Err@" not in line
    found = records(Path(distil[-1]))
    assert [record["epoch"] for record in found] == [0, 1] and all("valid_top5" in record for record in found)
    for record, line in zip(found, epochs, strict=True):
        assert f"valid loss {record['valid_loss']:.4f}" in line
        weighted = [value for name, value in record.items() if name.endswith("_weighted")]
        assert sum(weighted) == pytest.approx(record["train_loss"])
    best = max(found, key=lambda record: record["valid_top1"])
    ended = f"best top-1 {best['valid_top1']:.2f} (epoch {best['epoch'] + 1}/2), last {found[-1]['valid_top1']:.2f}"
    assert ended in lines[-2]
    evaluate = shlex.split(lines[-1].partition(": ")[2])
    assert Path(evaluate[1]).name == "main_base.py"
    assert main_base.main(evaluate[2:]) == 0
    out = capsys.readouterr().out
    assert (
        f"top-1 {best['valid_top1']:.2f} (Err@1 {100 - best['valid_top1']:.2f})  valid loss {best['valid_loss']:.4f}"
        in out
    )


def test_the_last_lines_name_a_run_in_quotes() -> None:
    lines = last_lines(make_options({"data": "my photos"}), 3, Path("a run"), {"valid_top1": 50.0}, 40.0, 3723.4)
    assert lines[0] == "=> done in 1:02:03: best top-1 50.00, last 40.00"
    assert (
        lines[1].endswith("--evaluate --student-resume 'a run/best.pth'")
        and "main_base.py 'my photos' --evaluate" in lines[1]
    )
    listed = make_options({"data": "my photos", "train_list": "a", "valid_list": "b", "bad_images": "skip"})
    words = "'my photos' --valid-list b --train-list a --num-classes 3 --bad-images skip --evaluate --student-resume"
    assert words in last_lines(listed, 3, Path("a run"), {"valid_top1": 50.0}, 40.0, 3723.4)[1]


def test_the_last_lines_are_commands_of_mgd_if_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mgd", "distill", "my photos"])
    lines = last_lines(make_options({"data": "my photos"}), 3, Path("a run"), {"valid_top1": 50.0}, 40.0, 3.0)
    assert lines[1] == "=> to evaluate the best: mgd evaluate 'a run' 'my photos'"
    assert command("main_mgd.py", "--resume", "a run") == "mgd distill --resume 'a run'"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert command("main_mgd.py", "--resume", "a run").startswith("torchrun ")
