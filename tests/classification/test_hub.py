"""torch.hub and the Hugging Face hub: names, weights, and the way back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import hubconf
from classification.data.images import read_image, to_bytes
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import NETWORKS, build
from classification.models.hub import MEAL_V2, Classifier, from_checkpoint
from classification.models.sizes import fit_size
from classification.models.trained import open_trained
from classification.runs.checkpoint import describe_student
from tests.classification.conftest import CLASSES, TEACHER
from tests.hub import REPO, serve

ROOT = str(Path(__file__).parents[2])
# Parameters in millions, as the two hub pages have them.
MILLIONS = {
    "mealv1_resnest50": 25.6,
    "mealv2_resnest50": 25.6,
    "mealv2_resnest50_cutmix": 25.6,
    "mealv2_resnest50_380x380": 25.6,
    "mealv2_mobilenetv3_small_075": 2.04,
    "mealv2_mobilenetv3_small_100": 2.54,
    "mealv2_mobilenet_v3_large_100": 5.48,
    "mealv2_efficientnet_b0": 5.29,
    **{f"resnet18_{how}": 14 for how in ("ssl", "swsl")},
    **{f"resnet50_{how}": 25 for how in ("ssl", "swsl")},
    **{f"resnext50_32x4d_{how}": 25 for how in ("ssl", "swsl")},
    **{f"resnext101_32x4d_{how}": 42 for how in ("ssl", "swsl")},
    **{f"resnext101_32x8d_{how}": 88 for how in ("ssl", "swsl")},
    **{f"resnext101_32x16d_{how}": 193 for how in ("ssl", "swsl")},
}


def load(name: str, *words: object, **more: object) -> nn.Module:
    found: nn.Module = torch.hub.load(ROOT, name, *words, source="local", verbose=False, **more)
    return found


def images(folder: Path) -> list[Path]:
    return sorted((folder / "valid").rglob("*.png"))[:7]


def test_every_network_of_ours_is_an_entry() -> None:
    listed = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"]  # as torch.hub does
    assert {*NETWORKS, *MILLIONS, "checkpoint", "meal_v2", "resnet50d"} == set(listed)
    assert "no weights are shipped" in str(hubconf.resnet18_swsl.__doc__)


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_published_names_are_networks_of_the_published_size(name: str) -> None:
    with torch.device("meta"):
        network = load(name)
        pair = [network, load("meal_v2", name)] if name in MEAL_V2 else [network]
    for one in pair:
        count = sum(value.numel() for value in one.parameters()) / 1e6
        if name.startswith("resnet18"):  # the page says 14 of a network that has 11.7
            assert count == pytest.approx(11.69, abs=0.01)
        else:
            assert count == pytest.approx(MILLIONS[name], abs=0.01 if MILLIONS[name] < 20 else 2.3)


def test_no_weights_are_shipped() -> None:
    for words in (("resnet50_ssl",), ("meal_v2", "mealv2_resnest50_cutmix")):
        with pytest.raises(
            UserError, match=r"this project comes without weights of \w+: make them with `mgd distill DIR"
        ):
            load(*words, pretrained=True)
    with pytest.raises(UserError, match="meal_v2 has no 'mealv3': there are mealv1_resnest50, "):
        load("meal_v2", "mealv3")


def test_a_checkpoint_by_itself_and_by_its_network(teacher: Path, photos: Path, tmp_path: Path) -> None:
    trained, paths = open_trained(teacher), images(photos)
    pixels = torch.stack([to_bytes(read_image(str(path))) for path in paths])
    seen = trained.preprocessing.normalise(pixels).contiguous()
    found = load("checkpoint", str(teacher))
    assert isinstance(found, Classifier) and found.classes == list(CLASSES) and not found.training
    torch.testing.assert_close(found.read(paths), seen)
    with torch.no_grad():
        expected = trained.network(seen)
        torch.testing.assert_close(found(seen), expected)
    assert [name for name, _ in found.predict(paths)] == [CLASSES[index] for index in expected.argmax(1)]
    torch.save({**torch.load(teacher, weights_only=True), "arch": "cifar_resnet20"}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds a cifar_resnet20, not a resnet18"):
        load("resnet18", checkpoint=str(tmp_path / "other.pth"))


def test_a_network_takes_a_checkpoint(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        own = load("cifar_resnet20", num_classes=5)
    torch.save({"module." + name: value for name, value in own.state_dict().items()}, tmp_path / "a.pth")
    found = load("cifar_resnet20", checkpoint=str(tmp_path / "a.pth"))
    assert not found.training
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in found.state_dict().items())


def test_the_page_keeps_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/start/device.md runs as it stands."""
    page = Path(ROOT, "docs", "start", "device.md").read_text()
    content = {"state_dict": build("mobilenet_v1", 4).state_dict(), "arch": "mobilenet_v1", "num_classes": 4}
    about = {"classes": list("abcd"), "img_size": 32, "format": 4}
    for name in ("student", "mobilenet"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        torch.save({**content, **about}, tmp_path / "runs" / name / "best.pth")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    _, hub, pretrained = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(hub.replace('REPO = "."', f"REPO = {ROOT!r}"), scope)
    assert scope["logits"].shape == (1, 4) and scope["fresh"].num_classes == 1000
    before = scope["student"].predict(["photo.jpg"])
    exec(pretrained, scope)
    assert scope["student"].predict(["photo.jpg"]) == before and before[0][0] in "abcd"


def test_what_is_saved_is_loaded(teacher: Path, photos: Path, tmp_path: Path) -> None:
    before = load("checkpoint", str(teacher))
    assert isinstance(before, Classifier)
    before.save_pretrained(tmp_path)
    after = Classifier.from_pretrained(str(tmp_path))
    assert (after.arch, after.num_classes, after.classes) == (TEACHER, 3, list(CLASSES))
    assert after.preprocessing == before.preprocessing and not after.training
    assert after.predict(images(photos)) == before.predict(images(photos))
    (tmp_path / "other").mkdir()
    other = Classifier("cifar_resnet8_w0.5", 3)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((tmp_path / "config.json").read_text())
    with pytest.raises(RuntimeError, match="size mismatch"):
        Classifier.from_pretrained(str(tmp_path / "other"))


def test_a_classifier_is_pushed_and_loaded_again(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = from_checkpoint(teacher)
    with serve() as server:
        # HF_ENDPOINT would do the same, but is read once, when huggingface_hub is imported.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        classifier.push_to_hub(REPO, token="hf_secret")
    assert {"config.json", "model.safetensors", "README.md"} <= set(server.files)
    for name, content in server.files.items():
        (tmp_path / name).write_bytes(content)
    again = Classifier.from_pretrained(tmp_path)
    state = classifier.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert again.classes == classifier.classes


def test_a_transformer_of_another_size_is_loaded_by_every_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build("timm:test_vit", 3)
    fit_size(network, 64)  # its name stands for 160 px
    path = tmp_path / "best.pth"
    torch.save(describe_student(network.state_dict(), "timm:test_vit", 3, ["a", "b", "c"], Preprocessing.of(64)), path)
    batch = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network.eval()(batch)
        opened: Any = load("checkpoint", path)
        assert torch.equal(opened(batch), expected)
        opened.save_pretrained(tmp_path / "saved")
        assert torch.equal(Classifier.from_pretrained(tmp_path / "saved")(batch), expected)
