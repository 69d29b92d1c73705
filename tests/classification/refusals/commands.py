"""Mistakes with the word mgd, and with the scripts that use a finished network."""

from __future__ import annotations

import torch

from classification import __main__ as shell
from classification import export, predict
from tests.classification.refusals import Case, Place


def new(place: Place) -> list[str]:
    """The words of a file to write."""
    return ["--output", str(place.root / "new")]


def cut_archive(place: Place) -> list[str]:
    """The beginning of an archive, as a download leaves it."""
    return [place.write("student.pt2", place.teacher.read_bytes()[:2000]), str(place.photos)]


def empty_folder(place: Place) -> list[str]:
    (place.root / "holidays").mkdir()
    return [str(place.teacher), str(place.root / "holidays")]


def weights_alone(place: Place) -> str:
    """A file of weights that says nothing of its network."""
    return place.save("plain.pth", torch.load(place.teacher, weights_only=True)["state_dict"])


def no_images(place: Place) -> list[str]:
    """An export on a data folder of classes without images."""
    for split in ("train", "valid"):
        (place.root / "photos" / split / "bar").mkdir(parents=True)
    return [str(place.teacher), "--to", "int8", *new(place), "--data", str(place.root / "photos")]


CASES = [
    Case("a command with a typing mistake", lambda p: ["evalute", str(p.teacher), str(p.photos)], shell),
    Case("a checkpoint to predict by that is not there", lambda p: ["best.pth", str(p.photos)], predict, process=True),
    Case("an exported archive that is cut", cut_archive, predict),
    Case("a folder without images to predict", empty_folder, predict),
    Case(
        "names of fewer classes than the checkpoint has",
        lambda p: [str(p.teacher), str(p.photos), "--class-names", p.write("names.txt", "bar\ndot\n")],
        predict,
    ),
    Case(
        "predictions over the checkpoint",
        lambda p: [str(p.teacher), str(p.photos), "--csv", str(p.teacher)],
        predict,
    ),
    Case(
        "predictions over an older file",
        lambda p: [str(p.teacher), str(p.photos), "--csv", p.write("old.csv", "")],
        predict,
    ),
    Case("an opset that is too old", lambda p: [str(p.teacher), "--to", "onnx", *new(p), "--opset", "9"], export),
    Case("a checkpoint that does not name its network", lambda p: [weights_alone(p), str(p.photos)], predict),
    Case("an export of such a checkpoint", lambda p: [weights_alone(p), "--to", "pt2", *new(p)], export),
    Case("an export on no images", no_images, export),
    Case(
        "an export that the disk has no room for",
        lambda p: [str(p.teacher), "--to", "safetensors", *new(p)],
        export,
        room=200,
    ),
    Case(
        "an export in the place of a device",
        lambda p: [str(p.teacher), "--to", "pt2", "--output", "/dev/null", "--force"],
        export,
    ),
    Case("an export of a folder that is no run", lambda p: [str(p.photos), "--to", "pt2", *new(p)], export),
    Case("int8 without images to calibrate on", lambda p: [str(p.teacher), "--to", "int8", *new(p)], export),
    Case(
        "an export over a file that is there",
        lambda p: [str(p.teacher), "--to", "pt2", "--output", p.write("kept.pt2", "kept")],
        export,
    ),
    Case(
        "a peer of a run that has none",
        lambda p: [str(p.run), "--to", "pt2", "--network", "peer1", *new(p)],
        export,
    ),
]
