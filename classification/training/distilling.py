"""What main_mgd.py does: build the terms of a run, match channels before an epoch, distil."""

from __future__ import annotations

import hashlib
import time
from argparse import Namespace

import numpy as np
import torch
from torch import nn

from classification.errors import RunError
from classification.options import config
from classification.options.terms import using
from classification.runs import launch
from classification.runs.checkpoint import save_flows
from classification.runs.launch import World
from classification.training.distillation import distil, mutual, tap
from classification.training.engine import Engine
from classification.training.job import Job, start_job
from classification.training.trainer import Trainer
from mgd import ChannelMatching, Distiller, Flow, Frozen, Taps, matchings
from mgd.losses import OFD


def prepare(args: Namespace) -> Job:
    """Build and check the job: data, networks, taps and terms."""
    job = start_job(args, with_teacher=True)
    if args.evaluate:
        return job
    assert job.student is not None
    networks = tap(args, job.student, job.teachers)
    logits = [name for name in using(args.terms, "maps") if not networks[0].paths]
    if logits:
        job.notes.append(f"no taps are known of these networks: {', '.join(logits)} compares logits")
    distiller = mutual(job, networks) if "dml" in args.terms else distil(job, *networks)
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller.terms)
    job.set_distiller(distiller)
    return job


@torch.no_grad()
def rematch(trainer: Trainer, found: list[ChannelMatching], epoch: int) -> dict[str, float]:
    """Observe the networks in eval mode on training images, solve the flows anew, and save them: teacher by teacher."""
    start = time.perf_counter()
    engine, distiller = trainer.engine, trainer.distiller
    assert isinstance(distiller, Distiller)
    student = distiller.student
    engine.world.share_state(student.model)
    student.eval()
    matched = all(matching.matched for matching in found)
    before = [flow.matrix for matching in found for flow in matching.flows] if matched else None
    if not (found[0].observe_share and matched):
        for images in engine.matching_images(epoch):
            with engine.autocast():
                outputs = student(images)
                for matching, teacher in zip(found, distiller.teachers, strict=True):
                    matching.observe(outputs, teacher(images))
    try:
        flows = [flow for matching in found for flow in matching.rematch()]
    except (ValueError, RuntimeError) as error:
        if launch.lost_a_rank(error):
            raise
        raise RunError(f"the matching before {config.epoch_name(engine.args, epoch)} failed: {error}") from error
    for matching, teacher in zip(found, distiller.teachers, strict=True):
        for stage in matching.dead:
            assert isinstance(teacher, Frozen) and isinstance(teacher.taps, Taps)
            engine.world.say(
                f"=> warning: the teacher's map at tap {teacher.taps.paths[stage]} (stage {stage}) is nowhere "
                "positive, and mgd teaches nothing there: choose another tap by --teacher-taps"
            )
    engine.world.check_same(flows_hash(flows), f"the flows before {config.epoch_name(engine.args, epoch)}")
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
    if engine.world.first and not engine.args.calibrate:
        number = epoch // engine.args.mgd_update_freq if engine.args.mgd_update_freq else 0
        costs = [cost for matching in found for cost in matching.costs]
        save_flows(engine.job.folder / "flow", number, flows, costs, epoch)
    return record


def flows_hash(flows: list[Flow]) -> int:
    """Hash flows to a 63-bit number, so that ranks can check that theirs are equal."""
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(flow.index).tobytes() for flow in flows)).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def before_epoch(trainer: Trainer, epoch: int) -> dict[str, float]:
    """Recompute the flows if this epoch is scheduled or none exist; initialise terms that start from a flow."""
    found = matchings(trainer.distiller.terms)
    every = trainer.args.mgd_update_freq
    due = epoch % every == 0 if every else epoch == 0
    record = rematch(trainer, found, epoch) if found and (due or not all(m.matched for m in found)) else {}
    if starting := [term for term in trainer.distiller.terms.values() if isinstance(term, OFD) and not term.ready]:
        if not found:
            found = [matching.to(trainer.world.device) for matching in trainer.job.starts]
            record = rematch(trainer, found, epoch)
        for term in starting:
            term.start([flow for matching in found for flow in matching.flows])
    return record


def execute(job: Job, world: World) -> None:
    """Evaluate the networks, then distil."""
    if job.done:
        world.say(f"=> the run in {job.folder} is done")
        return
    engine = Engine(job, world)
    engine.evaluate_all()
    if job.args.calibrate and not job.args.evaluate:
        Trainer(engine, before_epoch).calibrate(job.args.calibrate)
    elif not job.args.evaluate:
        Trainer(engine, before_epoch).fit()


def run(words: list[str], prog: str) -> int:
    """Do what was typed; return the exit status."""
    return launch.run(lambda: config.parse(words, prog, distillation=True), prepare, execute, prog)
