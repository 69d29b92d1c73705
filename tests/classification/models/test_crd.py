"""The networks of CIFAR-100's usual pairs: they take shared files, and compute what the shared code computes."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from classification import main_base
from classification.models import NETWORKS, build, default_taps
from classification.models.states import choose_state
from mgd import Taps
from tests.classification.conftest import SMALL
from tests.classification.test_main import options

# Computed by the code of megvii-research/mdistiller (commit e8c5bb3): the number of weights with 100 classes, and the
# first two logits with 10, of the weights and the image below.
SHARED = {
    "crd_resnet20": (278324, (0.911236, 2.25891)),
    "crd_resnet32": (472756, (1.82997, 3.29308)),
    "crd_resnet44": (667188, (2.43504, 3.91964)),
    "crd_resnet56": (861620, (4.03599, 3.53697)),
    "crd_resnet110": (1736564, (14.9473, 8.11436)),
    "crd_resnet8x4": (1233540, (0.0773125, 0.148862)),
    "crd_resnet32x4": (7433860, (0.801725, -1.19105)),
    "crd_resnet50": (23705252, (-2.2295, -3.56421)),
    "crd_wrn_16_2": (703284, (0.615841, -0.13422)),
    "crd_wrn_40_1": (569780, (0.633593, 0.516105)),
    "crd_wrn_40_2": (2255156, (0.43043, -0.61339)),
    "crd_vgg8": (3965028, (0.333232, 0.0536927)),
    "crd_vgg13": (9462180, (1.00946, -0.00785905)),
    "crd_shufflenet_v1": (949258, (-0.808625, -5.78792)),
    "crd_shufflenet_v2": (1355528, (-0.147824, -0.14017)),
    "crd_mobilenet_v2": (812836, (-0.164809, 0.266339)),
}
# Our names, and those of the shared files, where they differ; the first that matches counts.
SHARED_NAMES = {
    "crd_resnet50": [(r"downsample", "shortcut"), (r"^fc", "linear")],
    "crd_wrn": [
        (r"^layer(\d)\.(\d+)\.shortcut", r"block\1.layer.\2.convShortcut"),
        (r"^layer(\d)", r"block\1.layer"),
        (r"^bn\.", "bn1."),
        (r"^linear", "fc"),
    ],
    "crd_shufflenet_v2": [
        (r"^conv1\.0", "conv1"),
        (r"^conv1\.1", "bn1"),
        (r"^conv5\.0", "conv2"),
        (r"^conv5\.1", "bn2"),
        (r"^fc", "linear"),
        *((rf"^stage2\.0\.branch1\.{n}", f"layer1.0.{new}") for n, new in enumerate(("conv1", "bn1", "conv2", "bn2"))),
        *((rf"^stage3\.0\.branch1\.{n}", f"layer2.0.{new}") for n, new in enumerate(("conv1", "bn1", "conv2", "bn2"))),
        *((rf"^stage4\.0\.branch1\.{n}", f"layer3.0.{new}") for n, new in enumerate(("conv1", "bn1", "conv2", "bn2"))),
        *(
            (rf"^stage{stage}\.({'0' if first else '[1-9]'})\.branch2\.{n}", rf"layer{stage - 1}.\1.{kind}{number}")
            for stage in (2, 3, 4)
            for first in (True, False)
            for n, kind, number in (
                (0, "conv", 3 if first else 1),
                (1, "bn", 3 if first else 1),
                (3, "conv", 4 if first else 2),
                (4, "bn", 4 if first else 2),
                (5, "conv", 5 if first else 3),
                (6, "bn", 5 if first else 3),
            )
        ),
    ],
}


def shared_name(arch: str, name: str) -> str:
    for start, pairs in SHARED_NAMES.items():
        for pattern, new in pairs if arch.startswith(start) else ():
            named, done = re.subn(pattern, new, name)
            if done:
                return named
    return name


def filled(name: str, value: Tensor) -> Tensor:
    """Numbers that depend on a tensor's name in a shared file, so that one in the wrong place is noticed."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1)
    if name.endswith("running_var"):
        return 0.5 + torch.rand(value.shape, generator=generator)
    if value.ndim == 1:
        return 0.2 + 0.3 * torch.rand(value.shape, generator=generator)
    deviation: float = (2 / value.shape[1:].numel()) ** 0.5
    return deviation * torch.randn(value.shape, generator=generator)


def shared_file(arch: str) -> dict[str, Tensor]:
    state = build(arch, 10).state_dict()
    named = {shared_name(arch, name): value for name, value in state.items()}
    assert len(named) == len(state)
    return {name: filled(name, value) for name, value in named.items()}


def test_every_network_is_listed() -> None:
    assert {name for name in NETWORKS if name.startswith("crd_")} == set(SHARED)


@pytest.mark.parametrize("arch", SHARED)
def test_a_shared_file_is_taken_and_computes_what_the_shared_code_computes(arch: str) -> None:
    number, expected = SHARED[arch]
    network, state = build(arch, 10), shared_file(arch)
    classes = sum(p.numel() for p in build(arch, 100).parameters()) if arch != "crd_resnet50" else number
    assert classes == number
    network.load_state_dict(choose_state(network, {"model": state}).state)
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        logits = network.eval()(image)[0]
        outputs = Taps(network, default_taps(arch, network) or [])(image)
    assert logits[:2].tolist() == pytest.approx(expected, rel=2e-3, abs=1e-5)
    assert [m.ndim for m in outputs.features] == [4] * len(outputs.features) and len(outputs.features) >= 3
    plain = build(arch, 10)
    plain.load_state_dict(dict(state))  # without this project's reading of files
    plain.load_state_dict(network.state_dict())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in plain.state_dict().items())


def test_a_shared_file_is_evaluated_by_its_name(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {
        name: value[:3] if name.startswith("fc.") else value for name, value in shared_file("crd_wrn_16_2").items()
    }
    torch.save({"model": state, "epoch": 240}, tmp_path / "ckpt_epoch_240.pth")
    words = [str(photos), "-a", "crd_wrn_16_2", "--student-resume", str(tmp_path / "ckpt_epoch_240.pth"), "--evaluate"]
    assert main_base.main([*options([*words, *SMALL[:2]], img_size="32"), "-j", "0"]) == 0
    assert "student crd_wrn_16_2, 0.69 M parameters: top-1" in capsys.readouterr().out
