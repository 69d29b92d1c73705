"""What can one target per group carry of a teacher's energy? python scripts/energy_kept.py DIR TEACHER [--output FILE]

Groups the channels of a teacher's tap at random, by index, by the cheapest flow of a fresh student, and by the teacher
first, for students of 1/2, 1/4 and 1/8 of its width, and prints a table: the share of the teacher's energy after the
ReLU that one target per group carries. Of two numbers after the ReLU the first is of the best weights (Perron), the
second of the group's maximum; of two before the ReLU, as targets are, the first is of the same weights, the second of
AMP. Nothing is trained. DIR has one folder per class; the first images by name are taken, as many of each class.
Writes results/energy_kept.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mgd
from classification.data.images import read_image, to_bytes
from classification.data.preprocessing import Preprocessing
from classification.errors import UserError
from classification.models import build, default_taps
from classification.models.trained import open_trained
from mgd.flow import energy_kept, group_channels, group_weights
from mgd.flow.flow import Array
from mgd.flow.gram import ChannelGram

ROOT = Path(__file__).parents[1]
DRAWS = 10  # of random groups
STUDENTS = 3  # fresh ones, of seeds 0, 1, 2
KINDS = ("random groups", "by index", "a fresh student's cheapest", "teacher first")


def read_images(folder: Path, number: int, seen: Preprocessing) -> Tensor:
    """Return about `number` images of a folder, as the teacher sees them: (B, 3, H, W)."""
    folders = [each for each in sorted(folder.iterdir()) if each.is_dir()]
    classes = [sorted(path for path in each.iterdir() if path.is_file()) for each in folders]
    paths = [path for each in classes for path in each[: number // len(classes)]]
    if not paths:
        raise UserError(f"{folder} holds no images in folders of classes: give a folder such as DATA/valid")
    transform = seen.transform()
    pixels = [transform(to_bytes(read_image(str(path))).permute(2, 0, 1)).permute(1, 2, 0) for path in paths]
    return seen.normalise(torch.stack(pixels))


@torch.no_grad()
def maps_of(network: nn.Module, arch: str, images: Tensor, tap: int) -> Tensor:
    """Return the maps (B, C, H, W) of one tap."""
    paths = default_taps(arch, network)
    if paths is None:
        raise SystemExit(f"no taps are known of {arch}: choose a network that has some")
    taps = mgd.Taps(network.eval(), paths)
    return torch.cat([taps(part).features[tap] for part in images.split(100)])


def carried(teacher: Tensor, target: Tensor, index: Array) -> float:
    """Return the share of the energy of teacher (B, T, H, W) that targets (B, S, H, W) of groups (G, S) carry.

    sum over s and members t of <x_t, y_s>^2 / |y_s|^2, over the sum of |x_t|^2; all at least 0.
    """
    rows, goals = (m.double().transpose(0, 1).flatten(1) for m in (teacher, target))
    total = 0.0
    for column, goal in zip(index.T, goals, strict=True):
        if goal.any():
            total += float((rows[column[column >= 0]] @ goal).square().sum() / goal.square().sum())
    return total / float(rows.square().sum())


def shares(maps: Tensor, gram: Array, index: Array) -> list[float]:
    """Return what groups carry: by weights and by the maximum after the ReLU, by weights and by AMP before it."""
    active, margin = maps.relu(), torch.zeros(maps.shape[1])
    weights = torch.tensor(group_weights(gram, index))
    flow = torch.tensor(index)
    before = [mgd.reduce_channels(maps, margin, flow, kind, weights=weights)[0].relu() for kind in ("linear", "amp")]
    highest = mgd.reduce_channels(active, margin, flow, "sp")[0]
    return [energy_kept(gram, index), *(carried(active, target, index) for target in (highest, *before))]


def groups_of(kind: str, num_student: int, maps: Tensor, gram: Array, own: list[Tensor]) -> list[Array]:
    """Return the groups of one kind, (G, S) each."""
    num_teacher = len(gram)
    depth = num_teacher // num_student
    if kind == "random groups":
        return [np.random.default_rng(n).permutation(num_teacher).reshape(-1, depth).T for n in range(DRAWS)]
    if kind == "by index":
        return [np.arange(num_teacher).reshape(-1, depth).T]
    if kind == "teacher first":
        return [group_channels(gram, num_student, seed=(n,)) for n in range(STUDENTS)]
    return [mgd.solve_flow(mgd.channel_cost(student, maps)).index for student in own]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the record of all rows."""
    trained = open_trained(args.teacher, args.arch)
    seen = trained.preprocessing if args.img_size is None else trained.preprocessing.at(args.img_size, "pad")
    images = read_images(args.folder, args.images, seen)
    maps = maps_of(trained.network, trained.arch, images, args.tap)
    total = ChannelGram(maps.shape[1])
    total.update(maps)
    gram = total.mean().numpy()
    rows = []
    for divisor in (2, 4, 8):
        own = []
        for seed in range(STUDENTS):
            torch.manual_seed(seed)
            arch = f"{args.student}_w{1 / divisor:g}"
            own.append(maps_of(build(arch, trained.num_classes), arch, images, args.tap))
        for kind in KINDS:
            started = time.perf_counter()
            found = groups_of(kind, own[0].shape[1], maps, gram, own)
            seconds = (time.perf_counter() - started) / len(found)
            each = [shares(maps, gram, index) for index in found]
            mean = [round(statistics.mean(values), 4) for values in zip(*each, strict=True)]
            spread = [round(statistics.pstdev(values), 4) for values in zip(*each, strict=True)]
            row = {"teacher_channels": len(gram), "student_channels": own[0].shape[1], "groups": kind, "n": len(found)}
            rows.append({**row, "mean": mean, "spread": spread, "seconds": round(seconds, 3)})
            print(" | ".join([f"{divisor}", f"{kind:27}", *(f"{value:.3f}" for value in mean)]), flush=True)
    names = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])
    about = {"teacher": trained.arch, "student": args.student, "images": len(images), "tap": args.tap}
    digest = hashlib.sha256(args.teacher.read_bytes()).hexdigest()
    command = f"python scripts/energy_kept.py {shlex.join(names)}"
    return {"command": command, **about, "teacher_sha256": digest, "torch": torch.__version__, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images, one folder per class")
    parser.add_argument("teacher", type=Path, help="checkpoint of the teacher")
    parser.add_argument("--arch", help="its network, for a file that does not say it")
    parser.add_argument("--img-size", type=int, help="side of its images, for a file that does not say it")
    parser.add_argument("--student", default="cifar_resnet20", help="network of the student, without its width")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--tap", type=int, default=-1, help="which tap; -1 is the last")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "energy_kept.json")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"there is no folder {args.folder}: give images, one folder per class")
    try:
        args.output.write_text(json.dumps(measure(args), indent=1) + "\n")
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
