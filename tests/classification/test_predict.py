"""predict.py: which files it takes, what it says of them, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from classification.data.inference import find_paths, read_batches
from classification.data.loading import Photos
from classification.data.preprocessing import Preprocessing
from classification.errors import RunError, UserError
from classification.models import build
from classification.models.trained import open_trained
from classification.predict import main
from classification.runs.predictions import Prediction, class_names, predictions, to_csv, to_json
from tests.classification.conftest import CLASSES, TEACHER

ROOT = Path(__file__).parents[2]
NOTHING = io.BytesIO()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_a_folder_is_predicted_as_a_plain_loop_does(photos: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    from torchvision.transforms.functional import normalize, to_tensor

    out, entries = tmp_path / "out.csv", tmp_path / "out.json"
    words = [str(teacher), str(photos / "valid"), "--csv", str(out), "--json", str(entries), "-j", "0", "-b", "4"]
    assert main(words) == 0
    best = torch.load(teacher, weights_only=True)
    network = build(TEACHER, 3).eval()
    network.load_state_dict(best["state_dict"])
    paths = sorted((photos / "valid").rglob("*.png"))
    found, listed = rows(out), json.loads(entries.read_text())
    assert out.read_text().startswith("path,rank,class,probability\n") and len(found) == 3 * len(paths)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [str(path) for path in paths]
    for place, path in enumerate(paths):
        image = normalize(to_tensor(Image.open(path).convert("RGB")), best["mean"], best["std"])
        with torch.no_grad():
            scores, ids = network(image[None])[0].softmax(0).sort(descending=True)
        ours = found[3 * place : 3 * place + 3]
        assert [row["path"] for row in ours] == [str(path)] * 3 and [row["rank"] for row in ours] == ["1", "2", "3"]
        assert [row["class"] for row in ours] == [CLASSES[index] for index in ids]
        assert [float(row["probability"]) for row in ours] == pytest.approx(scores.tolist(), rel=1e-4, abs=1e-6)
        assert listed[place] == {
            "class_ids": ids.tolist(),
            "scores": [float(row["probability"]) for row in ours],
            "file_name": str(path),
            "label_names": [row["class"] for row in ours],
        }
        assert lines[place].split()[1] == CLASSES[ids[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pixels_are_those_of_evaluation(workers: int, photos: Path) -> None:
    seen = Preprocessing(img_size=12, resize=14, interpolation="bicubic")
    samples = [(str(path), 0) for path in sorted(photos.rglob("*.png"))]
    evaluated = Photos(samples, seen.transform())
    batches = list(read_batches([path for path, _ in samples], seen, 7, workers))
    assert [path for batch in batches for path in batch.paths] == [path for path, _ in samples]
    pixels = torch.cat([batch.pixels for batch in batches])
    assert all(torch.equal(ours, evaluated[0, index][0]) for index, ours in enumerate(pixels))


def test_unreadable_files_are_named_and_skipped(photos: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    good = next((photos / "valid").rglob("*.png"))
    lost, out = tmp_path / "gone.jpg", tmp_path / "out.csv"
    (tmp_path / "list.txt").write_text(f"{good}\r\n\n{lost}\n")
    words = [str(teacher), str(tmp_path / "broken.jpg"), "--csv", str(out), str(tmp_path / "list.txt"), "--top-k", "9"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert [row["path"] for row in rows(out)] == [str(good)] * 3
    assert f"image {tmp_path / 'broken.jpg'} cannot be read (it is in no known image format)" in said.err
    assert f"image {lost} cannot be read (No such file or directory)" in said.err
    assert "--top-k 9: there are 3 classes" in said.err and "2 of 3 images could not be read" in said.err
    assert len(said.out.splitlines()) == 1


def test_paths_come_from_folders_lists_and_stdin(tmp_path: Path) -> None:
    deep = tmp_path / "photos" / "b" / "c"
    deep.mkdir(parents=True)
    names = [str(deep / "2.jpg"), str(deep / "10.png"), str(tmp_path / "photos" / "z.webp")]
    for name in (*names, str(deep / ".hidden.jpg"), str(deep / "notes.doc")):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(name, "png")
    bare = tmp_path / "without_suffix"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(bare, "png")
    found = find_paths([str(tmp_path / "photos"), "-", str(bare)], io.BytesIO(b"\xef\xbb\xbfx y \n\nz\xff\r\n"))
    assert found.paths == [names[2], names[1], names[0], "x y ", os.fsdecode(b"z\xff"), str(bare)]
    assert any("1 .doc" in note for note in found.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no image found in LIST: images end in .jpg"),
        (
            b"dear diary\n",
            "LIST is neither an image nor a list of images: its first line, 'dear diary', is not the path of a file",
        ),
        (b"a\nb\0c\n", "LIST is neither an image nor a list of images: line 2 is not a path"),
    ],
)
def test_a_file_that_is_no_list_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "list"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        find_paths([str(file)], NOTHING)
    assert str(caught.value).replace(str(file), "LIST").startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["EMPTY"], "no image found in EMPTY (1 .doc): images end in"),
        (["nowhere"], "nowhere does not exist: give images, folders"),
        (["nowhere.jpg"], "image nowhere.jpg does not exist"),
        (["PHOTOS", "--csv", "no/a.csv"], "--csv no/a.csv: the folder no does not exist: make it first"),
        (["PHOTOS", "--json", "EMPTY"], "--json EMPTY is a folder: give a file in it"),
        (["PHOTOS", "--csv", "a", "--json", "a"], "--json a is the file of --csv: give another file"),
        (["PHOTOS", "--csv", "TEACHER"], "--csv TEACHER is the checkpoint: give another file"),
        (["IMAGE", "--csv", "IMAGE"], "--csv IMAGE exists already and is not overwritten: give another, or --force"),
        (["IMAGE", "--csv", "IMAGE", "--force"], "--csv IMAGE is one of the images: give another file"),
        (["PHOTOS", "--class-names", "nowhere"], "--class-names nowhere cannot be read: No such file or directory"),
        (["PHOTOS", "--class-names", "NAMES"], "--class-names NAMES has 2 lines, the checkpoint 3 classes"),
        (["PHOTOS", "--device", "moon"], "unknown device 'moon'"),
        (["PHOTOS", "--top-k", "0"], "argument --top-k"),
        (["PHOTOS", "--topk", "1"], "unrecognized arguments: --topk 1; close ones are --top-k"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, photos: Path, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.doc").touch()
    (tmp_path / "names").write_text("one\ntwo\n")
    image = next((photos / "valid").rglob("*.png"))
    places = {"EMPTY": tmp_path / "empty", "PHOTOS": photos / "valid", "TEACHER": teacher, "IMAGE": image}
    places["NAMES"] = tmp_path / "names"
    before = image.read_bytes()
    assert main([str(teacher), *(str(places.get(word, word)) for word in words)]) == 2
    said = capsys.readouterr()
    for word, place in places.items():
        message = message.replace(word, str(place))
    assert said.out == "" and said.err.startswith(f"predict.py: {message}") and len(said.err.splitlines()) == 1
    assert image.read_bytes() == before


def test_a_checkpoint_that_is_missing_is_named(photos: Path, capsys: Any) -> None:
    assert main(["nowhere.pth", str(photos)]) == 2
    assert "checkpoint nowhere.pth" in capsys.readouterr().err


def test_names_may_hold_anything(tmp_path: Path) -> None:
    names = ['a,"b"', "line\nend", "bare\rreturn", os.fsdecode(b"\xff"), "é"]
    paths = [*names, "plain"]
    found = [Prediction(path, [0, 1, 2, 3, 4], [0.5, 0.2, 0.1, 0.1, 0.1]) for path in paths]
    (tmp_path / "a.csv").write_bytes(to_csv(found, names))
    read = rows(tmp_path / "a.csv")
    assert [row["path"] for row in read[::5]] == paths and [row["class"] for row in read[:5]] == names
    listed = json.loads(to_json(found, names))
    assert [entry["file_name"] for entry in listed] == paths and listed[0]["label_names"] == names
    assert b"\xff" in (tmp_path / "a.csv").read_bytes()


def test_files_of_strange_names_are_predicted(photos: Path, teacher: Path, tmp_path: Path, capsys: Any) -> None:
    content = next((photos / "valid").rglob("*.png")).read_bytes()
    folder, out = tmp_path / "in", tmp_path / "a.csv"
    folder.mkdir()
    names = [os.fsdecode(b"\xff.png"), 'a,"b\n.png', "-b.png"]
    for name in names:
        (folder / name).write_bytes(content)
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfone\r\n\xfe, two\r\nthree\r\n\r\n")
    words = [str(teacher), str(folder), "--csv", str(out), "--class-names", str(tmp_path / "names"), "--top-k", "3"]
    assert main(words) == 0
    assert {row["path"] for row in rows(out)} == {str(folder / name) for name in names}
    assert {row["class"] for row in rows(out)} == {"one", os.fsdecode(b"\xfe, two"), "three"}
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    assert class_names(None, None, 3) == ["0", "1", "2"] and class_names(None, ["x", "y"], 2) == ["x", "y"]
    (tmp_path / "none").write_bytes(b"")
    with pytest.raises(UserError, match="has 0 lines, the checkpoint 1 classes"):
        class_names(tmp_path / "none", None, 1)


def test_probabilities_by_hand() -> None:
    logits = torch.tensor([[0.0, np.log(3.0), np.log(4.0)]])
    assert predictions(["a"], logits, 2) == [Prediction("a", [2, 1], [0.5, 0.375])]
    with pytest.raises(RunError, match="outputs for b are not finite"):
        predictions(["a", "b"], torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), 1)


def test_a_link_stays_a_link_and_a_failed_run_keeps_the_file(photos: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    old, link = tmp_path / "real" / "a.csv", tmp_path / "a.csv"
    old.write_text("old")
    link.symlink_to(old)
    network = open_trained(teacher)
    state = {name: value.float() * float("nan") for name, value in network.network.state_dict().items()}
    torch.save({**torch.load(teacher, weights_only=True), "state_dict": state}, tmp_path / "nan.pth")
    image = str(next((photos / "valid").rglob("*.png")))
    assert main([str(tmp_path / "nan.pth"), image, "--csv", str(link), "--force"]) != 0 and old.read_text() == "old"
    assert main([str(teacher.parent), image, "--csv", str(link), "--force"]) == 0
    assert link.is_symlink() and len(rows(old)) == 3 and [p.name for p in old.parent.iterdir()] == ["a.csv"]


def test_neither_help_nor_a_typing_mistake_waits_for_torch() -> None:
    code = (
        "import sys; from classification.predict import main\n"
        "status = main(['--help']), main(['a.pth', 'photos', '--topk', '3'])\n"
        "heavy = {'torch', 'torchvision', 'timm', 'PIL', 'numpy'} & set(sys.modules)\n"
        "assert (status, heavy) == ((0, 2), set()), (status, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: predict.py")


def test_a_reader_that_leaves_is_no_traceback(photos: Path, teacher: Path) -> None:
    words = [sys.executable, "-m", "classification.predict", str(teacher), "-", "-b", "1", "-j", "0"]
    image = next((photos / "valid").rglob("*.png"))
    reading, writing = os.pipe()
    os.close(reading)
    listed = f"{image}\n".encode() * 3
    done = subprocess.run(words, cwd=ROOT, input=listed, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr, done.stderr
