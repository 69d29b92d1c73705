"""predict.py runs what export.py wrote, and says the same; other files are refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import export, predict
from classification.models.exported import kind_of

needs_onnx = pytest.mark.skipif(bool(export.missing_packages("onnx")), reason="needs the extra [export]")


def predicted(file: Path, photos: Path, folder: Path) -> list[dict[str, Any]]:
    out = folder / "out.json"
    assert predict.main([str(file), str(photos / "valid"), "--json", str(out), "--force", "-j", "0", "-b", "4"]) == 0
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(
    ("kind", "more", "tolerance"),
    [
        pytest.param("onnx", ["--with-preprocessing"], 1e-4, marks=needs_onnx),
        pytest.param("int8", ["--tolerance", "100"], 0.1, marks=needs_onnx),
        ("pt2", [], 1e-4),
    ],
)
def test_an_exported_file_says_what_its_checkpoint_says(
    kind: str, more: list[str], tolerance: float, teacher: Path, photos: Path, tmp_path: Path
) -> None:
    file = tmp_path / "network"  # the content says what it is, not the name
    words = [str(teacher), "--to", kind, "--output", str(file), "--data", str(photos), *more]
    assert export.main(words) == 0 and kind_of(file) == ("pt2" if kind == "pt2" else "onnx")
    ours, theirs = (predicted(path, photos, tmp_path) for path in (file, teacher))
    assert [entry["file_name"] for entry in ours] == [entry["file_name"] for entry in theirs]
    for one, other in zip(ours, theirs, strict=True):
        likely, expected = (dict(zip(entry["label_names"], entry["scores"], strict=True)) for entry in (one, other))
        assert likely == pytest.approx(expected, abs=tolerance)
        assert sorted(one["class_ids"]) == [0, 1, 2]


def test_a_checkpoint_is_no_exported_file(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(b"PK but no archive")
    assert [kind_of(path) for path in (teacher, tmp_path / "nowhere", tmp_path / "a.pt2")] == [None] * 3


@needs_onnx
def test_what_does_not_run_is_one_sentence(teacher: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    import onnx

    file, cut, foreign, damaged = (tmp_path / f"{name}.onnx" for name in ("whole", "cut", "foreign", "damaged"))
    assert export.main([str(teacher), "--to", "onnx", "--output", str(file)]) == 0
    cut.write_bytes(file.read_bytes()[:2000])
    model = onnx.load(file)
    next(entry for entry in model.metadata_props if entry.key == "arch").value = "no JSON"
    onnx.save(model, damaged)
    del model.metadata_props[:]
    onnx.save(model, foreign)
    capsys.readouterr()
    cases = [
        ([str(cut)], f"{cut} cannot be run ("),
        ([str(damaged)], f"{damaged} is damaged: its description is no JSON; export it again"),
        ([str(foreign)], f"{foreign} does not say its classes and its preprocessing"),
        (
            [str(file), "--arch", "resnet18"],
            f"{file} is an exported file, which runs on the CPU as it is: leave out --arch",
        ),
    ]
    for words, text in cases:
        assert predict.main([*words, str(photos / "valid")]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"predict.py: {text}") and len(said.splitlines()) == 1, said


def test_a_checkpoint_without_classes_is_predicted_by_number(
    teacher: Path, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    content = torch.load(teacher, weights_only=True)
    del content["classes"]
    torch.save(content, tmp_path / "a.pth")
    found = predicted(tmp_path / "a.pth", photos, tmp_path)
    assert all(entry["label_names"] == [str(index) for index in entry["class_ids"]] for entry in found)
    assert f"{tmp_path / 'a.pth'} names no classes, so their numbers are shown: give --class-names FILE" in (
        capsys.readouterr().err
    )
