"""Checkpoints that are broken, of something else, or of another run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from classification import main_mgd
from classification.models import build
from tests.classification.conftest import STUDENT, TEACHER
from tests.classification.refusals import Case, Place


class Code:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (Path("was_run"),)


def teacher(place: Place, content: Any) -> list[str]:
    """Distil from a teacher whose file holds `content`: bytes, or what torch.save takes."""
    name = "teacher.pth"
    path = place.write(name, content) if isinstance(content, bytes) else place.save(name, content)
    return place.distil("--teacher-resume", path)


def described(place: Place, **changes: Any) -> list[str]:
    return teacher(place, {**torch.load(place.teacher, weights_only=True), **changes})


def changed(place: Place, change: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
    """The teacher's file with one tensor changed."""
    content = torch.load(place.teacher, weights_only=True)
    content["state_dict"]["conv1.weight"] = change(content["state_dict"]["conv1.weight"])
    return teacher(place, content)


def resume(place: Place) -> dict[str, Any]:
    part: dict[str, Any] = torch.load(place.run / "last.pth", weights_only=True)["resume"]
    return part


def other_momentum(place: Place) -> list[str]:
    optimizer = resume(place)["optimizer"]
    optimizer["state"][0]["momentum_buffer"] = torch.zeros(3)
    return place.go_on(optimizer=optimizer)


def other_draws(place: Place) -> list[str]:
    random = resume(place)["random"]
    random[0]["torch"] = random[0]["torch"][:7]
    return place.go_on(random=random)


def diverged(place: Place) -> list[str]:
    state = torch.load(place.run / "last.pth", weights_only=True)["state_dict"]
    state["linear.bias"][0] = torch.inf
    return place.go_on(state_dict=state)


def fewer_images(place: Place) -> list[str]:
    data = place.copy()
    (data / "train" / "sky" / "0.png").unlink()
    return place.go_on(data=data)


def other_teacher(place: Place) -> list[str]:
    content = torch.load(place.teacher, weights_only=True)["state_dict"]
    content["linear.bias"] += 1
    return place.go_on("--teacher-resume", place.save("teacher.pth", content))


def done(place: Place) -> list[str]:
    return place.go_on("--epochs", "1", "--resume", str(place.root / "run" / "last.pth"))


def weights_only(place: Place) -> list[str]:
    path = place.write("best.pth", place.teacher.read_bytes())
    return place.base("--resume", path, "--output", str(place.root))


OTHER_KINDS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a web page in the place of a checkpoint": b"<!DOCTYPE html><html>sign in</html>",
    "a packed checkpoint": b"\x1f\x8b\x08\0",
    "the beginning of a safetensors file": (1000).to_bytes(8, "little") + b'{"conv1.weight":',
}

BROKEN = [
    Case("a checkpoint that is not there", lambda p: p.distil("--teacher-resume", "gone.pth"), main_mgd),
    Case("a folder in the place of a checkpoint", lambda p: p.distil("--teacher-resume", str(p.run)), main_mgd),
    Case("a checkpoint without content", lambda p: teacher(p, b""), main_mgd),
    Case(
        "the first half of a checkpoint", lambda p: teacher(p, p.teacher.read_bytes()[:20_000]), main_mgd, process=True
    ),
    Case("a pickle that runs code", lambda p: teacher(p, pickle.dumps(Code())), main_mgd, process=True),
    *(Case(what, partial(teacher, content=content), main_mgd) for what, content in OTHER_KINDS.items()),
    Case("a pickled network", lambda p: teacher(p, build(TEACHER, 3)), main_mgd),
    Case("a checkpoint of a later format", lambda p: described(p, format=99), main_mgd),
    Case("a size of images that is no square", lambda p: described(p, img_size=(3, 32, 48)), main_mgd),
    Case("a checkpoint that holds a list", lambda p: teacher(p, [torch.zeros(3)]), main_mgd),
    Case("a dictionary without weights", lambda p: teacher(p, {"epoch": 3, "loss": 0.5}), main_mgd),
    Case("weights named by numbers", lambda p: teacher(p, {0: torch.zeros(3)}), main_mgd),
    Case("weights that are not finite", lambda p: changed(p, lambda w: w * torch.nan), main_mgd),
    Case("weights in a sparse form", lambda p: changed(p, lambda w: w.to_sparse()), main_mgd),
    Case("a description whose classes are a number", lambda p: described(p, classes=3), main_mgd),
]

OTHERS = [
    Case("a checkpoint that names another network", lambda p: described(p, arch="resnet18"), main_mgd),
    Case("weights of another network", lambda p: teacher(p, build("cifar_resnet14", 3).state_dict()), main_mgd),
    Case("weights of another width", lambda p: teacher(p, build(STUDENT, 3).state_dict()), main_mgd),
    Case(
        "a head of other classes, and a term that reads logits",
        lambda p: [*teacher(p, build(TEACHER, 7).state_dict()), "--mgd-with-kd", "1"],
        main_mgd,
    ),
    Case("the classes in another order", lambda p: described(p, classes=["sky", "dot", "bar"]), main_mgd),
    Case("--evaluate without any weights", lambda p: p.base("-a", TEACHER, "--evaluate")),
]

RESUMED = [
    Case("--resume with weights only", weights_only),
    Case("--resume with another rate", lambda p: p.go_on("--lr", "0.2"), main_mgd, process=True),
    Case("--resume with other terms", lambda p: p.go_on("--mgd-with-kd", "1"), main_mgd),
    Case("--resume with fewer training images", fewer_images, main_mgd),
    Case("--resume with another teacher", other_teacher, main_mgd),
    Case("--resume of a run that is done", done, main_mgd),
    Case("--resume of another format", lambda p: p.go_on(version=1), main_mgd),
    Case("--resume, and the optimizer is missing", lambda p: p.go_on(optimizer=None), main_mgd),
    Case("--resume, and the epoch is no number", lambda p: p.go_on(epoch="two"), main_mgd),
    Case("--resume, and a momentum has another shape", other_momentum, main_mgd),
    Case("--resume, and a generator's state is cut", other_draws, main_mgd),
    Case("--resume, and the student's weights are not finite", diverged, main_mgd),
]


CASES = [*BROKEN, *OTHERS, *RESUMED]
