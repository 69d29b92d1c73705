"""Count the operators and bytes of one training step of three recipes: python scripts/count_step.py [--renew]

No clock is read: the counts are the same on every machine, so that a test can compare them with those stored in
tests/data/step_costs.json. They belong to one version of torch. After a change that is meant to cost more or less,
store new counts by `python scripts/count_step.py --renew`, and say in the commit message why.

A step is forward, backward and SGD with momentum. A CIFAR ResNet-8 teaches one of half its width: three taps, 160
images of 16 px, in float32. With so many images the matching loss takes the shallowest maps in two slices.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from classification.models import build, default_taps
from mgd import ChannelMatching, Distiller, Taps, fold_norms, freeze, probe
from mgd.losses import LOSSES, OFD

STORED = Path(__file__).parents[1] / "tests" / "data" / "step_costs.json"
TOLERANCE = 0.02
STUDENT, TEACHER = "cifar_resnet8_w0.5", "cifar_resnet8"
NUM_IMAGES, SIZE, NUM_CLASSES = 160, 16, 10
RECIPES = ("mgd-amp", "mgd-rd-kd", "ofd")
PARTS = ("teacher", "student and terms", "backward", "update")  # compared one by one, so that none hides in the others
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

Costs = dict[str, tuple[int, int]]  # {operator: (calls, bytes)}


class Counter(TorchDispatchMode):
    """Count the calls of every ATen operator, and the bytes of the tensors that they read and write.

    Views and allocations have no bytes. A tensor that is changed in place is read and written.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs: Costs = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            free = func.is_view or func.overloadpacket.__name__ in ALLOCATIONS
            calls, moved = self.costs.get(str(func), (0, 0))
            self.costs[str(func)] = (calls + 1, moved + (0 if free else _bytes_of((args, kwargs, result))))
        return result


def _bytes_of(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in tree_leaves(values) if isinstance(value, Tensor))


def totals(costs: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Return the number of calls and the bytes of all operators."""
    return sum(calls for calls, _ in costs.values()), sum(moved for _, moved in costs.values())


def make_distiller(recipe: str, images: Tensor) -> Distiller:
    """Build the distiller of a recipe, its flows solved; the teacher is frozen and its norms are folded."""
    torch.manual_seed(0)
    student, teacher = tapped(STUDENT), tapped(TEACHER)
    probes = [probe(network, images) for network in (student, teacher)]
    terms: dict[str, tuple[nn.Module, float]] = {"ce": (LOSSES["ce"](), 1.0)}
    if recipe == "ofd":
        terms["ofd"] = (OFD.build(probes[0], probes[1:], NUM_IMAGES), 1e-3)
    else:
        online = recipe == "mgd-rd-kd"
        # Of 1000 images, a matching observes 5 % online.
        hyper = ChannelMatching.Hyper(reducer="rd", observe="online", max_images=50, update_freq=1) if online else None
        terms["mgd"] = (ChannelMatching.build(probes[0], probes[1:], 1000, hyper), 1e-3)
        if online:
            terms["kd"] = (LOSSES["kd"](), 1.0)
    distiller = Distiller(student, freeze(teacher), terms)
    distiller.update(0, [[images]])
    fold_norms(teacher, images[:1])
    return distiller


def tapped(arch: str) -> Taps:
    """Build a network, tapped at the places of its family."""
    network = build(arch, NUM_CLASSES)
    return Taps(network, default_taps(arch, network) or ())


def count(recipe: str) -> dict[str, Costs]:
    """Count the parts of the second step of a recipe: the first one also learns the taps and makes momentum buffers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_IMAGES, 3, SIZE, SIZE, generator=generator)
    target = torch.arange(NUM_IMAGES) % NUM_CLASSES
    distiller = make_distiller(recipe, images)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, foreach=False)
    for _ in range(2):
        counters = {part: Counter() for part in PARTS}
        with counters["teacher"]:
            taught = [teacher(images) for teacher in distiller.teachers]
        with counters["student and terms"]:
            loss = distiller(images, target, taught=taught)["loss"]
        with counters["backward"]:
            loss.backward()
        with counters["update"]:
            optimizer.step()
            optimizer.zero_grad()
    return {part: dict(sorted(counter.costs.items())) for part, counter in counters.items()}


def compare(what: str, before: Mapping[str, Sequence[int]], after: Mapping[str, Sequence[int]]) -> str:
    """Return which operators changed where the calls or the bytes of all of them moved by more than 2 %, else ""."""
    old, new = totals(before), totals(after)
    if all(abs(n - o) <= TOLERANCE * o for o, n in zip(old, new, strict=True)):
        return ""
    lines = [
        f"{what}: {old[0]} -> {new[0]} operators ({new[0] / old[0] - 1:+.1%}), "
        f"{_mb(old[1])} -> {_mb(new[1])} MB ({new[1] / old[1] - 1:+.1%}). Changed are"
    ]
    pairs = {name: (before.get(name, (0, 0)), after.get(name, (0, 0))) for name in sorted({*before, *after})}
    changed = [(name, *pair) for name, pair in pairs.items() if tuple(pair[0]) != tuple(pair[1])]
    for name, (calls, moved), (calls_now, moved_now) in sorted(changed, key=lambda row: -abs(row[2][1] - row[1][1])):
        lines.append(f"  {name}: {calls} -> {calls_now} calls, {_mb(moved)} -> {_mb(moved_now)} MB")
    return "\n".join(lines)


def _mb(moved: int) -> str:
    return f"{moved / 1e6:.2f}"


def version() -> str:
    """Return the version of torch, without that of its CUDA."""
    return torch.__version__.split("+")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="store the counts for the test")
    args = parser.parse_args()
    recipes = {recipe: count(recipe) for recipe in RECIPES}
    for recipe, parts in recipes.items():
        for part, costs in parts.items():
            calls, moved = totals(costs)
            print(f"{f'{recipe}, {part}':44} {calls:5} calls {_mb(moved):>9} MB")
            for name, (calls, moved) in sorted(costs.items(), key=lambda item: -item[1][1]):
                print(f"    {name:40} {calls:5}       {_mb(moved):>9}")
    if args.renew:
        STORED.write_text(_as_text({"torch": version(), **recipes}) + "\n")


def _as_text(stored: Any) -> str:
    """Return JSON with a line per operator."""
    text = json.dumps(stored, indent=1)
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)


if __name__ == "__main__":
    main()
