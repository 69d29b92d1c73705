"""Distil a student from a teacher: python main_mgd.py DIR --arch mobilenet_v1 --distiller mgd --mgd-reducer amp"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from functools import partial

import torch
from torch import Tensor, nn

from classification import config, launch
from classification.checkpoint import save_flows
from classification.engine import Engine
from classification.errors import UserError
from classification.job import Job, start_job
from classification.launch import World
from classification.models import default_taps
from mgd import (
    ChannelMatching,
    Distiller,
    Frozen,
    Taps,
    bn_margin,
    dry_forward,
    fold_norms,
    freeze,
    has_bfloat16,
    norms_before,
)
from mgd.distiller import Weight
from mgd.losses import CE, KD

PROG = "main_mgd.py"


def prepare(args: Namespace) -> Job:
    """Build and check the job: data, networks, taps and terms."""
    job = start_job(args, with_teacher=True)
    if args.evaluate:
        return job
    assert job.student is not None and job.teacher is not None
    names = args.distiller.split("+")
    student, teacher = Taps(job.student), Taps(job.teacher)
    terms: dict[str, tuple[nn.Module, Weight]] = {"ce": (CE(args.label_smoothing), 1.0)}
    if "mgd" in names:
        student, teacher = tap(args, job.student, job.teacher)
        terms["mgd"] = (match(args, student, teacher), partial(config.mgd_weight, args))
    if "kd" in names:
        terms["kd"] = (KD(args.kd_temperature), args.kd_weight)
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleDict({n: term for n, (term, _) in terms.items()}))
    job.teacher = speed_up(job, teacher)
    job.set_distiller(Distiller(student, job.teacher, terms))
    return job


def speed_up(job: Job, teacher: Taps) -> Frozen:
    """Freeze a teacher in its fastest form: norms folded, in bfloat16 where the device has it."""
    args, size = job.args, job.args.img_size
    folded = fold_norms(teacher, torch.randn(1, 3, size, size))
    if args.teacher_dtype == "auto":
        args.teacher_dtype = "bfloat16" if has_bfloat16(launch.device_of(args)) else "float32"
    job.notes.append(f"teacher: frozen, {folded} batch norms folded into convolutions, {args.teacher_dtype}")
    return freeze(teacher.to(getattr(torch, args.teacher_dtype)))


def tap(args: Namespace, student: nn.Module, teacher: nn.Module) -> tuple[Taps, Taps]:
    """Tap both networks at the paths named, or at those of their families.

    Raises:
        UserError: no taps known, unknown paths, or another number of them.
    """
    paths = []
    for role, arch, network in (("student", args.arch, student), ("teacher", args.teacher_arch, teacher)):
        named = getattr(args, f"{role}_taps")
        known = named.split(",") if named else default_taps(arch, network)
        if known is None:
            modules = ", ".join(name for name, _ in network.named_children())
            raise UserError(f"no taps are known for {arch}: name them by --{role}-taps (its modules: {modules})")
        paths.append(known)
    if not args.student_taps and not args.teacher_taps:  # the published pairs leave the shallowest stages unused
        depth = min(len(known) for known in paths)
        paths = [known[-depth:] for known in paths]
    if len(paths[0]) != len(paths[1]):
        raise UserError(
            f"student and teacher need as many taps each; got {len(paths[0])} ({', '.join(paths[0])}) "
            f"and {len(paths[1])} ({', '.join(paths[1])})"
        )
    try:
        return Taps(student, paths[0]), Taps(teacher, paths[1])
    except ValueError as error:
        raise UserError(str(error)) from error


def match(args: Namespace, student: Taps, teacher: Taps) -> ChannelMatching:
    """Build the matching term for tapped networks: channels from a dry forward, margins from the teacher's norms.

    Raises:
        UserError: taps that are no maps, or differ in resolution.
    """
    images = torch.zeros(1, 3, args.img_size, args.img_size)
    try:
        maps = [dry_forward(network, images).features for network in (student, teacher)]
        norms = norms_before(teacher, images)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the networks do not run at --img-size {args.img_size} with these taps: {error}") from error
    for paths, pair in zip(zip(student.paths, teacher.paths, strict=True), zip(*maps, strict=True), strict=True):
        if any(m.ndim != 4 for m in pair) or pair[0].shape[2:] != pair[1].shape[2:]:
            shapes = [tuple(m.shape[1:]) for m in pair]
            raise UserError(
                f"taps {paths[0]} (student, {shapes[0]}) and {paths[1]} (teacher, {shapes[1]}) need maps of equal "
                "resolution: name others by --student-taps or --teacher-taps"
            )
    return ChannelMatching(
        [m.shape[1] for m in maps[0]],
        [m.shape[1] for m in maps[1]],
        [margin(args.mgd_margin, norm, m) for norm, m in zip(norms, maps[1], strict=True)],
        reducer=args.mgd_reducer,
        capacity=args.mgd_capacity,
        solver=args.mgd_solver,
        form=args.mgd_form,
        assignment=args.mgd_assignment,
        seed=args.seed,
    )


def margin(kind: str, norm: nn.BatchNorm2d | None, teacher_map: Tensor) -> Tensor | None:
    """Return the margins of a tap, or None where they are measured on the map."""
    if kind == "none":
        return torch.full((teacher_map.shape[1],), -torch.inf)
    return bn_margin(norm) if kind == "bn" and norm is not None else None


@torch.no_grad()
def rematch(engine: Engine, matching: ChannelMatching, epoch: int) -> dict[str, float]:
    """Observe both networks in eval mode on training images, solve the flows anew, and save them."""
    start = time.perf_counter()
    student, (teacher,) = engine.distiller.student, engine.distiller.teachers
    engine.world.share_state(student.model)
    student.eval()
    before = [flow.matrix for flow in matching.flows] if matching.matched else None
    for images in engine.matching_images(epoch):
        with engine.autocast():
            matching.observe(student(images), teacher(images))
    flows = matching.rematch()
    seconds = time.perf_counter() - start
    record = {"match_seconds": seconds, "flow_cost": sum(flow.total_cost for flow in flows)}
    changed = ""
    if before is not None:
        pairs = sum(matrix.sum() for matrix in before)
        kept = sum((matrix & flow.matrix).sum() for matrix, flow in zip(before, flows, strict=True))
        record["flow_changed"] = float(1 - kept / pairs)
        changed = f", {100 * record['flow_changed']:.1f} % of the pairs changed"
    means = "  ".join(f"{flow.total_cost / (flow.index >= 0).sum():.3f}" for flow in flows)
    engine.world.say(f"=> matched in {seconds:.1f} s: mean cost of a pair, stage by stage  {means}{changed}")
    if engine.world.first:
        number = epoch // engine.args.mgd_update_freq if engine.args.mgd_update_freq else 0
        save_flows(engine.job.folder / "flow", number, flows, matching.costs, epoch)
    return record


def before_epoch(engine: Engine, epoch: int) -> dict[str, float]:
    """Match again where an epoch is due, or nothing was matched yet."""
    if "mgd" not in engine.distiller.terms:
        return {}
    matching = engine.distiller.terms["mgd"]
    assert isinstance(matching, ChannelMatching)
    every = engine.args.mgd_update_freq
    due = epoch % every == 0 if every else epoch == 0
    return rematch(engine, matching, epoch) if due or not matching.matched else {}


def execute(job: Job, world: World) -> None:
    """Evaluate both networks, then distil."""
    engine = Engine(job, world)
    engine.evaluate_both()
    if not job.args.evaluate:
        engine.fit(before_epoch)


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    return launch.run(lambda: config.parse(words, PROG, distillation=True), prepare, execute, PROG)


if __name__ == "__main__":
    sys.exit(main())
