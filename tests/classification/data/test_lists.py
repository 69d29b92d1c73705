from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from classification import main_base, main_mgd
from classification.data.folders import read_folder
from classification.data.lists import read_list
from classification.errors import UserError
from classification.runs.checkpoint import fingerprints
from tests.classification.conftest import CLASSES, SMALL, TEACHER, picture, write_photos


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "data", train=3, valid=2)


def listed(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(root: Path, split: str) -> str:
    """The list of a split's class folders."""
    folder = read_folder(root)
    samples = folder.train if split == "train" else folder.valid
    return "".join(f"{Path(path).relative_to(root)} {label}\n" for path, label in samples)


def test_a_line_is_a_path_with_spaces_and_a_label(data: Path, tmp_path: Path) -> None:
    (data / "my photos").mkdir()
    names = ["my photos/at the  sea.png", " leading.png", "my photos/3"]
    for name in names:
        (data / name).write_bytes(b"")
    content = "my photos/at the  sea.png 2\n\n   \n leading.png\t 0\r\n./my photos//3\x0b1"  # no line end at the end
    assert read_list(listed(tmp_path / "l.txt", content), data) == [
        (str(data / name), label) for name, label in zip(names, (2, 0, 1), strict=True)
    ]


def test_lists_can_be_joined_and_name_an_image_twice(data: Path, tmp_path: Path) -> None:
    one = lines(data, "train")
    both = read_list(listed(tmp_path / "l.txt", f"{one}\n{one}"), data, 3)
    assert both == 2 * list(read_folder(data).train)


def test_bytes_that_are_no_text_are_kept(data: Path, tmp_path: Path) -> None:
    name = b"\xff \xe2\x98\x83.png"
    (data / os.fsdecode(name)).write_bytes(b"")
    ((path, label),) = read_list(listed(tmp_path / "l.txt", name + b" 4\n"), data)
    assert os.fsencode(path) == os.fsencode(data) + b"/" + name and label == 4


def test_a_link_may_lead_elsewhere(data: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(b"")
    (data / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert read_list(listed(tmp_path / "l.txt", "link.png 0"), data) == [(str(data / "link.png"), 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no images"),
        (b"\n \n", "names no images"),
        (b"train/bar/0.png 0\n\n/etc/passwd 0\n", "line 3: '/etc/passwd' could lead out"),
        (b"../data/train/bar/0.png 0", r"line 1: .* could lead out"),
        (b"train/bar/../dot/0.png 0", r"line 1: .* could lead out"),
        (b"train/bar/9.png 0", "line 1: 'train/bar/9.png' is not a file in .*: paths of a list begin in that"),
        (b"train/bar 0", "is not a file in"),
        (b"train/bar/0.png", "expected `path label`"),
        (b"0\n", "expected `path label`"),
        (b" 0\n", "expected `path label`"),
        (b"train/bar/0.png 1.0", "expected `path label`"),
        (b"train/bar/0.png -1", "expected `path label`"),
        (b"train/bar/0.png +1", "expected `path label`"),
        ("train/bar/0.png \u0661".encode(), "expected `path label`"),
        (b"train/bar/0.png 3", "label '3' must be below the number of classes, 3"),
        (b"train/bar/0.png 99999999999999999999999", "must be below the number of classes"),
        (b"train/bar/0.png\0 0", "line 1: it contains a NUL byte"),
        (b"x" * 70_000, "line 1: it is too long"),
    ],
)
def test_what_is_refused_names_list_and_line(content: bytes, message: str, data: Path, tmp_path: Path) -> None:
    path = listed(tmp_path / "l.txt", content)
    with pytest.raises(UserError, match=f"^list {path}.*{message}"):
        read_list(path, data, 3)


@pytest.mark.parametrize("name", ["gone.txt", "data", "x" * 300, "a\0b"])
def test_a_list_that_cannot_be_read_is_named(name: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_list(tmp_path / name, data)


def test_a_list_takes_the_place_of_its_split(data: Path, tmp_path: Path) -> None:
    whole = read_folder(data)
    train, valid = (listed(tmp_path / f"{name}.txt", lines(data, name)) for name in ("train", "valid"))
    assert read_folder(data, train_list=train) == whole == read_folder(data, valid_list=valid)
    both = read_folder(data, train_list=train, valid_list=valid)
    assert (both.train, both.valid, both.classes) == (whole.train, whole.valid, ["0", "1", "2"])
    assert read_folder(data, train_list=train, valid_list=valid, num_classes=5).classes == list("01234")


def test_the_folder_of_a_listed_split_need_not_exist(data: Path, tmp_path: Path) -> None:
    (data / "train").rename(data / "pictures")
    train = listed(tmp_path / "train.txt", "pictures/dot/1.png 1\n")
    folder = read_folder(data, train_list=train)
    assert folder.classes == list(CLASSES) and folder.train == [(str(data / "pictures" / "dot" / "1.png"), 1)]
    (data / "valid").rename(data / "others")
    valid = listed(tmp_path / "valid.txt", "others/sky/0.png 0\nothers/bar/0.png 1\n")
    assert read_folder(data, train_list=train, valid_list=valid).classes == ["0", "1"]
    with pytest.raises(UserError, match="no folder valid/"):
        read_folder(data, train_list=train)


def test_without_labels_those_of_the_list_are_ignored(data: Path, tmp_path: Path) -> None:
    train = listed(tmp_path / "train.txt", "train/dot/1.png 0\ntrain/bar/0.png 77\n")
    folder = read_folder(data, labels=False, train_list=train)
    assert [label for _, label in folder.train] == [-1, -1] and folder.classes == list(CLASSES)
    valid = listed(tmp_path / "valid.txt", "valid/dot/0.png 1\nvalid/bar/0.png 0\n")
    assert read_folder(data, labels=False, train_list=train, valid_list=valid).classes == ["0", "1"]
    assert len(read_folder(data, labels=False, valid_list=valid).train) == 9


def test_labels_with_a_gap_need_the_number_of_classes(data: Path, tmp_path: Path) -> None:
    train, valid = (listed(tmp_path / name, f"train/bar/0.png {label}\n") for name, label in (("t", 0), ("v", 2)))
    with pytest.raises(
        UserError,
        match="no image of class 1, although their labels go up to 2: if that is intended, give --num-classes",
    ):
        read_folder(data, train_list=train, valid_list=valid)
    assert len(read_folder(data, train_list=train, valid_list=valid, num_classes=3).classes) == 3


def test_a_list_of_the_same_images_continues_with_a_run_and_another_does_not(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(data), "-a", TEACHER, *SMALL, "--output", str(tmp_path / "run"), "--resume", "auto"]
    same = listed(tmp_path / "same.txt", lines(data, "train"))
    assert main_base.main([*words, "--epochs", "1"]) == 0
    assert main_base.main([*words, "--epochs", "2", "--train-list", same]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    other = listed(tmp_path / "other.txt", "".join(reversed(lines(data, "train").splitlines(keepends=True))))
    assert main_base.main([*words, "--epochs", "3", "--train-list", other]) == 2
    assert "other training images: the same ones, in another order" in capsys.readouterr().err


def test_without_labels_a_line_may_be_a_path_alone(data: Path, tmp_path: Path) -> None:
    (data / "IMG 12").write_bytes(b"")
    (data / "plain.png").write_bytes(b"")
    content = "plain.png\nplain.png 7\nIMG 12\nIMG 12 0\n  plain.png  \n"
    paths = [str(data / name) for name in ("plain.png", "plain.png", "IMG 12", "IMG 12", "plain.png")]
    assert read_list(listed(tmp_path / "l.txt", content), data, labels=False) == [(path, -1) for path in paths]
    with pytest.raises(UserError, match="line 1: 'gone\\.png' is not a file"):
        read_list(listed(tmp_path / "l.txt", "gone.png\n"), data, labels=False)
    with pytest.raises(UserError, match="line 1: '/etc/hostname' could lead out of the data folder"):
        read_list(listed(tmp_path / "l.txt", "/etc/hostname\n"), data, labels=False)


def test_a_run_on_two_lists(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = data / "pile"
    images.mkdir()
    rng = np.random.default_rng(0)
    content = []
    for number in range(12):
        picture(number % 3, rng).save(images / f"photo {number}.png")
        content.append(f"pile/photo {number}.png {number % 3}\n")
    monkeypatch.chdir(tmp_path)
    train, valid = listed(tmp_path / "t.txt", "".join(content[:9])), listed(tmp_path / "v.txt", "".join(content[9:]))
    words = [str(data), "-a", TEACHER, *SMALL, "--epochs", "1", "--train-list", "t.txt", "--valid-list", valid]
    assert main_base.main([*words, "--output", "run"]) == 0
    best = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    assert best["classes"] == ["0", "1", "2"] and best["num_classes"] == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["train_list"] == "t.txt"
    teacher = ["--teacher-arch", TEACHER, "--teacher-resume", "run/best.pth", "--distiller", "kd", "--labels", "0"]
    unlabelled = listed(tmp_path / "u.txt", "".join(line.rpartition(" ")[0] + "\n" for line in content[:9]))
    assert main_mgd.main([*words, *teacher, "--train-list", unlabelled, "--output", "student"]) == 0
    last = torch.load(tmp_path / "student" / "last.pth", weights_only=True)["resume"]
    samples = [(path, -1) for path, _ in read_list(train, data)]
    assert last["inputs"]["training images"] == fingerprints([], samples, data, [])["training images"]


@pytest.mark.parametrize(
    "name", ["._0.png", ".thumbs/a.png", "train/@eaDir/a.png", "a/__MACOSX/b/c.png", "a/Thumbs.db"]
)
def test_hidden_files_in_a_list_are_refused(name: str, data: Path, tmp_path: Path) -> None:
    (data / name).parent.mkdir(parents=True, exist_ok=True)
    (data / name).write_bytes(b"x")
    path = listed(tmp_path / "l.txt", f"train/bar/0.png 0\n./{name} 0\n")
    for labels in (True, False):
        with pytest.raises(UserError, match=rf"line 2: './{name}' is a hidden file or one of the operating system"):
            read_list(path, data, labels=labels)
