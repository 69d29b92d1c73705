"""Whole runs of other terms than the published ones: sums, several teachers, no labels, mutual learning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms as T

from classification import main_base, main_mgd
from classification.data.folders import DataFolder
from classification.data.preprocessing import MEAN, STD, Preprocessing, normalise
from classification.models import build
from classification.options.options import make_options
from classification.options.terms import TermSpec
from classification.runs.world import Seed
from classification.training.distillation import view_of
from classification.training.job import Job
from classification.training.sources import Sources
from classification.training.starting import _add_teacher
from mgd.losses import KD, LOSSES
from tests.classification.conftest import SMALL
from tests.classification.runs.test_resume import differences  # noqa: F401
from tests.classification.test_main import options, records, without


def run(words: list[str]) -> list[dict[str, Any]]:
    assert main_mgd.main(words) == 0
    return records(Path(words[words.index("--output") + 1]))


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"ce", "dml"}))
def test_every_term_trains_by_its_name(name: str, distil: list[str]) -> None:
    words = options(without(distil, "--loss-factor"), distiller=name, epochs="1")
    if name == "udml":
        words = without(words, "--teacher-arch", "--teacher-resume")
    (record,) = run(words)
    assert record[f"train_{name}"] > 0
    weighted = sum(value for key, value in record.items() if key.endswith("_weighted"))
    assert weighted == pytest.approx(record["train_loss"], rel=1e-5)
    assert ("train_ce" in record) == (name not in ("meal", "ssld"))


def test_parameters_of_a_term_train_and_resume(distil: list[str]) -> None:
    words = options(without(distil, "--loss-factor"), distiller="afd+crd", epochs="1")
    run(words)
    folder = Path(words[words.index("--output") + 1])
    before = torch.load(folder / "last.pth", weights_only=True)["resume"]["terms"]
    again = [*options(without(words, "--output"), epochs="2"), "--resume", str(folder / "last.pth")]
    assert main_mgd.main(again) == 0 and len(records(folder)) == 2
    after = torch.load(folder / "last.pth", weights_only=True)["resume"]["terms"]
    for name in ("afd", "crd"):
        changed = [key for key in before[name] if not torch.equal(before[name][key], after[name][key])]
        assert any(key.endswith("weight") for key in changed)


def test_all_terms_at_once_go_on_as_if_uncut(
    distil: list[str],
    tmp_path: Path,
    differences: Any,  # noqa: F811
) -> None:
    words = options(distil, distiller="+".join(sorted(LOSSES.keys() - {"ce", "dml", "udml"})), lr_drop_epochs="90")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(options(words, epochs="2", output=str(whole)))
    run(options(words, epochs="1", output=str(cut)))
    assert main_mgd.main([*options(words, epochs="2", output=str(cut)), "--resume", str(cut / "last.pth")]) == 0
    assert differences(cut, whole) == []


def test_terms_are_logged_raw_weighted_and_by_their_share_of_the_gradient(distil: list[str]) -> None:
    words = options(distil, distiller="mgd+kd", epochs="2")
    for record in run([*words, "--term", "kd.decay=linear", "--term", "kd.weight=3"]):
        names = ("ce", "mgd", "kd")
        weighted = [record[f"train_{name}_weighted"] for name in names]
        assert sum(weighted) == pytest.approx(record["train_loss"], rel=1e-5)
        factor = 3.0 if record["epoch"] == 0 else 1.5
        assert record["train_kd_weighted"] == pytest.approx(factor * record["train_kd"])
        shares = [record[f"gradient_share_{name}"] for name in names]
        assert sum(shares) == pytest.approx(1.0) and min(shares) > 0


def test_training_without_labels_takes_a_plain_folder(
    distil: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "unlabelled"
    shutil.copytree(photos / "valid", root / "valid")
    (root / "train").mkdir()
    for number, path in enumerate(sorted((photos / "train").rglob("*.*"))):
        shutil.copy(path, root / "train" / f"{number}{path.suffix}")
    words = without(distil, "--loss-factor", "--distiller", "--mgd-update-freq", "--mgd-max-images")
    words = [str(root), *words[1:], "--distiller", "kd"]
    assert main_mgd.main(words) == 2
    assert "class folders" in capsys.readouterr().err
    for record in run([*words, "--labels", "0"]):
        assert "train_ce" not in record and "train_top1" not in record and record["train_kd"] > 0


def test_every_teacher_has_a_matching_of_its_own(distil: list[str], tmp_path: Path) -> None:
    teacher = distil[distil.index("--teacher-resume") + 1]
    words = options(distil, teacher_arch="cifar_resnet8,cifar_resnet8", teacher_resume=f"{teacher},{teacher}")
    (alone,) = run(options(distil, epochs="1", lr="1e-9", output=str(tmp_path / "alone")))
    (twice,) = run(options(words, epochs="1", lr="1e-9", output=str(tmp_path / "twice")))  # twice the same one
    assert twice["train_mgd"] == pytest.approx(alone["train_mgd"], rel=1e-5)
    assert twice["flow_cost"] == pytest.approx(2 * alone["flow_cost"])
    again = [
        *options(words, lr="1e-9", output=str(tmp_path / "twice")),
        "--resume",
        str(tmp_path / "twice" / "last.pth"),
    ]
    assert main_mgd.main(again) == 0
    terms = torch.load(tmp_path / "twice" / "last.pth", weights_only=True)["resume"]["terms"]["mgd"]
    index = [terms[f"terms.{number}.stages.0.index"] for number in range(2)]
    assert torch.equal(*index) and (index[0] >= 0).any()


def test_teachers_may_teach_as_one(distil: list[str], photos: Path, tmp_path: Path) -> None:
    """Twice the same teacher is that teacher; two that differ are not the mean of what each says."""
    other = tmp_path / "other.pth"
    torch.manual_seed(5)
    torch.save(build("cifar_resnet8", 3).state_dict(), other)
    one = distil[distil.index("--teacher-resume") + 1]
    words = without(distil, "--loss-factor", "--mgd-update-freq", "--mgd-max-images")
    words = options(words, distiller="kd", epochs="1", lr="1e-9", kd_temperature="1")
    found = {}
    for name, files in {"alone": one, "twice": f"{one},{one}", "both": f"{one},{other}"}.items():
        archs = ",".join(["cifar_resnet8"] * (files.count(",") + 1))
        for mean in ("terms", "probabilities")[: 1 + files.count(",")]:
            more = {"teacher_arch": archs, "teacher_resume": files, "teacher_mean": mean}
            (record,) = run(options(words, output=str(tmp_path / f"{name}-{mean}"), **more))
            found[name, mean] = record["train_kd"]
    assert found["twice", "probabilities"] == pytest.approx(found["alone", "terms"], rel=1e-4)
    # KL is convex in its first argument
    assert found["both", "probabilities"] < found["both", "terms"] - 1e-3


def test_teachers_count_by_the_weights_of_a_recipe(distil: list[str], tmp_path: Path) -> None:
    one, other = distil[distil.index("--teacher-resume") + 1], tmp_path / "other.pth"
    torch.manual_seed(5)
    torch.save(build("cifar_resnet8", 3).state_dict(), other)
    words = options(without(distil, "--teacher-arch", "--teacher-resume"), epochs="1", lr="1e-9", distiller="mgd+kd")
    files, found = {"one": one, "other": other}, {}
    for name, weights in {"first": {"one": 1}, "second": {"other": 1}, "both": {"one": 3, "other": 1}}.items():
        teachers = [{"arch": "cifar_resnet8", "resume": str(files[n]), "weight": w} for n, w in weights.items()]
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"teachers": teachers}))
        for mean in ("terms", "probabilities")[: len(weights)]:
            more = {"distiller": "kd"} if mean == "probabilities" else {}
            run_words = options(words, config=str(tmp_path / f"{name}.yaml"), teacher_mean=mean, **more)
            if more:
                run_words = without(run_words, "--loss-factor")
            (found[name, mean],) = run(options(run_words, output=str(tmp_path / f"{name}-{mean}")))
    first, second, both = (found[name, "terms"] for name in ("first", "second", "both"))
    for term in ("train_kd", "train_mgd"):
        assert both[term] == pytest.approx((3 * first[term] + second[term]) / 4, rel=1e-4)
        assert first[term] != pytest.approx(second[term], rel=2e-3)
    joint = found["both", "probabilities"]["train_kd"]  # nearer to the heavier teacher than to the other
    assert joint < both["train_kd"] and joint != pytest.approx((first["train_kd"] + second["train_kd"]) / 2, rel=1e-3)


def test_terms_that_pair_no_taps_take_other_numbers_of_them(distil: list[str], tmp_path: Path) -> None:
    words = without(distil, "--loss-factor", "--mgd-update-freq", "--mgd-max-images")
    words = options(words, distiller="afd+crd", student_taps="layer2,layer3", teacher_taps="layer3", epochs="1")
    (record,) = run(words)
    assert record["train_afd"] > 0 and record["train_crd"] > 0


def test_terms_of_maps_behind_the_relu_get_them_at_known_taps(distil: list[str], tmp_path: Path) -> None:
    """AT at the taps of the family, before the ReLU of each stage, is AT at the stages' outputs, after it."""
    words = without(distil, "--loss-factor", "--mgd-update-freq", "--mgd-max-images")
    words = options(words, distiller="at", epochs="1")
    (known,) = run(options(words, output=str(tmp_path / "known")))
    (named,) = run(options(words, output=str(tmp_path / "named"), taps="layer1,layer2,layer3"))
    (before,) = run(
        options(words, output=str(tmp_path / "before"), taps=",".join(f"layer{n}.0.relu@in#-1" for n in (1, 2, 3)))
    )
    assert known["train_at"] == pytest.approx(named["train_at"], rel=1e-4)
    assert before["train_at"] != pytest.approx(named["train_at"], rel=1e-2)


def test_logits_are_standardised_by_a_recipe(distil: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("terms: {ce: , kd: {temperature: 2, weight: 9, standardised: true}}\n")
    words = without(distil, "--loss-factor", "--mgd-update-freq", "--mgd-max-images", "--distiller")
    words = options(words, config=str(tmp_path / "r.yaml"), epochs="1")
    (standardised,) = run(options(words, output=str(tmp_path / "yes")))
    (plain,) = run([*options(words, output=str(tmp_path / "no")), "--term", "kd.standardised=false"])
    assert standardised["train_kd"] != pytest.approx(plain["train_kd"], rel=1e-2)


def test_a_downloaded_teacher_brings_its_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classification.training.starting.load_pretrained", lambda *_, **__: "loaded")
    parsed = make_options({"img_size": 64}, table={"kd": TermSpec(KD, KD.Hyper())})
    job = Job(parsed, Seed(0, True), DataFolder([], [], []), num_classes=1000, preprocessing=Preprocessing.of(64))
    spec: dict[str, Any] = {"arch": "timm:tf_mobilenetv3_small_100.in1k"}
    own: dict[str, Any] = {**spec, "mean": [0.1, 0.2, 0.3]}
    plain: dict[str, Any] = {"arch": "resnet18"}
    for teacher in (spec, own, plain):
        _add_teacher(job, Sources(img_size=64), teacher, None)
    half, seen = (0.5, 0.5, 0.5), job.teacher_preprocessing
    assert [(p.mean, p.std) for p in seen] == [(half, half), ((0.1, 0.2, 0.3), half), (MEAN, STD)]
    assert {p.img_size for p in seen} == {64}  # as it was asked for
    assert set(spec) == {"arch"}  # options stay what they are


def test_calibration_prints_weights_that_balance_and_trains_nothing(
    distil: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(distil, distiller="mgd+kd")
    assert main_mgd.main([*words, "--calibrate", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "gradient share" in line]
    found = {line.split()[0]: line.split()[-1].partition("=")[2] for line in lines}
    assert set(found) == {"ce", "mgd", "kd"} and float(found["ce"]) == 1.0
    assert not (Path(words[words.index("--output") + 1]) / "metrics.jsonl").exists()
    changed = [word for name, weight in found.items() for word in ("--term", f"{name}.weight={weight}")]
    assert main_mgd.main([*words, "--calibrate", "2", *changed]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "gradient share" in line]
    for line in lines:
        assert float(line.partition("share")[2].split()[0]) == pytest.approx(1 / 3, abs=0.01)


def test_peers_train_together_and_are_all_kept(distil: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = without(distil, "--teacher-resume", "--loss-factor", "--mgd-update-freq", "--mgd-max-images")
    words = options(words, distiller="dml", teacher_arch="cifar_resnet8_w0.5,cifar_resnet8", epochs="3")
    for record in run(words):
        names = [f"{name}{peer}" for peer in ("", "_peer1", "_peer2") for name in ("ce", "dml")]
        assert sum(record[f"train_{name}_weighted"] for name in names) == pytest.approx(record["train_loss"], rel=1e-5)
        assert {"valid_top1", "valid_top1_peer1", "valid_top1_peer2"} <= set(record)
    folder = Path(words[words.index("--output") + 1])
    states = []
    for name in ("best", "peer1", "peer2"):
        content = torch.load(folder / f"{name}.pth", weights_only=True)
        build(content["arch"], 3).load_state_dict(content["state_dict"])
        states.append(content["state_dict"]["conv1.weight"])
    assert not torch.equal(states[0], states[1])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number, arch in ((1, "cifar_resnet8_w0.5"), (2, "cifar_resnet8")):
        best = max(record[f"valid_top1_peer{number}"] for record in records)
        capsys.readouterr()
        words = [distil[0], "-a", arch, *SMALL, "-e", "--student-resume", str(folder / f"best_peer{number}.pth")]
        assert main_base.main(words) == 0
        assert f"top-1 {best:.2f}" in capsys.readouterr().out


def test_mutual_learning_with_a_frozen_network_is_refused(
    distil: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("teachers: [{arch: resnet18}]\nterms: {ce: {}, dml: {}}\n")
    assert main_mgd.main([distil[0], "--config", str(tmp_path / "r.yaml")]) == 2
    assert "dml trains every network, but resnet18 is frozen" in capsys.readouterr().err


def test_a_view_shows_a_teacher_the_images_that_it_knows() -> None:
    pixels = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    usual, mean, std = Preprocessing.of(16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    shown = view_of(usual, Preprocessing(16, 20, mean=mean, std=std))
    assert shown is not None and view_of(usual, Preprocessing.of(16, "pad")) is None
    expected = T.Normalize(mean, std)(pixels.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(shown(normalise(pixels)), expected, rtol=1e-4, atol=1e-4)
    larger = view_of(usual, Preprocessing.of(24))
    assert larger is not None and larger(normalise(pixels)).shape == (2, 3, 24, 24)


@pytest.mark.parametrize(
    ("name", "changes", "weight"),
    [
        ("kd", {"distiller": "kd", "kd_weight": "3"}, 3.0),
        ("mgd", {"mgd_form": "mean", "mgd_weight": "7"}, 7.0),
        ("mgd", {"mgd_form": "relative"}, 5.0),
        ("kd", {"distiller": "dml+kd", "kd_weight": "3"}, 3.0),
    ],
)
def test_options_weigh_their_terms(name: str, changes: dict[str, str], weight: float, distil: list[str]) -> None:
    words = options(without(distil, "--loss-factor"), epochs="1", **changes)
    if "dml" in changes.get("distiller", ""):
        words = without(words, "--teacher-arch", "--teacher-resume")
    assert main_mgd.main(words) == 0
    (record,) = records(Path(distil[-1]))
    assert record[f"train_{name}_weighted"] == pytest.approx(weight * record[f"train_{name}"])


def test_a_stage_whose_teacher_is_nowhere_positive_is_named_before_training(
    distil: list[str], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(teacher, weights_only=True)
    content["state_dict"]["layer3.0.bn2.bias"] -= 1e3
    torch.save(content, tmp_path / "dead.pth")
    words = without(distil, "--loss-factor", "--teacher-resume")
    (record,) = run(
        options(words, distiller="mgd", mgd_form="relative", teacher_resume=str(tmp_path / "dead.pth"), epochs="1")
    )
    said = capsys.readouterr().out
    warnings = [line for line in said.splitlines() if "is nowhere positive" in line]
    assert len(warnings) == 1 and "tap layer3.0.relu@in#-1 (stage 2)" in warnings[0]
    assert 0 < record["train_mgd"] < 300


def test_dkd_of_one_class_is_refused_before_training(
    distil: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "valid"):
        shutil.copytree(photos / split / "bar", tmp_path / "one" / split / "bar")
    torch.save(build("cifar_resnet8", 1).state_dict(), tmp_path / "one.pth")
    words = options(without(distil, "--loss-factor"), distiller="dkd", teacher_resume=str(tmp_path / "one.pth"))
    assert main_mgd.main([str(tmp_path / "one"), *words[1:]]) == 2
    assert "term dkd: dkd needs 2 classes or more; got (1, 1) of the student" in capsys.readouterr().err


def test_two_terms_that_match_keep_and_log_each_its_own(distil: list[str]) -> None:
    """OFD starts from flows that it finds by itself: before training, those of mgd on the same maps and images."""
    words = [*options(distil, distiller="mgd+ofd", mgd_update_freq="1"), "--term", "ofd.init=flow"]
    first, second = run(words)
    assert first["flow_cost"] == pytest.approx(first["ofd_flow_cost"]) and "ofd_flow_cost" not in second
    folder = Path(words[words.index("--output") + 1]) / "flow"
    with np.load(folder / "0000.npz") as kept:
        for stage in range(3):
            assert np.array_equal(kept[f"index{stage}"], kept[f"ofd_index{stage}"])
    with np.load(folder / "0001.npz") as later:
        assert not [name for name in later if name.startswith("ofd_")]
