"""--resume RUN alone: what is not typed is as the run had it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import main_base, main_mgd
from classification.errors import UserError
from classification.options.config import parse
from classification.options.options import recorded
from classification.runs.checkpoint import changed_options
from tests.classification.conftest import SMALL, STUDENT
from tests.classification.runs.test_resume import differences, into  # noqa: F401
from tests.classification.seams import before_forward, run_changed
from tests.classification.test_main import options

RECIPE = """
student: {arch: resnet18}
teachers: [{arch: resnet34, resume: T.pth, weight: 2}, {arch: resnet50, resume: U.pth}]
terms: {ce: {weight: 0.5}, dkd: {weight: 1.0, beta: 0.5, warmup: 5}, mgd: {weight: 1.0e-4}}
lr: 0.03
"""


def saved(path: Path, options: dict[str, Any]) -> Path:
    torch.save({"state_dict": {"w": torch.zeros(1)}, "resume": {"config": {"options": options}}}, path)
    return path


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--seed 3 --lr 0.3 --warmup 1 --lr-drop-epochs 5 9 --pretrained --device cpu --cache ram -p 7",
        "--mgd-reducer sm --mgd-form mean --mgd-weight 3 --taps layer1,layer2 --epochs 7",
        "--mgd-with-kd 1 --kd-weight 2 --student-taps a --teacher-taps b --ema 0.9 --optimizer muon",
        "--distiller dkd+ofd --term dkd.beta=2 --term ofd.init=flow --mgd-max-images 9 --lr-schedule cosine",
        "--distiller kd --labels 0 --teacher-arch resnet34,resnet50 --teacher-resume a,b --teacher-mean probabilities",
        "--distiller udml --teacher-arch resnet34 --mixup 0.2 --accumulate 2",
        "--distiller ssld --teacher-resume T.pth --train-list a --valid-list b --num-classes 7",
        "--config RECIPE --term dkd.beta=3 --teacher-resume V.pth,W.pth",
    ],
)
def test_every_option_of_a_run_is_taken(words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = words.replace("RECIPE", str(tmp_path / "recipe.yaml"))
    first = recorded(parse(["DIR", *words.split()], "main_mgd.py", distillation=True))
    first["seeded"] = first["seed"] is not None
    path = saved(tmp_path / "last.pth", {**first, "command": ["x"]})
    for again in ([], shlex.split(words)):  # nothing is typed, or all of it once more
        second = recorded(parse(["--resume", str(tmp_path), *again], "main_mgd.py", distillation=True))
        assert second["resume"] == str(path) and second["data"] == "DIR"
        second["seeded"] = second["seed"] is not None
        same = {name for name in first if first[name] == second[name]}
        anew = {"resume", "command", "config", "pretrained", "use_pretrained", "student_resume"}
        assert set(first) - same <= anew
        assert changed_options(first, second) == []


def test_what_is_typed_wins(tmp_path: Path) -> None:
    words = ["DIR", "--lr", "0.3", "--term", "mgd.start=1", "--term", "mgd.stop=9", "--output", "x"]
    first = recorded(parse(words, "main_mgd.py", distillation=True))
    path = saved(tmp_path / "last.pth", {**first, "new_option": 3})
    (tmp_path / "recipe.yaml").write_text("weight_decay: 0.5\nlr: 0.7\n")
    words = [
        "OTHER",
        "--resume",
        str(path),
        "--lr",
        "0.1",
        "--term",
        "mgd.stop=8",
        "--config",
        f"{tmp_path}/recipe.yaml",
    ]
    args = parse(words, "main_mgd.py", distillation=True)
    assert (args.data.data, args.optimisation.lr, args.optimisation.weight_decay, args.run.output) == (
        "OTHER",
        0.1,
        0.5,
        None,
    )
    args = parse(["--resume", str(path), "--term", "mgd.stop=8"], "main_mgd.py", distillation=True)
    schedule = args.table["mgd"].schedule
    assert (schedule.start, schedule.stop, args.optimisation.lr) == (1, 8, 0.3)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("main_mgd.py", "", "name the folder of photographs, as in main_mgd.py DIR; only --resume RUN needs none"),
        ("main_mgd.py", "--resume auto --output x", "name the folder of photographs"),
        ("main_base.py", "--resume RUN", "is from a run of main_mgd.py: resume it with main_mgd.py --resume"),
        ("main_mgd.py", "--resume RUN --output b", "leave out --output"),
        ("main_mgd.py", "--resume RUN --config gone", "recipe gone"),
        ("main_mgd.py", "--resume EMPTY", "the folder has no last.pth, so no run can be resumed from it"),
        ("main_mgd.py", "--resume GONE", "does not exist"),
        ("main_mgd.py", "--resume RUN --start-epoch 3", "without --resume"),
    ],
)
def test_what_cannot_be_resumed_is_refused(script: str, words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run" / "last.pth", recorded(parse(["DIR"], "main_mgd.py", distillation=True)))
    (tmp_path / "empty").mkdir()
    for word, name in (("RUN", "run"), ("EMPTY", "empty"), ("GONE", "gone.pth")):
        words = words.replace(word, str(tmp_path / name))
    with pytest.raises(UserError, match=message):
        parse(words.split(), script, distillation=script == "main_mgd.py")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "high"),
        ("lr", True),
        ("optimizer", "adam"),
        ("arch", 3),
        ("terms", [1]),
        ("teachers", 7),
        ("epochs", [3]),
    ],
)
def test_damaged_options_are_named(name: str, value: Any, tmp_path: Path) -> None:
    first = recorded(parse(["DIR"], "main_mgd.py", distillation=True))
    path = saved(tmp_path / "last.pth", {**first, name: value})
    with pytest.raises(UserError, match=f"is damaged.*\\(its (option )?{name} (is|are)"):
        parse(["--resume", str(path)], "main_mgd.py", distillation=True)


def test_a_run_of_the_other_script_is_named_by_its_own(photos: Path, tmp_path: Path, capsys: Any) -> None:
    words = [str(photos), "-a", STUDENT, *SMALL, "--epochs", "1", "--output", str(tmp_path / "run")]
    assert main_base.main(words) == 0
    assert main_mgd.main(["--resume", str(tmp_path / "run")]) == 2
    assert "is from a run of main_base.py: resume it with main_base.py" in capsys.readouterr().err
    assert main_base.main(["--resume", str(tmp_path / "run")]) == 2
    assert "is from a run that is complete: raise --epochs" in capsys.readouterr().err
    assert main_base.main(["--resume", str(tmp_path / "run"), "--epochs", "2"]) == 0


def test_a_run_that_is_stopped_says_the_line_that_resumes_it_with_the_same_bits(
    distil: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    differences: Any,  # noqa: F811
) -> None:
    words = options(distil, distiller="mgd+kd", mgd_reducer="rd", term="kd.warmup=2", optimizer="muon")
    assert main_mgd.main(into(words, tmp_path / "whole")) == 0

    def signalled(number: int, _: torch.Tensor, *, stop: int, finished: list[int]) -> None:
        if number == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        finished.append(number)

    folder = tmp_path / "a run's folder"
    words = into(words, folder)
    for stop in (1, 3):  # in the first step of a process nothing is to be saved, and it leaves at once
        finished: list[int] = []
        hook = partial(signalled, stop=stop, finished=finished)
        assert run_changed(words, partial(before_forward, hook=hook)) == 143
        error = capsys.readouterr().err
        assert "main_mgd.py: SIGTERM: the state is saved; to resume the run:" in error
        assert ("finishing the step" in error) == (stop in finished) == (stop == 3)
        line = shlex.split(error.splitlines()[-1])
        assert Path(line[1]).name == "main_mgd.py" and line[2:] == ["--resume", str(folder)]
        words = line[2:]
    assert torch.load(folder / "last.pth", weights_only=True)["resume"]["step"] == 3
    assert main_mgd.main(words) == 0
    assert differences(folder, tmp_path / "whole") == []
    ran = json.loads((folder / "config.json").read_text())
    assert ran["resumed"][-1]["options"]["term"] == ["kd.warmup=2"]


def test_a_moved_run_is_resumed_where_it_is(short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "moved")
    assert main_mgd.main(["--resume", str(tmp_path / "moved"), "--epochs", "2"]) == 0
    assert len((tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()) == 2
    assert len((short_run / "metrics.jsonl").read_text().splitlines()) == 1


def test_places_of_a_run_are_found_from_elsewhere(
    photos: Path, short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("photos", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "t,1.pth").touch()
    content = torch.load(short_run / "last.pth", weights_only=True)
    options = content["resume"]["config"]["options"]
    options |= {"data": "photos", "teacher_resume": "t,1.pth", "teachers": [{"arch": "resnet34", "resume": "t,1.pth"}]}
    content["resume"]["config"]["folder"] = str(tmp_path)
    (tmp_path / "run").mkdir()
    torch.save(content, tmp_path / "run" / "last.pth")
    for folder, before in ((tmp_path, ""), (tmp_path / "elsewhere", f"{tmp_path}/")):
        monkeypatch.chdir(folder)
        for more in ([], ["--evaluate"]):
            args = parse(["--resume", str(tmp_path / "run"), *more], "main_mgd.py", distillation=True)
            assert args.data.data == f"{before}photos" and args.teachers[0]["resume"] == f"{before}t,1.pth"
        args = parse(["--resume", str(tmp_path / "run"), "--evaluate"], "main_base.py", distillation=False)
        assert (args.data.data, args.optimisation.batch_size, args.networks.teacher_resume) == (
            f"{before}photos",
            8,
            None,
        )
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(
        UserError, match=r"photos, from which the run read its images, does not exist: .* type it before --resume"
    ):
        parse(["--resume", str(tmp_path / "run")], "main_mgd.py", distillation=True)
    (tmp_path / "t,1.pth").unlink()
    with pytest.raises(UserError, match=r"the run's teacher, does not exist: .* give --teacher-resume"):
        parse([".", "--resume", str(tmp_path / "run")], "main_mgd.py", distillation=True)
