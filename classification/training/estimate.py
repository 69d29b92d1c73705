"""Estimate the time, memory and disk space of runs from a few measured steps."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from classification.data.loading import explain_worker_errors
from classification.data.preprocessing import Preprocessing
from classification.models import build
from classification.options import config
from classification.options.options import Options
from classification.options.terms import TermSpec
from classification.runs.checkpoint import describe_student
from classification.runs.world import Seed, World, device_of
from classification.system.memory import keep_freed_memory, peak_bytes
from classification.training import alone, distilling
from classification.training.engine import Engine
from classification.training.job import Job
from classification.training.trainer import Trainer
from classification.training.updates import update_terms

BATCHES = 4  # number of training batches that are measured; of valid, half as many images


@dataclass(frozen=True)
class Tried:
    """A run whose cost is estimated.

    Args:
        script: main_base or main_mgd.
        words: its command line, without seed and folder; `TEACHER` stands for a teacher that is not trained yet.
    """

    script: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of a run.

    Args:
        seconds: from its start to its end.
        memory_bytes: the most that it uses at once.
        disk_bytes: of the checkpoints in its folder.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int


TEACHER = "{teacher}"


@dataclass(frozen=True)
class NewTeacher:
    """A teacher that is not trained yet: its network, and the class names in order of index."""

    arch: str
    classes: Sequence[str]


def estimate(
    tried: Sequence[Tried], teacher: NewTeacher | None, threads: int, begun: float
) -> tuple[list[Cost], list[str]]:
    """Build every run, do a few of its steps, and return its cost.

    Call it in a new process: it measures the memory of the process, and the time since its start.

    Args:
        tried: the runs.
        teacher: a teacher that is not trained yet, in whose place a network with random weights is used; or None.
        threads: number of threads of each run.
        begun: start of the process, by `time.time`.

    Returns:
        The costs, and the notes of the runs on the images, one line each.

    Raises:
        UserError: a mistake of the user's in a run.
        RunError: a step failed.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    costs: list[Cost] = []
    notes: dict[str, None] = {}
    start = 0.0
    with TemporaryDirectory() as folder:
        file = Path(folder, "teacher.pth")
        for run in tried:
            words, distils = [word.replace(TEACHER, str(file)) for word in run.words], run.script == "main_mgd"
            options = config.parse(words, f"{run.script}.py", distillation=distils)
            if teacher is not None and not file.exists():
                _stand_in(file, teacher, options)
            # With --calibrate a run writes nothing.
            options = replace(options, run=replace(options.run, calibrate=1))
            with contextlib.redirect_stdout(io.StringIO()):
                job = (distilling if distils else alone).prepare(options, Seed(0, typed=True))
                start = start or time.time() - begun
                costs.append(_cost(job))
            notes |= dict.fromkeys(job.data.notes)
    return [replace(cost, seconds=start + cost.seconds) for cost in costs], list(notes)


def _stand_in(file: Path, teacher: NewTeacher, options: Options) -> None:
    """Save a network with random weights in place of the teacher."""
    preprocessing = Preprocessing.of(options.data.img_size or 224, options.data.train_crop or "resized")
    number = len(teacher.classes)
    state = build(teacher.arch, number).state_dict()
    torch.save(describe_student(state, teacher.arch, number, list(teacher.classes), preprocessing), file)


def _cost(job: Job) -> Cost:
    """Measure a few batches of a job, and extrapolate to all of its images and epochs."""
    optimisation, train, valid = job.options.optimisation, job.data.train, job.data.valid
    most = BATCHES * optimisation.batch_size
    if job.stored is not None:
        job.stored = job.stored.part_of(_positions(len(train), most))
    job.data = replace(job.data, train=_spread(train, most), valid=_spread(valid, most // 2))
    engine = Engine(job, World(device=device_of(job.options.devices)))
    trainer = Trainer(engine)
    epochs, begun = config.total_epochs(optimisation), time.perf_counter()
    update_terms(engine, trainer.distiller, 0)
    matching = time.perf_counter() - begun
    step = statistics.median(_steps(trainer)[-BATCHES + 1 :])
    begun = time.perf_counter()
    engine.evaluate(trainer.result)
    evaluation = time.perf_counter() - begun
    epoch = step * math.ceil(len(train) / optimisation.batch_size) + evaluation * len(valid) / len(job.data.valid)
    seconds = epochs * epoch + _updates(job.options.table, epochs) * matching * len(train) / len(job.data.train)
    return Cost(seconds, peak_bytes(engine.world.device), _disk(trainer))


def _spread(samples: Sequence[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    """Return at most `most` samples, evenly spaced, so that they come from all classes alike."""
    return [samples[position] for position in _positions(len(samples), most)]


def _positions(number: int, most: int) -> range:
    return range(0, number, math.ceil(number / most))


def _steps(trainer: Trainer) -> list[float]:
    """Do the steps of an epoch; return the seconds of each."""
    stepper, batches, seconds = trainer.stepper, trainer.batches, []
    batches.begin(0)
    stepper.wrapped.train()
    before = time.perf_counter()
    for number, (batch, pending) in enumerate(
        stepper.ahead(explain_worker_errors(trainer.loader, trainer.engine.workers))
    ):
        stepper.set_rate(config.learning_rate(trainer.options.optimisation, 0, 0.0))
        stepper(batch, 0, number, batches.batch_size(number), pending)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return seconds


def _updates(table: Mapping[str, TermSpec], epochs: int) -> int:
    """Return how often the terms' `update` of a run reads the training images."""
    every = [spec.hyper.update_freq for spec in table.values() if hasattr(spec.hyper, "update_freq")]
    return max((math.ceil(epochs / freq) if freq else 1 for freq in every), default=0)


def _disk(trainer: Trainer) -> int:
    """Estimate the bytes of best.pth and last.pth: weights twice, momenta, terms, peers and an average."""
    networks = [*trainer.peers().values(), trainer.student]
    states = [network.state_dict() for network in networks]
    own = 3 * sum(_bytes(state) for state in states) + _bytes(trainer.distiller.terms.state_dict())
    return own + (_bytes(states[-1]) if trainer.stepper.average is not None else 0)


def _bytes(state: Mapping[str, object]) -> int:
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
