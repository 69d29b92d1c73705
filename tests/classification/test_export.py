"""A trained network leaves as a file that its own runtime runs, or is refused in a sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from classification.data import read_folder, read_image
from classification.data.images import to_bytes
from classification.export import main, missing_packages
from classification.models import build
from classification.models.quantised import wide_instructions
from classification.models.trained import open_trained
from tests.classification.conftest import CLASSES, STUDENT, TEACHER

ROOT = Path(__file__).parents[2]
needs_onnx = pytest.mark.skipif(bool(missing_packages("onnx")), reason="needs the packages of the extra [export]")


def valid_bytes(photos: Path) -> Tensor:
    """Return seven validation images, which are of the size that the network sees: (7, 16, 16, 3)."""
    return torch.stack([to_bytes(read_image(path)) for path, _ in read_folder(photos).valid[:7]])


def normal(images: Tensor) -> Tensor:
    """Normalise by the formula of ImageNet's mean and std."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def plain_logits(checkpoint: Path, images: Tensor) -> Tensor:
    """Return the logits of the network, built without the code that exports."""
    content = torch.load(checkpoint, weights_only=True)
    network = build(content["arch"], content["num_classes"]).eval()
    network.load_state_dict(content["state_dict"])
    with torch.no_grad():
        logits: Tensor = network(images)
    return logits


def session(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(path.read_bytes())  # from bytes: no other file can be needed


@needs_onnx
@pytest.mark.parametrize("takes_bytes", [False, True])
def test_onnx_gives_the_same_logits_at_any_batch_size(
    teacher: Path, photos: Path, tmp_path: Path, takes_bytes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    words = ["--with-preprocessing"] if takes_bytes else []
    assert main([str(teacher), "--to", "onnx", "--output", str(path), "--data", str(photos), *words]) == 0
    said = capsys.readouterr().out
    assert "agreement, %" in said and "100.00  of 15 images" in said and "top-1" in said
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    images = valid_bytes(photos)
    expected = plain_logits(teacher, normal(images))
    fed = images.permute(0, 3, 1, 2) if takes_bytes else normal(images)
    runs = session(path)
    for count in (1, 7):
        (logits,) = runs.run(["logits"], {"images": fed[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:count], rtol=1e-4, atol=1e-4)
    about = runs.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(CLASSES) and json.loads(about["arch"]) == TEACHER
    seen = json.loads(about["preprocessing"])
    assert (seen["img_size"], seen["resize"], seen["layout"], seen["colours"]) == (16, 16, "NCHW", "RGB")
    assert seen["input"].startswith("uint8" if takes_bytes else "float32") and seen["mean"] == [0.485, 0.456, 0.406]


@needs_onnx
def test_onnx_names_no_path_of_this_machine(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    assert main([str(teacher), "--to", "onnx", "--opset", "20", "--output", str(path)]) == 0
    assert str(ROOT).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()
    onnx = pytest.importorskip("onnx")
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [20]


@needs_onnx
def test_an_opset_of_the_future_is_one_sentence(
    teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(teacher), "--to", "onnx", "--opset", "999", "--output", str(tmp_path / "a")]) == 2
    said = capfd.readouterr().err
    assert said.startswith("export.py: --opset 999 cannot be had") and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_int8_is_quantised_per_channel_and_compared(
    teacher: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    words = [str(teacher), "--to", "int8", "--output", str(path), "--data", str(photos), "--tolerance", "30"]
    assert main([*words, "--with-preprocessing"]) == 0
    said = capsys.readouterr().out
    assert "27 images for calibration by minmax" in said and "95 % interval" in said
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    bytes_of = {value.name: value for value in model.graph.initializer}
    weights = [value for name, value in bytes_of.items() if value.data_type == onnx.TensorProto.INT8 and value.dims]
    assert max(len(value.dims) for value in weights) == 4  # convolutions
    scales = [value.dims[0] for name, value in bytes_of.items() if name.endswith("_scale") and value.dims]
    assert 64 in scales  # one per channel of the last stage
    (logits,) = session(path).run(["logits"], {"images": valid_bytes(photos).permute(0, 3, 1, 2).numpy()})
    expected = plain_logits(teacher, normal(valid_bytes(photos)))
    assert (torch.from_numpy(logits) - expected).abs().max() < 0.2 * expected.abs().max()
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["classes"]) == list(CLASSES)


@needs_onnx
def test_a_file_that_lost_accuracy_is_kept_under_another_name(
    teacher: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranges found on images of the mean colour alone cut off all that photographs hold: one class is left."""
    data, path = tmp_path / "data", tmp_path / "net.onnx"
    shutil.copytree(photos, data)
    for file in (data / "train").rglob("*.png"):
        Image.new("RGB", (16, 16), (124, 116, 104)).save(file)
    for name in CLASSES:
        for file in list((data / "valid" / name).iterdir()):
            for copy in range(3):
                shutil.copy(file, file.with_name(f"{file.stem}-{copy}.png"))
    words = [str(teacher), "--to", "int8", "--output", str(path), "--data", str(data), "--tolerance", "0"]
    assert main(words) == 1 and main(words) == 1
    said = capsys.readouterr().err
    assert "rejected, top-1 changes by -" in said and said.count("Traceback") == 0
    assert {file.name for file in tmp_path.iterdir()} == {"data", "net.onnx.rejected", "net.onnx.rejected.2"}


def test_pt2_runs_without_our_code(teacher: Path, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    assert main([str(teacher), "--to", "pt2", "--output", str(path), "--with-preprocessing"]) == 0
    images = valid_bytes(photos)
    torch.save({"images": images.permute(0, 3, 1, 2)}, tmp_path / "images.pth")
    code = (
        "import sys, torch\n"
        f"images = torch.load({str(tmp_path / 'images.pth')!r}, weights_only=True)['images']\n"
        "about = {'classes.json': ''}\n"
        f"network = torch.export.load({str(path)!r}, extra_files=about).module()\n"
        "found = [network(images[:count]) for count in (1, 7)]\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('mgd', 'classification')]\n"
        f"torch.save((found, about), {str(tmp_path / 'found.pth')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    (one, seven), about = torch.load(tmp_path / "found.pth", weights_only=True)
    expected = plain_logits(teacher, normal(images))
    torch.testing.assert_close(seven, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-4)
    assert json.loads(about["classes.json"]) == list(CLASSES)


def test_safetensors_is_a_checkpoint_with_a_card(short_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    assert main([str(short_run), "--to", "safetensors", "--output", str(path)]) == 0
    ours, theirs = open_trained(short_run / "best.pth"), open_trained(path)
    assert (theirs.arch, theirs.classes, theirs.preprocessing) == (STUDENT, list(CLASSES), ours.preprocessing)
    for name, value in ours.network.state_dict().items():
        assert torch.equal(value, theirs.network.state_dict()[name])
    card = (tmp_path / "net.safetensors.md").read_text()
    for text in (f"`{STUDENT}`", "3: `bar`, `dot`, `sky`", f"**Distilled from:** `{TEACHER}`", "main_mgd.py", "16 px"):
        assert text in card
    top1 = json.loads((short_run / "metrics.jsonl").read_text().splitlines()[0])["valid_top1"]
    assert f"top-1 {top1:.2f} %" in card and "## Licence" in card


def test_a_peer_of_a_mutual_run_is_found_beside_its_student(teacher: Path, tmp_path: Path) -> None:
    shutil.copy(teacher, tmp_path / "best.pth")
    content = {**torch.load(teacher, weights_only=True), "arch": STUDENT}
    content["state_dict"] = build(STUDENT, 3).state_dict()
    torch.save(content, tmp_path / "best_peer1.pth")
    words = [str(tmp_path), "--to", "safetensors", "--network", "peer1", "--output", str(tmp_path / "peer.safetensors")]
    assert main(words) == 0 and open_trained(tmp_path / "peer.safetensors").arch == STUDENT


@needs_onnx
def test_mobilenet_v1_of_random_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build("mobilenet_v1", 5).eval()
    about = {"arch": "mobilenet_v1", "num_classes": 5, "classes": list("abcde"), "img_size": 32}
    torch.save({"state_dict": network.state_dict(), **about}, tmp_path / "best.pth")
    path = tmp_path / "net.onnx"
    assert main([str(tmp_path / "best.pth"), "--to", "onnx", "--output", str(path)]) == 0
    images = torch.randn(7, 3, 32, 32)
    for count in (1, 7):
        (logits,) = session(path).run(None, {"images": images[:count].numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), network(images[:count]), rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_one_sentence(
    teacher: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.onnx"
    there.write_text("kept")
    (tmp_path / "empty").mkdir()
    new, check = ["--output", str(tmp_path / "new")], str(teacher)
    two = tmp_path / "two"
    shutil.copytree(photos, two)
    shutil.rmtree(two / "train" / "sky")
    shutil.rmtree(two / "valid" / "sky")
    cases: list[tuple[list[str], str]] = [
        ([check, "--to", "onnxx", *new], "invalid choice: 'onnxx'"),
        ([check, "--to", "pt2"], "required: --output"),
        ([check, "--to", "pt2", *new, "--tolerence", "1"], "close ones are --tolerance"),
        ([check, "--to", "pt2", *new, "--tolerance", "-1"], "expected a number at least 0; got '-1'"),
        ([check, "--to", "onnx", *new, "--opset", "9"], "expected a whole number at least 18; got '9'"),
        ([check, "--to", "pt2", *new, "--opset", "20"], "--opset works only with --to onnx or int8"),
        ([check, "--to", "int8", *new], "needs --data DIR: the images to calibrate on"),
        ([check, "--to", "safetensors", "--with-preprocessing", *new], "needs a graph"),
        ([check, "--to", "pt2", "--output", str(there)], "exists already and is not overwritten"),
        ([check, "--to", "pt2", "--output", str(tmp_path)], "is a folder: give a file in it"),
        ([check, "--to", "pt2", "--output", str(tmp_path / "no" / "a")], "does not exist: make it first"),
        ([check, "--to", "pt2", "--network", "peer1", *new], "no file"),
        ([str(tmp_path / "no.pth"), "--to", "pt2", *new], "does not exist"),
        ([check, "--to", "pt2", "--data", str(tmp_path / "no"), *new], "does not exist"),
        ([check, "--to", "pt2", "--data", str(tmp_path / "empty"), *new], "has no images"),
        ([check, "--to", "pt2", "--data", str(two), *new], "has 2 classes, but the checkpoint has 3"),
    ]
    for words, text in cases:
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("export.py: ") and text in said and len(said.splitlines()) == 1, (words, said)
    assert there.read_text() == "kept" and not (tmp_path / "new").exists()


def test_a_folder_of_images_is_enough(
    teacher: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(teacher), "--to", "safetensors", "--output", str(tmp_path / "a"), "--data", str(photos / "valid/bar")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "top-1 is not measured" in said and "5 images of" in said and "top-1, %" not in said


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from classification.export import main\n"
        f"status = main(['a.pth', '--to', 'onnx', '--output', {str(tmp_path / 'a')!r}])\n"
        "sys.exit(1 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "onnxruntime" in done.stderr and "extra [export]" in done.stderr


def test_neither_help_nor_a_mistake_waits_for_torch() -> None:
    code = (
        "import sys; from classification.export import main\n"
        "status = main(['--help']), main(['a.pth', '--to', 'int8', '--output', 'b'])\n"
        "heavy = {'torch', 'torchvision', 'timm', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "assert (status, heavy) == ((0, 2), set()), (status, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: export.py") and done.stderr.startswith("export.py: --to int8 needs --data")


def test_the_instructions_are_those_of_the_processor(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("flags\t\t: fpu avx2 avx512f avx512_vnni\n")
    (tmp_path / "old").write_text("flags\t\t: fpu avx2\n")
    assert wide_instructions(str(tmp_path / "new")) == ["AVX-512 VNNI"]
    assert wide_instructions(str(tmp_path / "old")) == []
