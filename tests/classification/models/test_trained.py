from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
    assert (found.num_classes, found.classes) == (7, None)


@pytest.mark.parametrize(
    ("arch", "side"), [("cifar_resnet8_w0.5", 32), ("crd_vgg8", 32), ("cifar_mobilenet_v2", 32), ("mobilenet_v1", 224)]
)
def test_plain_weights_of_networks_for_cifar_see_its_size(arch: str, side: int, tmp_path: Path) -> None:
    torch.save(build(arch, 7).state_dict(), tmp_path / "plain.pth")
    expected = Preprocessing.of(32, "pad") if side == 32 else Preprocessing()
    assert open_trained(tmp_path / "plain.pth", arch).preprocessing == expected and expected.img_size == side


@pytest.mark.parametrize("arch", ["timm:mobilenetv3_small_050", "mobilenet_v1", "torchvision:shufflenet_v2_x0_5"])
def test_the_number_of_classes_is_that_of_the_head_in_any_order_of_the_file(arch: str, tmp_path: Path) -> None:
    state = build(arch, 7).state_dict()
    order = sorted(state, key=lambda name: (state[name].shape[:1] != (7,), name))  # the head first
    save_file({f"module.{name}": state[name].contiguous() for name in reversed(order)}, tmp_path / "plain.safetensors")
    assert open_trained(tmp_path / "plain.safetensors", arch).num_classes == 7


def test_a_network_that_is_not_known_is_named(tmp_path: Path) -> None:
    content = {"arch": "nobodys_net", "state_dict": build("cifar_resnet20", 7).state_dict()}
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="says 'nobodys_net', which is no network here: name it with --arch"):
        open_trained(tmp_path / "other.pth")
