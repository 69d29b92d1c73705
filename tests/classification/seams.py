"""Whole runs whose job or trainer a test changes before they start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from classification import main_base, main_mgd
from classification.options.config import parse
from classification.options.options import Options
from classification.runs import launch
from classification.runs.launch import Task
from classification.runs.world import Seed, World
from classification.training import alone, distilling
from classification.training.engine import Engine
from classification.training.job import Job
from classification.training.trainer import Trainer


def run_changed(words: list[str], change: Callable[[Job], object], script: Any = main_mgd) -> int:
    """Do a run whose job `change` has changed, and return its exit status."""
    module = distilling if script is main_mgd else alone
    assert script in (main_mgd, main_base)

    def prepare(options: Options, seed: Seed) -> Job:
        job: Job = module.prepare(options, seed)
        change(job)
        return job

    read = partial(parse, distillation=script is main_mgd)
    return launch.run(Task(words, script.PROG, read, prepare, module.execute))


def run_trainer(
    words: list[str], change: Callable[[Trainer], object], script: Any = main_mgd, engine: type[Engine] = Engine
) -> int:
    """Train a run whose trainer `change` has changed before its first step, and return its exit status."""
    module = distilling if script is main_mgd else alone

    def execute(job: Job, world: World) -> None:
        trainer = Trainer(engine(job, world))
        change(trainer)
        trainer.fit()

    read = partial(parse, distillation=script is main_mgd)
    return launch.run(Task(words, script.PROG, read, module.prepare, execute))


def before_forward(job: Job, hook: Callable[[int, Any], Any]) -> None:
    """Call `hook` with the number of each forward of the distiller, from 1, and its images, which it may replace."""
    calls: list[None] = []

    def called(_: nn.Module, inputs: Any) -> Any:
        calls.append(None)
        images = hook(len(calls), inputs[0])
        return None if images is None else (images, *inputs[1:])

    assert job.distiller is not None
    job.distiller.register_forward_pre_hook(called)


def poison(job: Job, steps: set[int]) -> None:
    """Make the images of the forwards of these numbers NaN."""
    before_forward(job, lambda number, images: images * float("nan") if number in steps else None)


def fix_norms(job: Job) -> None:
    """Have norms use fixed statistics: a batch in parts is then the same function as the whole batch."""

    def fixed(norm: nn.Module, _: Any) -> None:
        norm.training = False

    assert job.distiller is not None
    for module in job.distiller.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(fixed)
