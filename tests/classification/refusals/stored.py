"""Stored teachers: of others, of other images, in other views, for terms that they cannot serve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from classification import main_mgd, reinforce
from tests.classification.refusals import Case, Place

VIEWS = ["--samples", "2", "--train-crop", "pad", "-j", "0", "--shard-size", "10"]


def storing(place: Place, *more: str) -> list[str]:
    """The words that store the teacher; `more` comes last."""
    return [str(place.teacher), str(place.photos), "--output", str(place.root / "cache"), *VIEWS, *more]


def train(place: Place, *more: str, data: Path | None = None, cache: Path | None = None) -> list[str]:
    """The words of a run from the stored teacher."""
    if cache is None:
        assert reinforce.main(storing(place)) == 0
    stored = ["--teacher-cache", str(cache or place.root / "cache")]
    return place.base("--distiller", "kd", *stored, *more, data=data)


def other_samples(place: Place) -> list[str]:
    assert reinforce.main(storing(place)) == 0
    return storing(place, "--samples", "3")


def other_class(place: Place) -> list[str]:
    photos = place.copy()
    shutil.copytree(photos / "valid" / "bar", photos / "valid" / "moon")
    return [str(place.teacher), str(photos), "--output", str(place.root / "cache")]


def taken(place: Place) -> list[str]:
    place.write("notes.txt", "mine")
    return [str(place.teacher), str(place.photos), "--output", str(place.root)]


def another_teacher(place: Place) -> list[str]:
    content = torch.load(place.teacher, weights_only=True)
    content["state_dict"]["conv1.weight"] *= 1.01
    return train(place, "--teacher-resume", place.save("other.pth", content))


def new_image(place: Place) -> list[str]:
    photos = place.copy()
    shutil.copy(photos / "train" / "bar" / "0.png", photos / "train" / "bar" / "new.png")
    return train(place, data=photos)


def changed_image(place: Place) -> list[str]:
    photos = place.copy()
    shutil.copy(photos / "train" / "sky" / "0.png", photos / "train" / "bar" / "0.png")
    return train(place, data=photos)


def lacks_a_shard(place: Place) -> list[str]:
    words = train(place)
    (place.root / "cache" / "000001.parquet").unlink()
    return words


def of_the_future(place: Place) -> list[str]:
    words, plan = train(place), place.root / "cache" / "teacher_cache.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "format": 2}))
    return words


CASES = [
    Case("a teacher to store without images", lambda p: [str(p.teacher), "--output", "cache"], reinforce),
    Case(
        "a data folder to store that is not there",
        lambda p: [str(p.teacher), "photo", "--output", "cache"],
        reinforce,
        process=True,
    ),
    Case("a teacher to store of other classes", other_class, reinforce),
    Case("a stored teacher into a folder of other files", taken, reinforce),
    Case("a stored teacher that was begun with other samples", other_samples, reinforce),
    Case("a term on maps with a stored teacher", lambda p: train(p, "--distiller", "mgd"), main_mgd),
    Case("a term on two views with a stored teacher", lambda p: train(p, "--distiller", "mlkd"), main_mgd),
    Case("another crop than that of the stored views", lambda p: train(p, "--train-crop", "resized"), main_mgd),
    Case("a stored teacher that is another one", another_teacher, main_mgd),
    Case("an image that a stored teacher did not see", new_image, main_mgd),
    Case("an image that changed since the teacher saw it", changed_image, main_mgd),
    Case("a stored teacher that lacks a shard", lacks_a_shard, main_mgd),
    Case("a stored teacher of a later format", of_the_future, main_mgd),
    Case("a stored teacher in a folder of photographs", lambda p: train(p, cache=p.photos), main_mgd),
]
