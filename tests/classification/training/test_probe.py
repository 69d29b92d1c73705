"""A head on a network that stays as it is, and teachers that have no classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from classification import main_base, main_mgd
from classification.errors import UserError
from classification.models import build
from classification.models.heads import freeze_body
from tests.classification.test_main import records

FAST = ["--img-size", "32", "-b", "9", "-j", "0", "--seed", "0"]


def test_the_head_alone_trains_and_all_else_is_still() -> None:
    net = build("resnet18", 3)
    still = freeze_body(net, 32)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    assert set(net.modules()) - set(still) == {net.get_submodule("fc")}


def test_a_network_whose_logits_are_no_linear_layers_has_no_head() -> None:
    with pytest.raises(UserError, match="this network has none"):
        freeze_body(nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a network that was built without classes, as those of DINOv2 are."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tower") / "tower.pth"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), path)
    return path


def test_one_command_gives_a_tower_a_head(
    photos: Path, tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, words = tmp_path / "run", [str(photos), "-a", "timm:test_resnet", *FAST]
    probe = [*words, "--linear-probe", "1", "--lr", "1", "--epochs", "2", "--output", str(folder)]
    assert main_base.main(probe) == 2 and "needs a network with weights" in capsys.readouterr().err
    assert main_base.main([*probe, "--student-resume", str(tower)]) == 0
    said = capsys.readouterr().out
    assert "which has no head: it is fresh" in said and "weights train, those of the head" in said
    before = torch.load(tower, weights_only=True)
    after = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    assert set(after) - set(before) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(after[name], value) for name, value in before.items())  # statistics of norms among them
    assert [line["epoch"] for line in records(folder)] == [0, 1]
    assert main_base.main(["--resume", str(folder), "--epochs", "3"]) == 0
    again = torch.load(folder / "last.pth", weights_only=True)["state_dict"]
    assert torch.equal(again["conv1.0.weight"], before["conv1.0.weight"])
    assert not torch.equal(again["fc.weight"], after["fc.weight"])


def test_a_teacher_without_a_classifier_teaches_by_its_maps_alone(
    photos: Path, tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(photos), "-a", "cifar_resnet8_w0.5", "--teacher-arch", "timm:test_resnet", *FAST, "--epochs", "1"]
    words += ["--teacher-resume", str(tower), "--output", str(tmp_path / "run")]
    assert main_mgd.main([*words, "--distiller", "mgd"]) == 0
    assert "the teacher timm:test_resnet has no classifier: only its maps are used" in capsys.readouterr().out
    assert records(tmp_path / "run")[0]["train_mgd"] > 0


def test_logits_of_a_teacher_without_a_classifier_are_refused_with_the_command_that_gives_it_one(
    photos: Path, tower: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(photos), "-a", "cifar_resnet8_w0.5", "--teacher-arch", "timm:test_resnet", *FAST]
    assert main_mgd.main([*words, "--teacher-resume", str(tower), "--distiller", "mgd+kd"]) == 2
    said = capsys.readouterr().err
    assert f"-a timm:test_resnet --student-resume {tower} --linear-probe 1" in said and "--distiller mgd" in said
    assert main_mgd.main([*words, "--linear-probe", "1"]) == 2
    assert "--linear-probe has no effect here: it works only with main_base.py" in capsys.readouterr().err
