"""CIFAR-100 from archives of both published forms, made here with a few images."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ["apple", "bear", "cloud"]
LABELS = {"train": [2, 0, 1, 0], "test": [1, 2]}


def images(split: str) -> np.ndarray:
    found: np.ndarray = np.random.default_rng(len(split)).integers(0, 256, (len(LABELS[split]), 3 * 32 * 32), np.uint8)
    return found


def as_python2(value: Any) -> bytes:
    """Pickle as Python 2 did, which made the published files: text and bytes are one kind of string."""
    file = io.BytesIO()
    pickler: Any = getattr(pickle, "_Pickler")(file, protocol=2)  # noqa: B009

    def save(self: Any, text: str | bytes) -> None:
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(b"T" + len(content).to_bytes(4, "little") + content)
        self.memoize(text)

    pickler.dispatch = {**pickler.dispatch, str: save, bytes: save}
    pickler.dump(value)
    return file.getvalue()


def contents(form: str) -> dict[str, bytes]:
    if form == "python":
        found: dict[str, Any] = {"meta": {"fine_label_names": NAMES}}
        found |= {
            s: {"data": images(s), "fine_labels": labels, "coarse_labels": labels} for s, labels in LABELS.items()
        }
        return {name: as_python2(value) for name, value in found.items()}
    rows = {s: b"".join(bytes([9, y]) + x.tobytes() for x, y in zip(images(s), LABELS[s], strict=True)) for s in LABELS}
    return {"fine_label_names.txt": "\n".join(NAMES).encode(), **{f"{s}.bin": content for s, content in rows.items()}}


def archive(folder: Path, form: str, files: dict[str, bytes]) -> Path:
    path = folder / f"cifar-100-{form}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-100-{form}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", ["python", "binary"])
def test_both_forms_give_the_same_folders(form: str, tmp_path: Path) -> None:
    import prepare_cifar100

    folder = tmp_path / "new" / "cifar100"
    packed = archive(tmp_path, form, contents(form))
    assert prepare_cifar100.prepare(packed, folder) == 6
    expected = {"train/cloud/00000.png", "train/apple/00001.png", "train/bear/00002.png", "train/apple/00003.png"}
    expected |= {"valid/bear/00000.png", "valid/cloud/00001.png"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.png")} == expected
    pixels = np.asarray(Image.open(folder / "train" / "bear" / "00002.png"))
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert prepare_cifar100.prepare(tmp_path / "unpacked" / f"cifar-100-{form}", tmp_path / "again") == 6
    assert all((pixels[:, :, c].ravel() == images("train")[2][1024 * c : 1024 * (c + 1)]).all() for c in range(3))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize(
    "change", ["text", "lacks", "short", "label", "code"], ids=lambda change: f"an archive with {change}"
)
def test_refusals(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import prepare_cifar100

    files = contents("python" if change == "code" else "binary")
    if change == "lacks":
        del files["test.bin"]
    elif change == "short":
        files["train.bin"] = files["train.bin"][:-1]
    elif change == "label":
        files["train.bin"] = bytes([9, 77]) + files["train.bin"][2:]
    elif change == "code":
        files["meta"] = pickle.dumps(Harmful())
    path = archive(tmp_path, "any", files)
    if change == "text":
        path.write_text("no archive")
    with pytest.raises(ValueError, match=r"is damaged: its images and labels|is not cifar-100-python.tar.gz or"):
        prepare_cifar100.prepare(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists() and "run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists already"):
        prepare_cifar100.prepare(path, tmp_path)


@pytest.mark.parametrize(
    ("meta", "train", "message"),
    [
        (["../../evil", "b", "c"], {}, "names of their own"),
        (["a", "a", "c"], {}, "names of their own"),
        ([".", "b", "c"], {}, "names of their own"),
        (NAMES, {"fine_labels": [0.0, 1.0, 2.0, 0.0]}, "do not fit together"),
        (NAMES, {"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}, "do not fit together"),
        (NAMES, {"data": np.full((4, 3072), 300.5)}, "its pixels must be bytes, not float64"),
        (NAMES, None, "it holds no file train"),
    ],
)
def test_other_contents_are_refused(
    meta: list[str], train: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    import prepare_cifar100

    files = {"meta": pickle.dumps({"fine_label_names": meta}), "test": contents("python")["test"]}
    if train is not None:
        files["train"] = pickle.dumps({"data": images("train"), "fine_labels": LABELS["train"]} | train)
    with pytest.raises(ValueError, match=message):
        prepare_cifar100.prepare(archive(tmp_path, "python", files), tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"cifar-100-python.tar.gz"}


def test_a_byte_that_changed_and_a_cut_archive_are_seen(tmp_path: Path) -> None:
    import prepare_cifar100

    path = archive(tmp_path, "binary", contents("binary"))
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not cifar-100-python"):
            prepare_cifar100.prepare(path, tmp_path / "folder")
