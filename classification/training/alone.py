"""The work of main_base.py: train or evaluate one network."""

from __future__ import annotations

from functools import partial

from torch import nn

from classification.errors import UserError
from classification.models.heads import freeze_body
from classification.options import config
from classification.options.options import Options
from classification.runs import launch
from classification.runs.launch import Task
from classification.runs.world import Seed, World
from classification.training.agreement import check_parallel, check_ranks
from classification.training.engine import Engine
from classification.training.int8 import prepare_int8
from classification.training.job import Job
from classification.training.starting import start_job
from classification.training.trainer import Trainer
from classification.training.weighing import hyper_of
from mgd import Distiller


def prepare(options: Options, seed: Seed) -> Job:
    """Build and check the job: data, network, cross-entropy."""
    job = start_job(options, seed, with_teacher=bool(options.teachers))
    if not options.run.evaluate:
        assert job.student is not None
        prepare_int8(job)
        if options.optimisation.linear_probe:
            _probe(job, job.student)
        terms = {name: (spec.kind(hyper_of(job, name)), 1.0) for name, spec in options.table.items()}
        job.set_distiller(Distiller(job.student, [], terms))
    return job


def _probe(job: Job, student: nn.Module) -> None:
    """Freeze all weights except the head's.

    Raises:
        UserError: the network has no weights, or no head.
    """
    if job.untrained:
        raise UserError(
            "--linear-probe 1 needs a network with weights: give them with --student-resume FILE or --pretrained"
        )
    job.still = freeze_body(student, job.preprocessing.img_size)
    num = sum(p.numel() for p in student.parameters() if p.requires_grad)
    job.notes.append(f"linear probe: {num} of {job.sizes['student']} weights train, those of the head")


def execute(job: Job, world: World) -> None:
    """Evaluate, or train."""
    check_ranks(job, world)
    check_parallel(job, world)
    if job.done:
        world.say(f"=> the run in {job.folder} is done")
        return
    engine = Engine(job, world)
    if job.options.run.evaluate or job.notes:
        engine.evaluate_all()
    if not job.options.run.evaluate:
        Trainer(engine).fit()


def run(words: list[str], prog: str) -> int:
    """Run the command line; return the exit status."""
    return launch.run(Task(words, prog, partial(config.parse, distillation=False), prepare, execute))
