from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor

from classification.errors import UserError
from classification.models import build
from classification.models.pretrained import load_pretrained
from classification.models.weights import load_file, read_weights

ARCH, CLASSES = "cifar_resnet8_w0.5", ["cat", "dog", "eel"]


def load(model: torch.nn.Module, path: Path, classes: list[str] | None = CLASSES) -> str:
    return load_file(model, path, arch=ARCH, num_classes=3, classes=classes)


def described(**changes: Any) -> dict[str, object]:
    return {
        "state_dict": build(ARCH, 3).state_dict(),
        "arch": ARCH,
        "num_classes": 3,
        "classes": CLASSES,
        **changes,
    }


def test_another_size_of_the_images_is_said(tmp_path: Path) -> None:
    torch.save(described(img_size=96), tmp_path / "w.pth")
    said = [
        load_file(build(ARCH, 3), tmp_path / "w.pth", arch=ARCH, num_classes=3, classes=CLASSES, img_size=size)
        for size in (96, 224)
    ]
    assert "px" not in said[0] and "trained at 96 px, it will see 224 px" in said[1]


@pytest.mark.parametrize("form", ["plain", "nested", "parallel"])
def test_published_forms_load(form: str, tmp_path: Path) -> None:
    state = build(ARCH, 3).state_dict()
    content = {
        "plain": state,
        "nested": {"epoch": 3, "state_dict": state},
        "parallel": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    }[form]
    torch.save(content, tmp_path / "w.pth")
    model = build(ARCH, 3)
    line = load(model, tmp_path / "w.pth")
    assert "order could not be checked" in line
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (described(arch="resnet18"), "holds a resnet18"),
        (described(num_classes=4), "has 4 classes, but this run has 3"),
        (described(classes=["dog", "cat", "eel"]), "another order: class 0 is 'dog' in the checkpoint, but 'cat'"),
        (described(classes=["cat", "dog", "emu"]), "differ: class 2 is 'emu' in the checkpoint, but 'eel'"),
        ({"state_dict": build(ARCH, 4).state_dict()}, "has 4 classes, but this run has 3"),
        ({**build(ARCH, 3).state_dict(), "linear.bias": torch.tensor(0.0)}, "1 of another shape"),
        ({**build(ARCH, 3).state_dict(), "bn1.num_batches_tracked": torch.zeros(2)}, "1 of another shape"),
        ({**build(ARCH, 3).state_dict(), "bn1.running_var": torch.full((8,), torch.nan)}, "not finite .in bn1.running"),
        (described(classes=[1, 2, 3], format=4), "its 'classes' are not names"),
        (build("cifar_resnet14_w0.5", 3).state_dict(), "does not fit .*unexpected"),
        (build("cifar_resnet8", 3).state_dict(), "does not fit .*another shape"),
        ({}, "holds no weights"),
        ({"epoch": 3}, "holds no weights"),
        ([1, 2], "holds a list"),
    ],
)
def test_what_does_not_fit_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    model = build(ARCH, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load(model, tmp_path / "w.pth")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_broken_files_are_refused(tmp_path: Path) -> None:
    torch.save(described(), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for name, content in (("half", data[: len(data) // 2]), ("empty", b""), ("text", b"hello"), ("code", b"")):
        path = tmp_path / f"{name}.pth"
        path.write_bytes(pickle.dumps(print) if name == "code" else content)
        with pytest.raises(UserError, match=name):
            read_weights(path)
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="is a folder: give a file of weights, or the folder of a run"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("described_as", "number", "said"),
    [
        ({"num_classes": 7, "classes": list("abcdefg")}, 7, "7 -> 3 classes"),
        ({"classes": list("abc")}, 3, "for other classes"),
        (None, 7, "7 -> 3 classes"),
    ],
)
def test_a_file_of_other_classes_gives_all_but_its_head(
    described_as: dict[str, object] | None, number: int, said: str, tmp_path: Path
) -> None:
    state = build(ARCH, number).state_dict()
    torch.save(described(state_dict=state, **described_as) if described_as else state, tmp_path / "w.pth")
    model: Any = build(ARCH, 3)
    fresh = model.linear.weight.clone()
    line = load_file(model, tmp_path / "w.pth", arch=ARCH, num_classes=3, classes=CLASSES, new_head=True)
    assert f"w.pth; head swapped, {said}" in line
    assert torch.equal(model.conv1.weight, state["conv1.weight"]) and torch.equal(model.linear.weight, fresh)


def test_a_new_head_excuses_nothing_else(tmp_path: Path) -> None:
    for content, message in (
        (described(classes=["dog", "cat", "eel"]), "another order"),
        (build("cifar_resnet8", 7).state_dict(), "does not fit"),
        (described(arch="resnet18", num_classes=7), "holds a resnet18"),
    ):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(UserError, match=message):
            load_file(build(ARCH, 3), tmp_path / "w.pth", arch=ARCH, num_classes=3, classes=CLASSES, new_head=True)


def test_pretrained_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    small = torchvision.models.resnet18(num_classes=1000).state_dict()
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    asked: dict[str, object] = {}

    def get_state_dict(self: object, *args: object, **options: Any) -> dict[str, torch.Tensor]:
        asked.update(options, weights=self)
        found: dict[str, Tensor] = small
        return found

    monkeypatch.setattr(type(weights), "get_state_dict", get_state_dict)
    model: Any = build("resnet18", 3)
    assert "head swapped, 1000 -> 3" in load_pretrained(model, "resnet18", option="--student-resume")
    assert asked["weights"] is weights and asked["check_hash"] is True
    assert torch.equal(model.conv1.weight, small["conv1.weight"])


def test_offline_says_which_option_gives_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(type(torchvision.models.ResNet18_Weights.IMAGENET1K_V1), "get_state_dict", fail)
    with pytest.raises(UserError, match=r"cannot be downloaded.*--teacher-resume"):
        load_pretrained(build("resnet18", 3), "resnet18", option="--teacher-resume")
    with pytest.raises(UserError, match=r"no pretrained weights of mobilenet_v1.*--student-resume"):
        load_pretrained(build("mobilenet_v1", 3), "mobilenet_v1", option="--student-resume")


def test_no_file_is_read_in_a_way_that_runs_code() -> None:
    root = Path(__file__).parents[3]
    files = [path for room in ("classification", "mgd", "scripts") for path in (root / room).rglob("*.py")]
    lines = [
        line
        for path in files
        for line in path.read_text().splitlines()
        if re.search(r"\b(torch|pickle)\.loads?\(", line)
    ]
    assert lines and all("weights_only=True" in line for line in lines)


def test_safetensors_and_the_published_scripts_checkpoints_load_without_help(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = build("cifar_resnet8", 3).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    published = {f"module.{name}": value for name, value in state.items()}
    torch.save(
        {"epoch": 3, "arch": "cifar_resnet8", "state_dict": published, "best_acc1": torch.tensor(1.0)},
        tmp_path / "p.tar",
    )
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-100])
    for name in ("w.safetensors", "p.tar"):
        model = build("cifar_resnet8", 3)
        assert "loaded" in load_file(model, tmp_path / name, arch="cifar_resnet8", num_classes=3, classes=None)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="cannot be read"):
        load_file(model, tmp_path / "broken.safetensors", arch="cifar_resnet8", num_classes=3, classes=None)
