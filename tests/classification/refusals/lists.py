"""Lists of images that name what is not there, or not allowed."""

from __future__ import annotations

from pathlib import Path

from tests.classification.refusals import Case, Place

GOOD = "train/bar/0.png 0\ntrain/dot/0.png 1\ntrain/sky/0.png 2\n"


def train(place: Place, content: str | bytes) -> list[str]:
    """The words of a training by a list of this content."""
    return place.base("--train-list", place.write("train.txt", content))


def both(place: Place, train_list: str, valid_list: str, *more: str) -> list[str]:
    paths = place.write("train.txt", train_list), place.write("valid.txt", valid_list)
    return place.base("--train-list", paths[0], "--valid-list", paths[1], *more)


def outside(place: Place) -> list[str]:
    data = place.copy()
    (place.root / "secret.png").write_bytes((data / "valid" / "sky" / "0.png").read_bytes())
    path = place.write("train.txt", GOOD + "train/../../secret.png 0\n")
    return place.base("--train-list", path, data=data)


def thumbnail(place: Place) -> list[str]:
    data = place.copy()
    (data / "train" / "bar" / "0.png").rename(data / "train" / "bar" / "._0.png")
    return place.base("--train-list", place.write("train.txt", GOOD.replace("bar/0", "bar/._0")), data=data)


def absolute(place: Place) -> list[str]:
    data = place.copy()
    path = Path("/") / "etc" / "hostname.png"
    return place.base("--train-list", place.write("train.txt", f"{path} 0\n"), data=data)


CASES = [
    Case("a list that is not there", lambda p: p.base("--train-list", "gone.txt")),
    Case("a folder in the place of a list", lambda p: p.base("--valid-list", str(p.run))),
    Case("a list of blank lines", lambda p: train(p, "\n  \n\t\n")),
    Case("a path from / on", absolute),
    Case("a path that leaves the data folder by ..", outside, process=True),
    Case("an image that is not there", lambda p: train(p, GOOD + "\n\ntrain/sky/99.png 2\n")),
    Case("a class folder in the place of an image", lambda p: train(p, "train/sky 2\n")),
    Case("a hidden file", thumbnail),
    Case("a path without a label", lambda p: train(p, GOOD + "train/sky/1.png\n")),
    Case("a class name in the place of a label", lambda p: train(p, "train/sky/0.png sky\n")),
    Case("a label below 0", lambda p: train(p, "train/sky/0.png -1\n")),
    Case("a label of 5,000 digits", lambda p: train(p, "train/sky/0.png " + "9" * 5000)),
    Case("a label that valid/ has no class for", lambda p: train(p, GOOD + "train/sky/1.png 3\n")),
    Case(
        "a label in the list for valid/ that train/ has no class for",
        lambda p: p.base("--valid-list", p.write("valid.txt", "valid/sky/0.png 7\n")),
    ),
    Case("a list in UTF-16", lambda p: train(p, GOOD.encode("utf-16"))),
    Case("a megabyte without a line end", lambda p: train(p, b"x" * 2**20)),
    Case("two lists that leave out a class below their largest", lambda p: both(p, GOOD, "valid/sky/0.png 9\n")),
    Case(
        "two lists with a label that --num-classes excludes",
        lambda p: both(p, GOOD, "valid/sky/0.png 1\n", "--num-classes", "2"),
    ),
]
