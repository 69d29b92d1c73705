"""What main_mgd.py does: build the terms of a run, distil."""

from __future__ import annotations

from argparse import Namespace

from torch import nn

from classification.options import config
from classification.options.terms import using
from classification.runs import launch
from classification.runs.launch import World
from classification.training.distillation import distil, tap
from classification.training.engine import Engine
from classification.training.job import Job, start_job
from classification.training.trainer import Trainer


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
    distiller = distil(job, networks)
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller.terms)
    job.set_distiller(distiller)
    return job


def execute(job: Job, world: World) -> None:
    """Evaluate the networks, then distil."""
    if job.done:
        world.say(f"=> the run in {job.folder} is done")
        return
    engine = Engine(job, world)
    engine.evaluate_all()
    if job.args.calibrate and not job.args.evaluate:
        Trainer(engine).calibrate(job.args.calibrate)
    elif not job.args.evaluate:
        Trainer(engine).fit()


def run(words: list[str], prog: str) -> int:
    """Do what was typed; return the exit status."""
    return launch.run(lambda: config.parse(words, prog, distillation=True), prepare, execute, prog)
