"""A folder is listed once, and again as soon as anything in it has changed."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from classification.data import listing
from classification.data.folders import DataFolder, read_folder
from classification.data.listing import list_cached
from classification.data.samples import samples_digest


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("train/a/1.jpg", "train/a/deep/2.jpg", "train/b/3.jpg", "valid/a/4.jpg", "valid/b/5.jpg"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "photos" / "train" / "a" / "empty").mkdir()
    return tmp_path / "photos"


def once(photos: Path, reads: list[int], shared: bool = True) -> DataFolder:
    def read() -> DataFolder:
        reads.append(1)
        return read_folder(photos)

    return list_cached(read, photos.parent / "run", photos, [True], shared=shared)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust a folder that has just been written."""
    monkeypatch.setattr(listing, "SETTLING_TIME", -60.0)


@pytest.mark.usefixtures("quiet")
def test_a_list_that_was_kept_is_the_list(photos: Path) -> None:
    (photos / "train" / "a" / os.fsdecode(b"\xff.jpg")).touch()  # a name that is no text
    (photos / "train" / "a" / "notes.txt").touch()
    reads: list[int] = []
    plain = read_folder(photos)
    for number in range(3):
        found = once(photos, reads)
        assert len(reads) == 1, number
        assert (found.classes, found.notes) == (["a", "b"], ["left out 1 file not named like images: 1 .txt"])
        assert (list(found.train), list(found.valid)) == (plain.train, plain.valid)
        assert samples_digest(found.train, photos) == samples_digest(plain.train, photos)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "change", ["add", "remove", "rename", "fill", "class", "replace folder", "split", "damage", "empty", "gone", "list"]
)
def test_a_change_is_noticed(change: str, photos: Path) -> None:
    reads: list[int] = []
    before = once(photos, reads)
    (kept,) = (photos.parent / "run").glob(".listing*.npz")
    if change == "add":
        (photos / "train" / "b" / "6.jpg").touch()
    elif change == "remove":
        (photos / "train" / "a" / "deep" / "2.jpg").unlink()
    elif change == "rename":
        (photos / "valid" / "a" / "4.jpg").rename(photos / "valid" / "a" / "7.jpg")
    elif change == "fill":
        (photos / "train" / "a" / "empty" / "8.jpg").touch()
    elif change == "class":
        (photos / "train" / "c").mkdir()
        (photos / "train" / "c" / "9.jpg").touch()
    elif change == "replace folder":  # another one under the same name, with the times of the first
        times = (photos / "train" / "b").stat()
        (photos / "train" / "b").rename(photos.parent / "old")
        (photos / "train" / "b").mkdir()
        (photos / "train" / "b" / "other.jpg").touch()
        os.utime(photos / "train" / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "split":
        (photos / "valid").rename(photos / "val")
    elif change == "damage":
        kept.write_bytes(kept.read_bytes()[:-40])
    elif change == "empty":  # as after a power failure
        kept.write_bytes(b"")
    elif change == "gone":
        kept.unlink()
    else:
        kept.write_bytes(b"no list")
    found, plain = once(photos, reads), read_folder(photos)
    assert len(reads) == 2 and (list(found.train), list(found.valid)) == (plain.train, plain.valid)
    same = change in ("damage", "empty", "gone", "list")
    assert (list(found.train) == list(before.train) and list(found.valid) == list(before.valid)) == same


def test_a_folder_that_was_written_just_now_is_not_kept(photos: Path) -> None:
    reads: list[int] = []
    once(photos, reads)
    assert len(reads) == 2 and not list((photos.parent / "run").glob(".listing*.npz"))


@pytest.mark.usefixtures("quiet")
def test_small_folders_of_one_process_leave_no_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once(photos, [], shared=False)
    assert not (photos.parent / "run").exists()
    monkeypatch.setattr(listing, "LARGE", 5)
    reads: list[int] = []
    once(photos, reads, shared=False)
    once(photos, reads, shared=False)
    assert len(reads) == 1


@pytest.mark.usefixtures("quiet")
def test_where_nothing_can_be_written_the_list_is_right(photos: Path) -> None:
    (photos.parent / "run").touch()  # a file in the place of the folder
    reads: list[int] = []
    assert [len(once(photos, reads).train) for _ in range(2)] == [3, 3] and len(reads) == 2


@pytest.mark.usefixtures("quiet")
def test_other_questions_have_lists_of_their_own(photos: Path) -> None:
    names = photos.parent / "names.txt"
    names.write_text("train/b/3.jpg 1\ntrain/a/1.jpg 0\n")
    place = photos.parent / "run"
    for train_list in (None, str(names), None, str(names)):
        read = partial(read_folder, photos, train_list=train_list)
        assert len(list_cached(read, place, photos, [train_list], shared=True).train) == (2 if train_list else 3)
    names.write_text("train/b/3.jpg 1\n")
    read = partial(read_folder, photos, train_list=str(names))
    assert len(list_cached(read, place, photos, [str(names)], shared=True).train) == 1
    (photos / "train" / "b" / "3.jpg").unlink()  # a file that the list names
    with pytest.raises(Exception, match="is not a file"):
        list_cached(read, place, photos, [str(names)], shared=True)


@pytest.mark.usefixtures("quiet")
def test_processes_that_begin_together_list_once(photos: Path) -> None:
    """Locks are of processes: the second one is forked, and begins while the first lists."""
    reads, write = os.pipe()
    begun = threading.Event()

    def read() -> DataFolder:
        begun.set()
        os.write(write, b"x")
        time.sleep(0.3)
        return read_folder(photos)

    def work() -> None:
        list_cached(read, photos.parent / "run", photos, [True], shared=True)

    first = threading.Thread(target=work)
    first.start()
    begun.wait()
    if (child := os.fork()) == 0:
        work()
        os._exit(0)
    first.join()
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reads, 10) == b"x"
