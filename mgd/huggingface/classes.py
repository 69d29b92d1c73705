"""Check that student, teacher and data number the classes alike, if they name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mgd.taps import Taps
from mgd.teachers import Frozen


def check_classes(student: nn.Module, teacher: nn.Module, dataset: Any) -> None:
    """Check the class names of student and teacher, and their order in the data; missing names are not compared.

    Args:
        student: the network to train; networks of transformers name their classes.
        teacher: its teacher, frozen or not.
        dataset: of training; data sets of the library `datasets` name their classes.

    Raises:
        ValueError: classes differ; the message names the first one.
    """
    ours, theirs = _classes(student), _classes(teacher)
    if ours is not None and theirs is not None:
        if len(ours) != len(theirs):
            raise ValueError(
                f"the student has {len(ours)} classes, the teacher {len(theirs)}: build both for the same classes"
            )
        _compare("the student", ours, "the teacher", theirs)
    for role, names in (("the student", ours), ("the teacher", theirs)):
        listed = _of_data(dataset)
        # A transform may change the classes, so only equal names in another order are certainly a mistake.
        if names is not None and listed is not None and sorted(names) == sorted(listed):
            _compare(role, names, "the data set", listed)


def _compare(one: str, ours: list[str], other: str, theirs: list[str]) -> None:
    for index, (name, their) in enumerate(zip(ours, theirs, strict=True)):
        if name != their and not (_made_up(name) or _made_up(their)):
            raise ValueError(
                f"class {index} is {name!r} for {one}, {their!r} for {other}: give both the same id2label and label2id"
            )


def _made_up(name: str) -> bool:
    return name.startswith("LABEL_")


def _classes(network: nn.Module) -> list[str] | None:
    """Return the names of a network's classes in order of index; None if its configuration has none."""
    for kind, inner in ((Frozen, "taps"), (Taps, "model")):
        network = getattr(network, inner) if isinstance(network, kind) else network
    names = getattr(getattr(network, "config", None), "id2label", None)
    return [str(names[index]) for index in sorted(names)] if isinstance(names, Mapping) else None


def _of_data(dataset: Any) -> list[str] | None:
    """Return the class names of a data set of `datasets`; None if it has none."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return None
    for key in ("labels", "label"):
        names = getattr(features.get(key), "names", None)
        if isinstance(names, list):
            return list(map(str, names))
    return None
