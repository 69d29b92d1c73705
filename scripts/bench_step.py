"""How fast is a step? python scripts/bench_step.py: ours, a plain one, and the floor, in alternation.

plain: METHOD as one would first write it (scripts/plain.py). bare: the same networks, eager and float32, without any
matching. floor: the fast frozen teacher's forward, and the student's own step on labels in bfloat16, one after the
other. ahead: ours, the teacher's forward of the next batch on half of the threads meanwhile. Before anything is
timed, ours and plain must give the same losses in float32. Writes results/speed*/step.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from plain import PlainDistiller, Prefix
from side_by_side import Seconds, alternate, keep, question
from torch import Tensor, nn
from torch.nn import functional as F

import mgd
from classification.models import build, default_taps
from classification.system.memory import keep_freed_memory
from classification.training.precision import MixedPrecision, autocast, widen
from mgd.losses import CE, KD

STUDENTS = ("mobilenet_v1", "mobilenet_v2_mgd")
BLOCKS = (4, 7, 11, 17)  # of MobileNet-V2: the published code reads four maps and uses the last three
CPU = torch.device("cpu")


class Pair:
    """A student and a ResNet-50, tapped, in every form that is compared.

    Args:
        arch: of the student.
        images: (B, 3, H, W).
        target: (B,).
    """

    def __init__(self, arch: str, images: Tensor, target: Tensor) -> None:
        torch.manual_seed(0)
        self.images, self.target = images, target
        self.last = images.contiguous(memory_format=torch.channels_last)
        self.student = tapped(arch, len(default_taps(arch, None)))  # type: ignore[arg-type]
        self.teacher = tapped("resnet50", len(self.student.paths))
        with torch.no_grad():  # statistics of these images, so that maps have sizes as in use
            self.teacher.model.train()(images)
            self.teacher.model.eval()
        with torch.no_grad():
            maps = [mgd.dry_forward(net, images[:2]) for net in (self.student, self.teacher)]
        channels = [[m.shape[1] for m in o.features] for o in maps]
        norms = mgd.norms_before(self.teacher, images[:1])
        self.margins = [mgd.bn_margin(norm) for norm in norms if norm is not None]
        own, others = channels
        self.matching = mgd.ChannelMatching(
            own,
            others,
            self.margins,
            capacity="reference",  # without empty slots
            solver="scipy",  # device_check.py may have no ortools
        )
        self.matching.observe(maps[0], maps[1])
        self.matching.rematch()

    def distiller(self, *, fast: bool) -> mgd.Distiller:
        """Ours; with `fast` as it runs, else in float32, for the comparison of losses."""
        student, teacher = copy.deepcopy(self.student.model), copy.deepcopy(self.teacher.model)
        student, teacher = mgd.Taps(student, self.student.paths), mgd.Taps(teacher, self.teacher.paths)
        if fast:
            student.to(memory_format=torch.channels_last)
            widen(student.model)
            teacher = self.fast_teacher()
        terms = {"ce": (CE(), 1.0), "mgd": (copy.deepcopy(self.matching), 1e-4), "kd": (KD(temperature=1.5), 1.0)}
        return mgd.Distiller(student, mgd.freeze(teacher), terms)

    def fast_teacher(self) -> mgd.Frozen:
        """The frozen forward that a run uses."""
        teacher = mgd.Taps(copy.deepcopy(self.teacher.model), self.teacher.paths)
        mgd.fold_norms(teacher, self.images[:1])
        dtype = torch.bfloat16 if mgd.has_bfloat16(CPU) else torch.float32
        return mgd.freeze(teacher.to(dtype).to(memory_format=torch.channels_last))

    def plain(self, *, prefixes: bool) -> PlainDistiller:
        """The plain form, its prefixes on the student's own modules."""
        student, teacher = copy.deepcopy(self.student.model), copy.deepcopy(self.teacher.model)
        flows = [torch.as_tensor(flow.index) for flow in self.matching.flows]
        fronts = [Prefix(student, block) for block in BLOCKS] if prefixes else []
        taps = mgd.Taps(student, () if prefixes else self.student.paths)
        return PlainDistiller(taps, mgd.Taps(teacher, self.teacher.paths), self.margins, flows, fronts)


def tapped(arch: str, depth: int) -> mgd.Taps:
    model = build(arch, 1000)
    return mgd.Taps(model, (default_taps(arch, model) or [])[-depth:])


def trainer(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a step of SGD on what `module` trains."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def plain_step(pair: Pair) -> Callable[[], None]:
    """Return a step of the plain form; of a MobileNet-V2 with a forward for each map."""
    plain = pair.plain(prefixes=hasattr(pair.student.model, "features")).train()
    images, target = pair.images, pair.target
    return trainer(nn.ModuleList([plain.student, plain.adapters]), lambda: plain(images, target)["loss"])


def bare_step(pair: Pair) -> Callable[[], None]:
    """Return a step of both networks without any matching, eager and float32."""
    student, teacher = copy.deepcopy(pair.student.model).train(), copy.deepcopy(pair.teacher.model).eval()
    images, target = pair.images, pair.target

    def loss() -> Tensor:
        with torch.no_grad():
            teacher(images)
        return F.cross_entropy(student(images), target)

    return trainer(student, loss)


def our_step(pair: Pair, share: float = 0.0, compiled: bool = False) -> Callable[[], None]:
    """Return our step, costs being observed on a share of the batch; or as `--compile 1` has it."""
    ours, images, target = pair.distiller(fast=True).train(), pair.last, pair.target
    matching = ours.terms["mgd"]
    assert isinstance(matching, mgd.ChannelMatching)
    matching.observe_share = share
    if compiled:
        ours.compile(student=False, dynamic=False)
    mixed = MixedPrecision(ours, CPU, "bf16")
    return trainer(ours, lambda: mixed(images, target)["loss"])


def ahead_step(pair: Pair) -> Callable[[], Seconds]:
    """Return six of our steps, half of the threads being the teacher's, as `--teacher-threads` has it; their mean time.

    It is taken from the second batch to the last: the wait for the first forward is an epoch's, and the forward that is
    begun for the last batch makes up for that of the second, begun before.
    """
    ours, images, target = pair.distiller(fast=True).train(), pair.last, pair.target
    mixed, taught = MixedPrecision(ours, CPU, "bf16"), list[mgd.Outputs]()
    step = trainer(ours, lambda: mixed(images, target, None, 0, taught)["loss"])
    ahead = mgd.Ahead(ours.teachers, torch.get_num_threads() // 2)

    def steps() -> Seconds:
        times = []
        for _, known in ahead([images] * 6, lambda batch: batch):
            times.append(time.perf_counter())
            taught[:] = known.result()
            step()
        return Seconds((times[-1] - times[1]) / 4)

    return steps


def floor_step(pair: Pair) -> Callable[[], None]:
    """Return the teacher's forward, as fast as it can be, and the student's own step."""
    student, teacher = copy.deepcopy(pair.student.model).to(memory_format=torch.channels_last), pair.fast_teacher()
    images, target = pair.last, pair.target
    widen(student.train())

    def loss() -> Tensor:
        with autocast("cpu", "bf16"):
            teacher(images)
            logits = student(images)
        return F.cross_entropy(logits.float(), target)

    return trainer(student, loss)


STEPS: dict[str, Callable[[Pair], Callable[[], object]]] = {
    "plain": plain_step,
    "bare": bare_step,
    "ours": our_step,
    "ahead": ahead_step,
    "compiled": partial(our_step, compiled=True),
    "floor": floor_step,
}


def _of_term(name: str, message: str) -> str:
    return f"{name}: {message}"


def check(pair: Pair) -> None:
    """Refuse to time two things that differ."""
    prefixes = hasattr(pair.student.model, "features")
    for repeated in {False, prefixes}:
        found = []
        for way in (pair.plain(prefixes=repeated), pair.distiller(fast=False)):
            torch.manual_seed(0)  # of the dropout
            found.append(way.train()(pair.images, pair.target))
        expected, got = found
        for name in ("ce", "mgd", "kd", "loss"):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4, msg=partial(_of_term, name))
    check_compiled(pair)


def check_compiled(pair: Pair) -> None:
    """Refuse to time a compiled step that has another loss; both are in bfloat16."""
    found = []
    for compiled in (False, True):
        ours = pair.distiller(fast=True).train()
        if compiled:
            ours.compile(student=False, dynamic=False)
        with torch.no_grad():
            found.append(MixedPrecision(ours, CPU, "bf16")(pair.last, pair.target))
    for name in ("ce", "mgd"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=2e-2, atol=0, msg=partial(_of_term, name))


def forwards(pair: Pair) -> dict[str, Callable[[], object]]:
    """Return the teacher's forward, eager and fast, and the passes over images before a matching."""
    images, last = pair.images, pair.last
    student, teacher = pair.student.model.eval(), pair.teacher.model
    fast, compiled, matching = pair.fast_teacher(), pair.fast_teacher(), copy.deepcopy(pair.matching)
    compiled.compile(dynamic=False)
    quick = copy.deepcopy(pair.student).to(memory_format=torch.channels_last).eval()
    widen(quick.model)

    @torch.no_grad()
    def observe() -> None:
        with autocast("cpu", "bf16"):
            matching.observe(quick(last), fast(last))

    @torch.no_grad()
    def both() -> None:
        with autocast("cpu", "bf16"):
            quick.model(last), fast(last)

    return {
        "eager teacher": torch.no_grad()(lambda: teacher(images)),
        "fast teacher": lambda: fast(last),
        "compiled teacher": lambda: compiled(last),
        "two eager forwards": torch.no_grad()(lambda: (teacher(images), student(images))),
        "two fast forwards": both,
        "pass": observe,
    }


def make_pair(arch: str, batch_size: int, img_size: int) -> Pair:
    """Return a pair and its batch, always the same."""
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, img_size, img_size)
    return Pair(arch, images, torch.randint(0, 1000, (batch_size,)))


def measure(arch: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one student."""
    pair = make_pair(arch, args.batch_size, args.img_size)
    check(pair)
    print(f"{arch}: plain and ours agree in float32", flush=True)
    seconds = alternate({name: build(pair) for name, build in STEPS.items()}, args.rounds)
    prefixes = arch != "mobilenet_v1"
    rows = [
        question(f"step of {arch}: plain / ours", seconds, "plain", "ours", "5" if prefixes else "3"),
        question(f"step of {arch}: ours / floor", seconds, "ours", "floor", "at most 1.05"),
        question(f"step of {arch}: ours, the teacher ahead / floor", seconds, "ahead", "floor", "at most 1.05"),
        question(f"step of {arch}: plain / ours, the teacher ahead", seconds, "plain", "ahead", ""),
        question(f"step of {arch}: ours with --compile 1 / floor", seconds, "compiled", "floor", "at most 1.05"),
        question(f"step of {arch}: plain / ours with --compile 1", seconds, "plain", "compiled", ""),
        question(f"step of {arch}: bare / ours", seconds, "bare", "ours", ""),
        question(f"step of {arch}: plain / bare", seconds, "plain", "bare", ""),
    ]
    if arch == STUDENTS[0]:
        seconds = alternate(forwards(pair), args.rounds)
        rows += [
            question("ResNet-50 forward: eager / fast", seconds, "eager teacher", "fast teacher", "2.8"),
            question("ResNet-50 forward: eager / fast, compiled", seconds, "eager teacher", "compiled teacher", ""),
            question("matching: pass / two eager forwards", seconds, "pass", "two eager forwards", "at most 0.7"),
            question("matching: pass / two fast forwards", seconds, "pass", "two fast forwards", "at most 1.15"),
        ]
        ways = {"without": our_step(pair), "with": our_step(pair, args.observe_share)}
        seconds = alternate(ways, args.rounds)
        rows.append(question("step that observes costs: with / without", seconds, "with", "without", "at most 1.03"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--observe-share", type=float, default=1 / 64, help="20,000 of ImageNet's images in an epoch")
    parser.add_argument("--students", nargs="+", default=STUDENTS, choices=STUDENTS)
    args = parser.parse_args()
    keep_freed_memory()  # as a run does; all ways gain by it
    rows = [row for arch in args.students for row in measure(arch, args)]
    keep("step", {"batch_size": args.batch_size, "img_size": args.img_size, "rows": rows})


if __name__ == "__main__":
    main()
