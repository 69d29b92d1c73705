"""The two main scripts, from words to files, on pictures that the tests make."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classification import main_base, main_mgd
from classification.models import build
from classification.training.engine import Engine
from classification.training.job import Job
from tests.classification.conftest import CLASSES, SMALL, STUDENT, TEACHER
from tests.classification.seams import before_forward, run_changed, run_trainer


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def options(words: list[str], **changes: str) -> list[str]:
    """Replace or add options: epochs="3" for --epochs 3."""
    words = list(words)
    for name, value in changes.items():
        option = "-" + name if len(name) == 1 else "--" + name.replace("_", "-")
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def without(words: list[str], *names: str) -> list[str]:
    """Take options and their values away."""
    words = list(words)
    for name in names:
        if name in words:
            del words[words.index(name) : words.index(name) + 2]
    return words


@pytest.mark.parametrize("reducer", ["amp", "rd", "sp", "sm"])
@pytest.mark.parametrize("with_kd", ["0", "1"])
def test_distillation_writes_its_run_folder(reducer: str, with_kd: str, distil: list[str]) -> None:
    folder = Path(distil[-1])
    words = options(distil, mgd_reducer=reducer, mgd_with_kd=with_kd, mgd_update_freq="1")
    assert main_mgd.main(words) == 0
    lines = records(folder)
    assert [line["epoch"] for line in lines] == [0, 1]
    names = ["ce", "mgd", *(["kd"] if with_kd == "1" else [])]
    weights = {"ce": 1.0, "mgd": 1e-3, "kd": 1.0}
    for line in lines:
        assert line["train_loss"] == pytest.approx(sum(line[f"train_{n}_weighted"] for n in names), rel=1e-6)
        for name in names:
            assert line[f"train_{name}_weighted"] == pytest.approx(weights[name] * line[f"train_{name}"])
        assert 0 <= line["valid_top1"] <= line["valid_top5"] == 100 and line["images_per_second"] > 0
    assert lines[1]["train_mgd"] < lines[0]["train_mgd"]
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["options"]["terms"]["mgd"]["reducer"] == reducer
        and config["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    flows = [np.load(folder / "flow" / f"{number:04d}.npz") for number in (0, 1)]
    assert flows[1]["cost2"].shape == (32, 64) and {"index0", "index1", "index2"} <= set(flows[0])
    assert not [name for name in flows[0] if name.startswith("cost")], "costs are kept of the last update only"
    assert flows[0]["index2"].shape == ((1, 32) if reducer == "sm" else (2, 32))
    assert any(path.name.startswith("events") for path in folder.iterdir())


@pytest.mark.parametrize("distiller", ["ofd", "mgd+ofd"])
def test_ofd_begins_with_the_flow_that_is_asked_for(distiller: str, distil: list[str], tmp_path: Path) -> None:
    words = distil[: distil.index("--loss-factor")] + distil[distil.index("--loss-factor") + 2 :]
    words = options(words, distiller=distiller, term="ofd.init=flow", epochs="1", lr="1e-12")
    found = []
    for assignment in ("cheapest", "random"):
        words = options(words, mgd_assignment=assignment, output=str(tmp_path / assignment))
        assert main_mgd.main(words) == 0
        state = torch.load(tmp_path / assignment / "last.pth", weights_only=True)["resume"]["terms"]["ofd"]
        flow = np.load(tmp_path / assignment / "flow" / "0000.npz")
        for stage in range(3):
            weight = state[f"stages.0.{stage}.regressor.0.weight"][:, :, 0, 0]
            index = torch.from_numpy(flow[f"index{stage}"])
            assert weight.round().sum() == weight.shape[0] == index.numel()  # each teacher channel from one
            rows = torch.arange(index.shape[1]).expand_as(index)
            torch.testing.assert_close(weight[index.flatten(), rows.flatten()], torch.ones(index.numel()))
        found.append(flow["index2"])
        assert records(tmp_path / assignment)[0]["flow_cost"] > 0
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize(("assignment", "least", "most"), [("identity", 0.0, 0.0), ("random", 0.3, 1.0)])
def test_the_share_of_pairs_that_changed_is_told(assignment: str, least: float, most: float, distil: list[str]) -> None:
    words = options(distil, mgd_update_freq="1", lr="1e-12", mgd_assignment=assignment, mgd_max_images="100")
    assert main_mgd.main(words) == 0
    first, second = records(Path(distil[-1]))
    assert "flow_changed" not in first and least <= second["flow_changed"] <= most


def test_best_pth_loads_in_plain_pytorch(distil: list[str]) -> None:
    assert main_mgd.main(distil) == 0
    best = torch.load(Path(distil[-1]) / "best.pth", weights_only=True)
    described = {"format", "state_dict", "arch", "num_classes", "classes"}
    assert set(best) - described == {"img_size", "resize", "crop", "interpolation", "mean", "std"}
    assert best["classes"] == list(CLASSES) and best["img_size"] == 16
    build(best["arch"], best["num_classes"]).load_state_dict(best["state_dict"])


def test_the_teacher_is_not_trained(distil: list[str]) -> None:
    jobs: list[tuple[Job, dict[str, torch.Tensor]]] = []

    def note(job: Job) -> None:
        jobs.append((job, copy.deepcopy(job.teachers[0].state_dict())))

    assert run_changed(options(distil, epochs="1"), note) == 0
    ((job, before),) = jobs
    for name, value in job.teachers[0].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_seed_gives_the_same_run_twice(distil: list[str], tmp_path: Path) -> None:
    states = []
    for name in ("a", "b"):
        assert main_mgd.main(options(distil, output=str(tmp_path / name), mgd_reducer="rd")) == 0
        states.append(torch.load(tmp_path / name / "last.pth", weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_matching_once_and_by_the_epoch(distil: list[str], tmp_path: Path) -> None:
    for freq, numbers in (("0", ["0000"]), ("1", ["0000", "0001", "0002"]), ("2", ["0000", "0001"])):
        folder = tmp_path / freq
        assert main_mgd.main(options(distil, mgd_update_freq=freq, epochs="3", output=str(folder))) == 0
        assert sorted(path.stem for path in (folder / "flow").iterdir()) == numbers


def test_resuming_ends_where_the_whole_run_ends(distil: list[str], tmp_path: Path) -> None:
    # Cut after 2 of 3 epochs: the constant rate makes the cut run the same as the beginning of the whole one.
    words = options(distil, lr_drop_epochs="90", mgd_update_freq="2", epochs="3")
    assert main_mgd.main(options(words, output=str(tmp_path / "whole"))) == 0
    assert main_mgd.main(options(words, output=str(tmp_path / "cut"), epochs="2")) == 0
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "left": "by a run that was killed before its checkpoint"}\n')
        file.write('{"epoch": 2, "cut in the mid')
    again = options(words, output=str(tmp_path / "cut"))
    assert main_mgd.main([*again, "--resume", str(tmp_path / "cut" / "last.pth")]) == 0
    whole, cut = (torch.load(tmp_path / n / "last.pth", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(value, cut["state_dict"][name]) for name, value in whole["state_dict"].items())
    lines = [records(tmp_path / name) for name in ("whole", "cut")]
    assert [line["epoch"] for line in lines[1]] == [0, 1, 2]
    assert lines[0][2]["train_mgd"] == lines[1][2]["train_mgd"]


@pytest.mark.parametrize("kept", ["teacher", "student", "both"])
@pytest.mark.parametrize("script", [main_base, main_mgd])
def test_evaluate(script: Any, kept: str, distil: list[str], photos: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save(build(STUDENT, 3).state_dict(), tmp_path / "student.pth")
    words = [str(photos), "-a", STUDENT, *SMALL, "--evaluate"]
    if kept != "teacher":
        words += ["--student-resume", str(tmp_path / "student.pth")]
    if kept != "student" or script is main_mgd:
        words += distil[distil.index("--teacher-arch") : distil.index("--teacher-resume") + 2]
    assert script.main(words) == 0
    out = capsys.readouterr().out
    assert ("=> teacher cifar_resnet8," in out) == (kept != "student" or script is main_mgd)
    assert ("=> student cifar_resnet8_w0.5," in out) == (kept != "teacher")
    assert "Err@1" in out and not (tmp_path / "runs").exists()


def test_plain_weights_of_a_network_for_cifar_are_evaluated_at_its_size(photos: Path, tmp_path: Path) -> None:
    torch.save(build(STUDENT, 3).state_dict(), tmp_path / "plain.pth")
    words = [str(photos), "-a", STUDENT, "--evaluate", "--student-resume", str(tmp_path / "plain.pth"), "-j", "0"]
    for name, more in (("silent", []), ("typed", ["--img-size", "32", "--train-crop", "pad"])):
        assert main_base.main([*words, *more, "--output", str(tmp_path / name)]) == 0
    found = [json.loads((tmp_path / name / "evaluation.json").read_text())["student"] for name in ("silent", "typed")]
    for measure in ("macs", "loss"):
        assert found[0][measure] == found[1][measure]


def test_evaluation_agrees_with_a_plain_loop(photos: Path, teacher: Path, capsys: Any) -> None:
    from PIL import Image
    from torchvision.transforms.functional import normalize, to_tensor

    best = torch.load(teacher, weights_only=True)
    model = build(TEACHER, 3).eval()
    model.load_state_dict(best["state_dict"])
    right = 0
    for label, name in enumerate(CLASSES):
        for path in sorted((photos / "valid" / name).iterdir()):
            image = normalize(to_tensor(Image.open(path).convert("RGB")), best["mean"], best["std"])
            right += int(model(image[None]).argmax()) == label
    assert main_base.main([str(photos), "-a", TEACHER, *SMALL, "--student-resume", str(teacher), "-e"]) == 0
    assert f"top-1 {100 * right / 15:.2f} " in capsys.readouterr().out


def test_a_teacher_near_chance_is_warned_of(distil: list[str], tmp_path: Path, capsys: Any) -> None:
    model: Any = build(TEACHER, 3)
    torch.nn.init.zeros_(model.linear.weight)
    torch.save(model.state_dict(), tmp_path / "chance.pth")
    assert main_mgd.main([*options(distil, teacher_resume=str(tmp_path / "chance.pth")), "--evaluate"]) == 0
    assert "WARNING: the teacher is near chance" in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "warned"), [("1e-2", True), ("1e4", False)])
def test_a_term_that_drowns_the_others_is_warned_of(factor: str, warned: bool, distil: list[str], capsys: Any) -> None:
    assert main_mgd.main(options(distil, loss_factor=factor, epochs="1", lr="1e-9")) == 0
    assert ("times all others together: if the student does not learn" in capsys.readouterr().out) == warned


def test_kd_alone_mixed_precision_and_named_taps(distil: list[str], tmp_path: Path) -> None:
    where = distil.index("--loss-factor")
    words = distil[:where] + distil[where + 2 :]
    assert main_mgd.main(options(words, distiller="kd", output=str(tmp_path / "kd"), epochs="1")) == 0
    assert "train_mgd" not in records(tmp_path / "kd")[0]
    assert not list((tmp_path / "kd" / "flow").iterdir())
    words = options(distil, amp="bf16", taps="layer2.0.relu@in#-1,layer3", epochs="1", mgd_margin="map")
    assert main_mgd.main(words) == 0
    assert "index2" not in np.load(Path(distil[-1]) / "flow" / "0000.npz")


@pytest.mark.parametrize("classes", [3, 7])
def test_a_pretrained_student_keeps_its_body(classes: int, photos: Path, tmp_path: Path, capsys: Any) -> None:
    before = build(TEACHER, classes).state_dict()
    torch.save(before, tmp_path / "start.pth")
    words = [str(photos), "-a", TEACHER, *SMALL, "--student-resume", str(tmp_path / "start.pth")]
    run = ["--epochs", "1", "--lr", "1e-9", "--wd", "0", "--output", str(tmp_path / "run")]
    assert main_base.main([*words, *run]) == 0
    assert ("head swapped, 7 -> 3 classes" in capsys.readouterr().out) == (classes == 7)
    after = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["state_dict"]
    torch.testing.assert_close(after["conv1.weight"], before["conv1.weight"])
    assert main_base.main([*words, "--evaluate"]) == (2 if classes == 7 else 0)


def mistake(name: str, words: list[str], tmp_path: Path) -> list[str]:
    """Turn right words into wrong ones."""
    torch.save(build("resnet18", 3).state_dict(), tmp_path / "resnet18.pth")
    checkpoint = Path(words[words.index("--teacher-resume") + 1])
    (tmp_path / "half.pth").write_bytes(checkpoint.read_bytes()[:5000])
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "classes": content["classes"][::-1]}, tmp_path / "order.pth")
    torch.save({**content, "num_classes": 4}, tmp_path / "four.pth")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    without = [w for i, w in enumerate(words) if not {"--teacher-resume"} & {w, words[i - 1]}]
    no_output = [w for i, w in enumerate(words) if not {"--output"} & {w, words[i - 1]}]
    return {
        "no folder": ["/nowhere", *words[1:]],
        "arch": ["-a" if w == "-a" else "cifar_resnet8_w0" if w == STUDENT else w for w in words],
        "no teacher": without,
        "pretrained": [*options(words, use_pretrained="1")],
        "missing": options(words, teacher_resume=str(tmp_path / "none.pth")),
        "truncated": options(words, teacher_resume=str(tmp_path / "half.pth")),
        "network": options(words, teacher_resume=str(tmp_path / "resnet18.pth")),
        "order": options(words, teacher_resume=str(tmp_path / "order.pth")),
        "count": options(words, teacher_resume=str(tmp_path / "four.pth")),
        "classes": options(words, num_classes="2"),
        "tap": options(words, student_taps="layer9.0.relu@in", teacher_taps="layer3"),
        "taps count": options(words, student_taps="layer2,layer3", teacher_taps="layer3"),
        "no map": options(words, student_taps="linear", teacher_taps="linear"),
        "ambiguous": options(words, student_taps="layer3.0.relu@in", teacher_taps="layer3"),
        "output": options(words, output=str(tmp_path / "taken")),
        "resume": [*no_output, "--resume", str(checkpoint)],
        "read only": options(words, output="/proc/run"),
        "size": ["timm:levit_128s" if w == STUDENT else w for w in words],
        "typo": [*words, "--mgd-reducr", "amp"],
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no folder", "data folder /nowhere does not exist"),
        ("arch", "at least one channel"),
        ("no teacher", "train a teacher with mgd train and give its best.pth with --teacher-resume"),
        ("pretrained", "no pretrained weights of cifar_resnet8_w0.5: give a file by --student-resume"),
        ("missing", "does not exist"),
        ("truncated", "it is truncated or damaged"),
        ("network", "does not fit cifar_resnet8"),
        ("order", "another order: class 0 is 'sky' in the checkpoint, but 'bar' in the data"),
        ("count", "has 4 classes, but this run has 3"),
        ("classes", "--num-classes 2 is less than the 3 class folders"),
        ("tap", "nearest are layer"),
        ("taps count", "equally many taps for mgd; got 2"),
        ("no map", "term mgd: expected a map (B, C, H, W)"),
        ("ambiguous", "'layer3.0.relu@in#-1' for the last"),
        ("output", "exists already and is not overwritten"),
        ("resume", "holds only weights"),
        ("read only", "--output /proc/run cannot be made"),
        ("size", "timm:levit_128s does not run at --img-size 16"),
        ("typo", "close ones are --mgd-reducer"),
    ],
)
def test_mistakes_get_one_line_and_status_2(
    name: str, message: str, distil: list[str], tmp_path: Path, capsys: Any
) -> None:
    words = mistake(name, distil, tmp_path)
    assert main_mgd.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("main_mgd.py: ") and captured.err.count("\n") == 1
    assert message in captured.err and "epoch" not in captured.out
    assert not (tmp_path / "run").exists()


def test_resuming_with_another_reducer_is_refused(distil: list[str], capsys: Any) -> None:
    assert main_mgd.main(options(distil, epochs="1")) == 0
    words = options(distil, mgd_reducer="sm", resume=str(Path(distil[-1]) / "last.pth"))
    assert main_mgd.main(words) == 2
    assert "mgd.reducer sm, was amp" in capsys.readouterr().err
    assert main_mgd.main(options(distil, epochs="1", resume=str(Path(distil[-1]) / "last.pth"))) == 2
    assert "run that is complete: raise --epochs" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_named(workers: str, distil: list[str], photos: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "train" / "dot" / "bad.png").write_bytes(b"\x89PNG but no more")
    assert main_mgd.main([str(tmp_path / "photos"), *options(distil, j=workers)[1:]]) == 2
    error = capsys.readouterr().err
    assert "bad.png cannot be read" in error and error.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run(distil: list[str], capfd: Any) -> None:
    assert main_mgd.main(options(distil, lr="1e30", epochs="3")) == 1
    assert "lower --lr" in capfd.readouterr().err


def test_best_pth_is_of_the_best_epoch_also_when_a_run_resumes(photos: Path, tmp_path: Path) -> None:
    results = [40.0, 70.0, 70.0, 60.0, 80.0]

    class Given(Engine):
        """An engine whose evaluations give these results."""

        def evaluate(self, *inputs: Any, **named: Any) -> dict[str, float]:
            return {**super().evaluate(*inputs, **named), "valid_top1": results.pop(0)}

    words = [str(photos), "-a", STUDENT, *SMALL, "--output", str(tmp_path / "run"), "--resume", "auto", "--epochs"]
    kept = []
    for epochs in ("2", "4", "5"):
        assert run_trainer([*words, epochs], lambda _: None, main_base, engine=Given) == 0
        best, last = (torch.load(tmp_path / "run" / f"{n}.pth", weights_only=True) for n in ("best", "last"))
        kept.append((best["state_dict"]["conv1.weight"], last["state_dict"]["conv1.weight"]))
    assert torch.equal(*kept[0]) and torch.equal(kept[1][0], kept[0][0])  # the first of equals
    assert not torch.equal(*kept[1]) and torch.equal(*kept[2])


def test_a_run_may_begin_at_a_later_epoch(photos: Path, tmp_path: Path) -> None:
    words = [str(photos), "-a", STUDENT, *SMALL, "--epochs", "3", "--start-epoch", "2", "--lr-drop-epochs", "1"]
    assert main_base.main([*words, "--output", str(tmp_path / "run")]) == 0
    assert [(line["epoch"], line["learning_rate"]) for line in records(tmp_path / "run")] == [(2, pytest.approx(0.005))]


@pytest.mark.parametrize("script", [main_base, main_mgd])
def test_labels_are_smoothed_by_the_option(script: Any, distil: list[str], tmp_path: Path) -> None:
    words = options(without(distil, "--loss-factor"), epochs="1", lr="1e-12", distiller="kd")
    if script is main_base:
        words = without(words, "--teacher-arch", "--teacher-resume", "--distiller")
    found = []
    for smoothing in ("0", "0.5"):
        words = options(words, label_smoothing=smoothing, output=str(tmp_path / smoothing))
        assert script.main(words) == 0
        found.append(records(tmp_path / smoothing)[0]["train_ce"])
    assert found[1] != pytest.approx(found[0], rel=1e-3)


def test_calibration_takes_the_largest_weight_of_a_schedule_and_so_many_steps(
    distil: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    passed: list[int] = []

    def note(number: int, _: torch.Tensor) -> None:
        passed.append(number)

    words = [*options(distil, distiller="mgd+kd", epochs="4"), "--term", "kd.weight=3", "--term", "kd.warmup=2"]
    assert run_changed([*words, "--calibrate", "2"], partial(before_forward, hook=note)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kd ") and "share" in line]
    assert "weight 3 " in line and len(passed) == 2
