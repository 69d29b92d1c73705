"""Networks of Hugging Face that are not there, lack something, or do not fit."""

from __future__ import annotations

import json
from typing import Any

from transformers import BertConfig, MobileViTImageProcessor

from classification import main_mgd
from tests.classification.conftest import CLASSES
from tests.classification.refusals import Case, Place
from tests.mgd.huggingface.tiny import vit


def folder(place: Place, *, weights: bool, classes: tuple[str, ...] = CLASSES) -> str:
    """Save a network and return its name."""
    ids = dict(enumerate(classes))
    network = vit(0, id2label=ids, label2id={name: index for index, name in ids.items()})
    (network if weights else network.config).save_pretrained(place.root / "network")
    return f"hf:{place.root / 'network'}"


def configured(place: Place, content: dict[str, Any]) -> list[str]:
    """Train a student whose config.json holds `content`."""
    (place.root / "network").mkdir()
    place.write("network/config.json", json.dumps(content))
    return place.base("-a", f"hf:{place.root / 'network'}")


def teacher(place: Place, *more: str, **options: Any) -> list[str]:
    return place.base("--teacher-arch", folder(place, **options), *more)


def without_configuration(place: Place) -> list[str]:
    (place.root / "network").mkdir()
    return place.base("-a", f"hf:{place.root / 'network'}")


def other_colours(place: Place) -> list[str]:
    words = teacher(place, weights=True)
    MobileViTImageProcessor().save_pretrained(place.root / "network")
    return words


CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
CASES = [
    Case("hf: without a name", lambda p: p.base("-a", "hf:")),
    Case("a folder that is not there", lambda p: p.base("-a", f"hf:{p.root / 'gone'}")),
    Case("a file in the place of a network's folder", lambda p: p.base("-a", f"hf:{p.teacher}")),
    Case("a network's folder without config.json", without_configuration),
    Case("a text model", lambda p: configured(p, BertConfig().to_dict())),
    Case("a network that brings code", lambda p: configured(p, CODE)),
    Case("a student's weights that are not there", lambda p: p.base("--pretrained", "-a", folder(p, weights=False))),
    Case("a teacher that is a configuration alone", lambda p: teacher(p, weights=False), main_mgd, process=True),
    Case(
        "a teacher of Hugging Face with its classes in another order",
        lambda p: teacher(p, weights=True, classes=CLASSES[::-1]),
        main_mgd,
    ),
    Case(
        "a teacher of Hugging Face with another number of classes",
        lambda p: teacher(p, "--distiller", "kd", weights=True, classes=(*CLASSES, "sea")),
        main_mgd,
    ),
    Case("a processor that reverses red, green and blue", other_colours, main_mgd),
]
