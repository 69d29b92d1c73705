"""How close is the fast teacher? python scripts/bench_teacher.py FOLDER ARCH WEIGHTS: against its float32 form.

Both see the validation images of FOLDER: the cosine of each tapped map, and on how many images both name one class.
Writes results/speed*/teacher-ARCH.json.
"""

from __future__ import annotations

import argparse
import copy

import torch
from side_by_side import keep
from torch import Tensor

import mgd
from classification.models import default_taps
from classification.options.config import parse
from classification.runs.world import Seed, World
from classification.training.engine import Engine
from classification.training.starting import start_job


def fast(taps: mgd.Taps, images: Tensor) -> mgd.Frozen:
    """The frozen forward that a run uses."""
    other = copy.deepcopy(taps)
    mgd.fold_norms(other, images)
    return mgd.freeze(other.to(torch.bfloat16).to(memory_format=torch.channels_last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("arch")
    parser.add_argument("weights")
    parser.add_argument(
        "--options", action="append", default=[], help="of main_base.py, as --img-size=32 --train-crop=pad"
    )
    args = parser.parse_args()
    words = [args.folder, "-a", args.arch, "--student-resume", args.weights, "-e", "-b", "100", "-j", "0"]
    options = parse([*words, *args.options], "", distillation=False)
    engine = Engine(start_job(options, Seed(0, True), with_teacher=False), World())
    model = engine.job.student
    assert model is not None
    slow = mgd.Taps(model, default_taps(args.arch, model) or []).eval()
    quick: mgd.Frozen | None = None
    same, count, right = 0, 0, {"float32": 0, "fast": 0}
    cosines = torch.zeros(len(slow.paths), dtype=torch.float64)
    for images, target in engine.valid_images():
        quick = quick or fast(slow, images[:1])
        with torch.no_grad():
            expected, got = slow(images), quick(images)
        for number, (a, b) in enumerate(zip(expected.features, got.features, strict=True)):
            cosines[number] += torch.cosine_similarity(a.flatten(1), b.float().flatten(1)).sum()
        classes = {"float32": expected.logits.argmax(1), "fast": got.logits.argmax(1)}
        same += int((classes["float32"] == classes["fast"]).sum())
        for name, named in classes.items():
            right[name] += int((named == target).sum())
        count += len(images)
    found = (cosines / count).tolist()
    agreement = 100 * same / count
    print(f"cosines {found}, agreement {agreement:.2f} % of {count}, top-1 {right}")
    rows = [
        {"what": f"{args.arch}: lowest cosine of a map", "value": min(found), "target": "0.999", "cosines": found},
        {"what": f"{args.arch}: same class, %", "value": agreement, "target": "99.5", "images": count},
    ]
    top1 = {name: 100 * hits / count for name, hits in right.items()}
    keep(f"teacher-{args.arch.replace(':', '-')}", {"top1": top1, "rows": rows})


if __name__ == "__main__":
    main()
