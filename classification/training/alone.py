"""What main_base.py does: train or evaluate one network."""

from __future__ import annotations

from argparse import Namespace

from classification.options import config
from classification.runs import launch
from classification.runs.launch import World
from classification.training.engine import Engine
from classification.training.job import Job, start_job
from classification.training.trainer import Trainer
from mgd import Distiller


def prepare(args: Namespace) -> Job:
    """Build and check the job: data, network, cross-entropy."""
    given = args.teacher_resume or args.teacher_arch
    args.teachers = [{"arch": args.teacher_arch, "resume": args.teacher_resume}] if given else []
    args.labels = 1
    job = start_job(args, with_teacher=bool(given))
    if not args.evaluate:
        assert job.student is not None
        terms = {name: (spec.kind(spec.hyper), 1.0) for name, spec in args.terms.items()}
        job.set_distiller(Distiller(job.student, [], terms))
    return job


def execute(job: Job, world: World) -> None:
    """Evaluate, or train."""
    if job.done:
        world.say(f"=> the run in {job.folder} is done")
        return
    engine = Engine(job, world)
    if job.args.evaluate or job.notes:
        engine.evaluate_all()
    if not job.args.evaluate:
        Trainer(engine).fit()


def run(words: list[str], prog: str) -> int:
    """Do what was typed; return the exit status."""
    return launch.run(lambda: config.parse(words, prog, distillation=False), prepare, execute, prog)
