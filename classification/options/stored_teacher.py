"""What a folder of stored teacher outputs says of itself, and the options of a run that it settles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from classification.errors import UserError, quoted
from classification.options.options import Options
from classification.options.terms import needing
from classification.paths import exists, is_folder

FORMAT = 1
PLAN = "teacher_cache.json"
VIEWS = 1  # version of how a stored box, flip, seed and partner become pixels


@dataclass(frozen=True)
class ViewOptions:
    """How training images are drawn.

    Args:
        img_size: side of the square, in pixels.
        train_crop: "resized" or "pad", as --train-crop.
        hflip: whether half of the images are mirrored.
        randaugment: as --randaugment.
        random_erasing: as --random-erasing.
        mixup: as --mixup.
        cutmix: as --cutmix.
        mean: the colour of what is empty, from 0 to 1.
    """

    img_size: int
    train_crop: str
    hflip: int
    randaugment: int | None
    random_erasing: float
    mixup: float
    cutmix: float
    mean: tuple[float, float, float]

    @property
    def mixes(self) -> bool:
        """Whether a view is made of two images."""
        return bool(self.mixup or self.cutmix)

    @property
    def changes_colours(self) -> bool:
        """Whether a view needs a seed beside its box and mirror."""
        return self.randaugment is not None or bool(self.random_erasing)


SETTLED = tuple(entry.name for entry in fields(ViewOptions) if entry.name != "mean")  # options of a run


@dataclass(frozen=True)
class StoredPlan:
    """What a folder of stored teacher outputs holds.

    Args:
        teacher: digest of the teachers' weights and of what they see, in hexadecimal digits.
        archs: their networks.
        sizes: side of the square that each of them sees, in pixels.
        dtype: number type that they computed in.
        num_classes: K.
        classes: their names in order of index, or None where the teachers do not say them.
        top: k, classes per sample.
        samples: N per image.
        seed: of the draws.
        views: how they are drawn.
        num_images: images over all shards.
        images: digest of their paths, relative to the data folder, in order.
        shard_size: images per shard; the last one may have fewer.
        versions: of what made them: "views", and of torch and torchvision.
        format: of the files.
    """

    teacher: str
    archs: list[str]
    sizes: list[int]
    dtype: str
    num_classes: int
    classes: list[str] | None
    top: int
    samples: int
    seed: int
    views: ViewOptions
    num_images: int
    images: str
    shard_size: int
    versions: dict[str, str]
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """How many shards there will be."""
        return -(-self.num_images // self.shard_size)

    def fingerprint(self) -> str:
        """Return a digest of all of it: a run that is resumed must find the same views and outputs."""
        return sha256(self.text().encode()).hexdigest()

    def text(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_stored_plan(folder: str | Path) -> StoredPlan:
    """Read the plan of a folder.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = Path(folder, PLAN)
    if not is_folder(folder):
        what = "is not a folder" if exists(folder) else "does not exist"
        raise UserError(f"{folder} {what}: give the --output of mgd reinforce")
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {PLAN}: give the --output of mgd reinforce") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: remove {folder} and store the teacher again") from error
    found = content.get("format") if isinstance(content, dict) else content
    if found != FORMAT:
        raise UserError(f"{path} has format {quoted(found)}; this code reads format {FORMAT}: store the teacher again")
    try:
        plan = TypeAdapter(StoredPlan).validate_python(content)
    except ValidationError as error:
        raise UserError(f"{path} is damaged: remove {folder} and store the teacher again") from error
    if min(plan.num_images, plan.samples, plan.top, plan.shard_size) < 1 or plan.top > plan.num_classes:
        raise UserError(f"{path} is damaged: remove {folder} and store the teacher again")
    return plan


def settled_by(folder: str) -> dict[str, Any]:
    """Return the options of a run that stored outputs settle, by name."""
    views = asdict(read_stored_plan(folder).views)
    return {name: views[name] for name in SETTLED}


def check_stored(options: Options, typed: Mapping[str, str]) -> None:
    """Refuse terms and options that stored outputs cannot serve.

    Args:
        options: of the run.
        typed: {destination: the option as typed}.

    Raises:
        UserError: it names the term or the option.
    """
    folder, table = options.networks.teacher_cache, options.table
    if not folder or options.run.evaluate:
        return
    views = settled_by(folder)
    for name in SETTLED:
        if (now := getattr(options.data, name)) != views[name]:
            flag = typed.get(name, f"--{name.replace('_', '-')}")
            raise UserError(
                f"{flag} {now} does not fit the views in --teacher-cache {folder}, which have {views[name]}: leave it "
                "out, or store the teacher again with mgd reinforce"
            )
    reasons = {
        "maps": "compares feature maps, but --teacher-cache has only logits",
        "views": "compares two views of an image, but --teacher-cache has the logits of one",
    }
    for what, why in reasons.items():
        if found := needing(table, what):
            raise UserError(
                f"{found[0]} {why}: choose terms on logits, for example --distiller kd, or leave out the cache"
            )
    for name, spec in table.items():
        if spec.kind.mutual:
            raise UserError(f"{name} trains its teachers, but --teacher-cache has the outputs of frozen ones")
