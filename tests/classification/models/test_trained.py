from __future__ import annotations

from pathlib import Path

import pytest
import torch

from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import build
from classification.models.trained import open_trained
from tests.classification.conftest import CLASSES, TEACHER


def test_a_checkpoint_of_ours_says_all(teacher: Path) -> None:
    found = open_trained(teacher)
    assert (found.arch, found.num_classes, found.classes) == (TEACHER, 3, list(CLASSES))
    assert found.preprocessing == Preprocessing.of(16, "pad") and not found.network.training
    content = torch.load(teacher, weights_only=True)
    for name, value in found.network.state_dict().items():
        assert torch.equal(value, content["state_dict"][name])


def test_plain_weights_need_their_name_alone(tmp_path: Path) -> None:
    torch.save(build("cifar_resnet20", 7).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="does not name its network: name it with --arch"):
        open_trained(tmp_path / "plain.pth")
    found = open_trained(tmp_path / "plain.pth", "cifar_resnet20")
    assert (found.num_classes, found.classes) == (7, None) and found.preprocessing == Preprocessing()


def test_a_network_that_is_not_known_is_named(tmp_path: Path) -> None:
    content = {"arch": "nobodys_net", "state_dict": build("cifar_resnet20", 7).state_dict()}
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="says 'nobodys_net', which is no network here: name it with --arch"):
        open_trained(tmp_path / "other.pth")
