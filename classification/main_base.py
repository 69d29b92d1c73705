"""Train or evaluate one network on a folder of photographs: python main_base.py DIR --arch mobilenet_v1"""

from __future__ import annotations

import sys
from argparse import Namespace

from classification.options import config
from classification.runs import launch
from classification.runs.launch import World
from classification.training.engine import Engine
from classification.training.job import Job, start_job
from classification.training.trainer import Trainer
from mgd import Distiller
from mgd.losses import CE

PROG = "main_base.py"


def prepare(args: Namespace) -> Job:
    """Build and check the job: data, network, cross-entropy."""
    given = args.teacher_resume or args.teacher_arch
    args.teachers = [{"arch": args.teacher_arch, "resume": args.teacher_resume}] if given else []
    args.terms, args.labels = {"ce": {}}, 1
    job = start_job(args, with_teacher=bool(given))
    if not args.evaluate:
        assert job.student is not None
        job.set_distiller(Distiller(job.student, [], {"ce": (CE(args.label_smoothing), 1.0)}))
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


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    return launch.run(lambda: config.parse(words, PROG, distillation=False), prepare, execute, PROG)


if __name__ == "__main__":
    sys.exit(main())
