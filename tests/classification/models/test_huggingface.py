from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from classification import main_mgd, predict
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import build, known_name, may_be_same
from classification.models.exporting import to_onnx
from classification.models.huggingface import of_processor, preprocessing
from classification.models.pretrained import published_preprocessing
from classification.models.trained import open_trained
from classification.models.weights import load_file, read_weights
from tests.classification.conftest import CLASSES
from tests.mgd.huggingface.tiny import mobilenet, vit

IDS: dict[str, Any] = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: n for n, name in enumerate(CLASSES)}}
PICTURE = Image.fromarray(
    (128 + 100 * np.sin(np.add.outer(np.arange(96), np.arange(128))[..., None] / np.array([9, 14, 25]))).astype("uint8")
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a processor, one of another order of classes, and a student that is a configuration alone."""
    root = tmp_path_factory.mktemp("huggingface")
    vit(0, depth=4, **IDS).save_pretrained(root / "teacher")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "teacher")
    vit(0, id2label={0: "bar", 1: "sky", 2: "dot"}, label2id={"bar": 0, "sky": 1, "dot": 2}).save_pretrained(
        root / "order"
    )
    mobilenet(0).config.save_pretrained(root / "student")
    return root


def seen(found: Preprocessing) -> torch.Tensor:
    pixels = found.transform()(torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1))
    return found.normalise(pixels.permute(1, 2, 0)[None])


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ViTImageProcessor", {}, (224, 224, "squash")),
        ("MobileNetV2ImageProcessor", {}, (224, 256, "center")),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 56}, "crop_pct": 0.875}, (56, 64, "center")),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, (384, 384, "squash")),
        ("DeiTImageProcessor", {}, (224, 256, "squash")),
        ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}}, (64, 64, "squash")),
        ("EfficientNetImageProcessor", {"rescale_offset": True, "rescale_factor": 1 / 127.5}, None),
        ("ViTImageProcessor", {"do_normalize": False, "resample": 3}, None),
        ("CLIPImageProcessor", {}, (224, 224, "center")),
    ],
)
def test_preprocessing_does_what_the_processor_does(
    name: str, options: dict[str, Any], expected: tuple[int, int, str] | None
) -> None:
    processor = getattr(transformers, name)(**options)
    found = of_processor(processor)
    if expected is not None:
        assert (found.img_size, found.resize, found.crop) == expected
    theirs = processor(PICTURE, return_tensors="pt")["pixel_values"]
    ours = seen(found)
    assert ours.shape == theirs.shape
    # Bytes are rounded after resizing, here and there.
    levels = (ours - theirs).abs().amax(dim=(0, 2, 3)) * torch.tensor(found.std) * 255
    assert levels.max() < 2.5


def test_a_processor_that_turns_colours_around_is_refused() -> None:
    with pytest.raises(ValueError, match="do_flip_channel_order"):
        of_processor(transformers.MobileViTImageProcessor())


@pytest.mark.parametrize(
    "damage",
    [
        {"resample": [1]},
        {"rescale_factor": [1]},
        {"image_mean": "white"},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0},
        {"size": {"shortest_edge": [32]}},
    ],
)
def test_a_damaged_processor_is_one_sentence(damage: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "teacher", tmp_path / "network")
    file = tmp_path / "network" / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(UserError, match=r"network prepares images in a way that is not supported \(.*\): choose"):
        preprocessing(str(tmp_path / "network"))


def test_logits_are_those_of_transformers(folders: Path) -> None:
    arch = f"hf:{folders / 'teacher'}"
    file = read_weights(arch)
    assert (file.arch, file.num_classes, file.classes) == (arch, 3, list(CLASSES))
    half = (0.5, 0.5, 0.5)
    assert file.preprocessing(Preprocessing()) == Preprocessing(32, 32, "squash", "bilinear", half, half)
    network = build(arch, 3).eval()
    load_file(network, file, arch=arch, num_classes=3, classes=list(CLASSES))
    images, theirs = torch.randn(2, 3, 32, 32), vit(0, depth=4, **IDS)
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images).logits)
        large = F.interpolate(images, 48)  # other position embeddings
        torch.testing.assert_close(network(large), theirs(large, interpolate_pos_encoding=True).logits)


def test_a_configuration_builds_a_student_for_other_classes(folders: Path) -> None:
    arch = f"hf:{folders / 'student'}"
    network = build(arch, 7)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert published_preprocessing(network, arch) == Preprocessing.of(32)  # the size of its configuration
    assert known_name(arch) == arch and may_be_same(arch, "hf:elsewhere") and not may_be_same(arch, "mobilenet_v2")


def test_a_run_needs_its_folders_no_more(folders: Path, photos: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(folders / "student", student)
    words = [str(photos), "-a", f"hf:{student}", "--teacher-arch", f"hf:{folders / 'teacher'}", "--distiller", "mgd+kd"]
    run = tmp_path / "run"
    words += ["-b", "8", "-j", "0", "--seed", "0", "--epochs", "1", "--output", str(run)]
    assert main_mgd.main(words) == 0
    assert (run / "flow" / "0000.npz").is_file()
    shutil.rmtree(student)
    trained = open_trained(run / "best.pth")
    assert trained.classes == list(CLASSES) and trained.preprocessing.img_size == 32
    assert main_mgd.main(["--resume", str(run), "--epochs", "2"]) == 0
    out = tmp_path / "found.csv"
    assert predict.main([str(run), str(photos / "valid"), "-j", "0", "--csv", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 1 + 15 * 3


def test_a_file_beside_its_configuration_is_read_as_transformers_reads_it(folders: Path) -> None:
    found = open_trained(folders / "teacher" / "model.safetensors")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.network(images), vit(0, depth=4)(images).logits)


def test_a_name_is_found_in_the_cache(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, commit = tmp_path / "models--me--net", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folders / "teacher", home / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert open_trained("hf:me/net").classes == list(CLASSES)
    assert preprocessing("me/net").img_size == 32


def test_refusals(folders: Path, photos: Path, tmp_path: Path) -> None:
    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        tmp_path / "bert"
    )
    shutil.copytree(folders / "teacher", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\0" * 100)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        ("hf:", "hf: names no network"),
        (f"hf:{tmp_path}/nope", "is not a folder"),
        (f"hf:{tmp_path}/file", "is not a folder"),
        (f"hf:{tmp_path}/empty", "without config.json"),
        (f"hf:{tmp_path}/bert", "is no image classifier"),
    ]
    for arch, text in cases:
        with pytest.raises(UserError, match=text):
            build(arch, 3)
    for name, text in ((folders / "student", "holds no weights"), (tmp_path / "broken", "cannot be read")):
        with pytest.raises(UserError, match=text):
            read_weights(f"hf:{name}")
    file = read_weights(f"hf:{folders / 'order'}")
    with pytest.raises(
        UserError, match="are in another order: class 1 is 'sky' in the checkpoint, but 'dot' in the data"
    ):
        load_file(build(file.arch or "", 3), file, arch=file.arch or "", num_classes=3, classes=list(CLASSES))


def test_attention_within_windows_is_written_as_onnx(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    config = transformers.SwinConfig(**shape, image_size=16, patch_size=2, **IDS)
    torch.manual_seed(0)
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path)
    trained = open_trained(tmp_path / "model.safetensors")
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        expected = trained.network(images).numpy()
    session = pytest.importorskip("onnxruntime").InferenceSession(to_onnx(trained))
    (found,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-5)
