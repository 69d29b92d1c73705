"""Piles of images, scores and lists of them, and tar shards, that cannot be what was meant."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from classification import pseudo_label
from tests.classification.refusals import Case, Place


def score(place: Place, *paths: str) -> list[str]:
    return ["score", str(place.teacher), *paths, "--output", str(place.root / "scores"), "-j", "0"]


def empty(place: Place) -> list[str]:
    (place.root / "pile").mkdir()
    (place.root / "pile" / "notes.doc").touch()
    return score(place, str(place.root / "pile"))


def other_teacher(place: Place) -> list[str]:
    content = torch.load(place.teacher, weights_only=True)
    other = place.save("other.pth", {**content, "classes": ["bar", "cat", "sky"]})
    return [*score(place, str(place.photos / "train")), "--also", other]


def select(place: Place, *more: str) -> list[str]:
    (place.root / "scores").mkdir()
    table = pa.table({"path": ["a.png"], "label": [3]})
    pq.write_table(table, place.root / "scores" / "0.parquet")
    return ["select", str(place.root / "scores"), "--output", str(place.root / "chosen.txt"), *more]


def train(place: Place, line: str, classes: tuple[str, ...] = ("bar", "dot", "sky"), root: str = "train") -> list[str]:
    """The words of a training on a list of this line."""
    place.write("chosen.txt.json", json.dumps({"classes": classes}))
    lists = ["--pile-list", place.write("chosen.txt", line), "--pile-root", str(place.photos / root)]
    return place.base(*lists)


def shard(place: Place, name: str = "1.png", kind: bytes = tarfile.REGTYPE) -> Path:
    """A tar shard of two files."""
    content = (place.photos / "valid" / "sky" / "0.png").read_bytes()
    path = place.root / "a.tar"
    with tarfile.open(path, "w") as tar:
        for member, of in (("0.png", tarfile.REGTYPE), (name, kind)):
            info = tarfile.TarInfo(member)
            info.type, info.size, info.linkname = of, len(content) if of == tarfile.REGTYPE else 0, "/etc/hostname"
            tar.addfile(info, io.BytesIO(content))
    return path


def cut(place: Place) -> list[str]:
    path = shard(place)
    path.write_bytes(path.read_bytes()[:1100])
    return score(place, str(path))


def compressed(place: Place) -> list[str]:
    return score(place, place.write("a.tar.gz", gzip.compress(shard(place).read_bytes())))


def without_label(place: Place) -> list[str]:
    data = place.root / "data"
    (data / "train").mkdir(parents=True)
    (data / "valid").symlink_to(place.photos / "valid")
    shard(place).rename(data / "train" / "a.tar")
    return place.base(data=data)


CASES = [
    Case("a pile that holds valid/", lambda p: score(p, str(p.photos)), pseudo_label),
    Case("an empty pile", empty, pseudo_label, process=True),
    Case("two teachers of other classes", other_teacher, pseudo_label),
    Case("scores in Parquet of other columns", select, pseudo_label),
    Case("a rule for foreign images without known ones", lambda p: select(p, "--rule", "energy"), pseudo_label),
    Case("a list of a teacher of other classes", lambda p: train(p, "bar/0.png 0 -0.5\n", ("bar", "cat", "sky"))),
    Case("a list whose images are gone", lambda p: train(p, "bar/0.png 0 -0.5\nbar/99.png 0 -0.6\n")),
    Case("a list that holds an image of valid/", lambda p: train(p, "sky/0.png 2 -0.5\n", root="valid")),
    Case("a list that points outside of its folder", lambda p: train(p, "../valid/sky/0.png 2 -0.5\n")),
    Case("pseudo-labels without a list", lambda p: p.base("--labels", "pseudo")),
    Case("a shard that is cut", cut, pseudo_label),
    Case("a shard that is compressed", compressed, pseudo_label),
    Case("a shard with a name that leads out of it", lambda p: score(p, str(shard(p, "../1.png"))), pseudo_label),
    Case("a shard with a name from / on", lambda p: score(p, str(shard(p, "/tmp/1.png"))), pseudo_label),
    Case("a shard with a link", lambda p: score(p, str(shard(p, kind=tarfile.SYMTYPE))), pseudo_label),
    Case("a shard with a device", lambda p: score(p, str(shard(p, kind=tarfile.CHRTYPE))), pseudo_label),
    Case("a shard without labels to train on", without_label),
]
