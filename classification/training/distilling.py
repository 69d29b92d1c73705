"""The work of main_mgd.py: build networks, taps and terms, then distil."""

from __future__ import annotations

from functools import partial

from torch import nn

from classification.options import config
from classification.options.options import Options
from classification.options.terms import using
from classification.runs import launch
from classification.runs.launch import Task
from classification.runs.world import Seed, World
from classification.training.agreement import check_parallel, check_ranks
from classification.training.distillation import distil
from classification.training.engine import Engine
from classification.training.int8 import prepare_int8
from classification.training.job import Job
from classification.training.starting import start_job
from classification.training.stored import open_for
from classification.training.tapping import described, tap
from classification.training.trainer import Trainer
from mgd import Taps


def prepare(options: Options, seed: Seed) -> Job:
    """Build and check the job: data, networks, taps and terms."""
    job = start_job(options, seed, with_teacher=True)
    if options.run.evaluate:
        return job
    assert job.student is not None
    if not options.run.show_taps:
        prepare_int8(job)
    if options.networks.teacher_cache:
        job.stored = open_for(job)
    networks = tap(job) if job.stored is None else [Taps(job.student)]
    if options.run.show_taps:
        job.taps_table = described(job, networks)
        return job
    if (without_maps := using(options.table, "maps")) and not networks[0].paths:
        job.notes.append(f"these networks have no published taps: {', '.join(without_maps)} compares logits")
    distiller = distil(job, networks)
    if options.devices.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller.terms)
    job.set_distiller(distiller)
    return job


def execute(job: Job, world: World) -> None:
    """Evaluate the networks, then distil."""
    check_ranks(job, world)
    check_parallel(job, world)
    if job.done:
        world.say(f"=> the run in {job.folder} is done")
        return
    if job.taps_table:
        world.say(job.taps_table)
        return
    engine, run = Engine(job, world), job.options.run
    engine.evaluate_all()
    if run.calibrate and not run.evaluate:
        Trainer(engine).calibrate(run.calibrate)
    elif not run.evaluate:
        Trainer(engine).fit()


def run(words: list[str], prog: str) -> int:
    """Run the command line; return the exit status."""
    return launch.run(Task(words, prog, partial(config.parse, distillation=True), prepare, execute))
