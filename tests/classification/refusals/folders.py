"""Data folders and run folders that are not what they should be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from classification import main_mgd
from tests.classification.refusals import Case, Place


def without(place: Place, *parts: str) -> Path:
    data = place.copy()
    shutil.rmtree(data.joinpath(*parts))
    return data


def with_folder(place: Place, *parts: str) -> Path:
    data = place.copy()
    data.joinpath(*parts).mkdir(parents=True)
    return data


def no_classes(place: Place) -> Path:
    data = without(place, "train")
    (data / "train").mkdir()
    shutil.copy(next((data / "valid").rglob("*.png")), data / "train")
    return data


def no_images(place: Place, split: str) -> Path:
    data = place.copy()
    for path in (data / split).rglob("*.png"):
        path.rename(path.with_suffix(".txt"))
    return data


def films(place: Place, *parts: str) -> Path:
    data = place.copy()
    for path in data.joinpath(*parts).iterdir():
        path.rename(path.with_suffix(".MOV"))
    return data


def only_hidden(place: Place) -> Path:
    data = with_folder(place, "train", "fog", "@eaDir")
    shutil.copy(data / "train" / "dot" / "0.png", data / "train" / "fog" / "@eaDir")
    return data


def ring(place: Place) -> Path:
    data = place.copy()
    (data / "train" / "dot" / "again").symlink_to("..")
    return data


def taken(place: Place) -> list[str]:
    shutil.copytree(place.run, place.root / "run")
    return place.distil()


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("process 7 on node 3")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def held(place: Place) -> list[str]:
    words = place.go_on()
    command = [sys.executable, "-c", HOLD, str(place.root / "run" / ".lock")]
    place.others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    assert place.others[-1].stdout is not None
    place.others[-1].stdout.readline()
    return words


def damaged(place: Place, name: str, content: str) -> list[str]:
    words = place.go_on()
    (place.root / "run" / name).write_text(content)
    return words


CASES = [
    Case("a data folder that is not there", lambda p: p.base(data=p.root / "photos"), process=True),
    Case("a file in the place of the data folder", lambda p: p.base(data=p.teacher)),
    Case("a data folder whose name is too long", lambda p: p.base(data=Path("x" * 300))),
    Case("a data folder without train/", lambda p: p.base(data=without(p, "train"))),
    Case("a data folder without valid/ or val/", lambda p: p.base(data=without(p, "valid"))),
    Case("images in train/ itself, not in class folders", lambda p: p.base(data=no_classes(p))),
    Case("a class folder without images", lambda p: p.base(data=with_folder(p, "train", "fog", "deep"))),
    Case("a class folder of films alone", lambda p: p.base(data=films(p, "train", "dot"))),
    Case("a class folder of films alone in valid/", lambda p: p.base(data=films(p, "valid", "sky"))),
    Case("a class folder whose images are in a hidden folder", lambda p: p.base(data=only_hidden(p))),
    Case("a class of valid/ that train/ lacks", lambda p: p.base(data=with_folder(p, "valid", "fog"))),
    Case("a valid/ whose files are no images by their names", lambda p: p.base(data=no_images(p, "valid"))),
    Case("a class folder that holds a link to the folder above it", lambda p: p.base(data=ring(p))),
    Case(
        "--labels 0, and no images below train/",
        lambda p: p.distil("--labels", "0", "--distiller", "kd", data=no_images(p, "train")),
        main_mgd,
    ),
    Case("--output names the folder of another run", taken, main_mgd, process=True),
    Case("--resume into a folder that another process writes to", held, main_mgd, process=True),
    Case("--output names a file", lambda p: p.base("--output", p.write("notes.txt", "mine"))),
    Case(
        "--output lies below a file",
        lambda p: p.base("--output", str(Path(p.write("notes.txt", "mine")) / "run")),
    ),
    Case("--output has a name that is too long", lambda p: p.base("--output", "y" * 300)),
    Case(
        "--resume into a folder whose config.json is cut",
        lambda p: damaged(p, "config.json", '{"command": ["main_mgd.py"'),
        main_mgd,
    ),
    Case(
        "--resume into a folder whose metrics.jsonl holds something else",
        lambda p: damaged(p, "metrics.jsonl", "epoch,loss\n0,1.5\n"),
        main_mgd,
    ),
]
