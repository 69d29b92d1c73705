"""Write the checkpoints of a training between two steps, and restore them."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from classification.errors import RunError, quoted
from classification.models import configuration
from classification.options.config import describe, epoch_name
from classification.runs.checkpoint import VERSION, describe_student, write_atomic
from classification.runs.history import keep_last
from classification.runs.random_state import random_state, set_random_state
from classification.runs.restore import load_or_keep
from classification.training import averaging
from classification.training.int8 import described_int8
from classification.training.optimizer import load_optimizer
from classification.training.step import finite

if TYPE_CHECKING:
    from classification.training.trainer import Trainer


def save(trainer: Trainer, *, better: Collection[str] = ()) -> None:
    """Write last.pth, with rank 0's weights and all ranks' random states, and the files of peers and best networks.

    Args:
        trainer: between two steps.
        better: the networks that are the best so far: "" for the student, else names of peers.

    Raises:
        RunError: weights are not finite; the files are unchanged.
    """
    trainer.stepper.settle()
    trainer.world.share_state(trainer.student)
    if trainer.result is not trainer.student:
        trainer.world.share_state(trainer.result)
    if not finite(trainer.distiller):
        epoch = epoch_name(trainer.options.optimisation, trainer.epoch - (trainer.step == 0 < trainer.epoch))
        raise RunError(
            f"weights are not finite after {epoch}{f', step {trainer.step}' if trainer.step else ''}: lower --lr; "
            f"{trainer.job.folder / 'last.pth'} is from before that"
        )
    trainer.means.collect(trainer.world)
    for term in trainer.terms():
        term.collect(first=trainer.world.first)
    generators = random_state(trainer.world)
    if not trainer.world.first:
        return
    job = trainer.job
    description = (job.num_classes, job.data.classes, job.preprocessing)
    more = {**configuration(trainer.student), **described_int8(job)}
    plain = describe_student(trainer.result.state_dict(), job.arch, *description, more)
    for (name, peer), spec in zip(trainer.peers().items(), trainer.job.specs, strict=False):
        content = describe_student(peer.state_dict(), spec["arch"], *description, configuration(peer))
        for file in (f"{name}.pth", *([f"best_{name}.pth"] if name in better else [])):
            write_atomic(trainer.job.folder / file, content)
    if "" in better:
        write_atomic(trainer.job.folder / "best.pth", plain)
    resume = _resume_state(trainer, generators)
    write_atomic(trainer.job.folder / "last.pth", {**plain, "resume": resume})
    if trainer.step == 0 and trainer.epoch > trainer.options.optimisation.start_epoch:
        keep_last(trainer.job.folder, trainer.epoch, trainer.options.run.keep_checkpoints)


def _resume_state(trainer: Trainer, generators: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what last.pth has in addition to the student: everything that a resumed run needs."""
    return {
        "version": VERSION,
        "epoch": trainer.epoch,
        "step": trainer.step,
        "seen": trainer.images_done,
        "elapsed": trainer.elapsed + time.perf_counter() - trainer.begun,
        "seconds": trainer.seconds,
        "extra": trainer.extra,
        "means": trainer.means.state_dict(),
        "best": trainer.best,
        "skipped": trainer.stepper.skipped,
        "seed": trainer.engine.seed,
        "config": describe(trainer.options.command, trainer.job.record()),
        "inputs": trainer.job.inputs,
        "peers": {name: peer.state_dict() for name, peer in trainer.peers().items()},
        "terms": {name: term.state_dict() for name, term in trainer.distiller.terms.items()},
        "optimizer": trainer.stepper.optimizer.state_dict(),
        "scaler": trainer.stepper.scaler.state_dict(),
        "ema": averaging.state(trainer.stepper.average, trainer.student),
        "int8": {} if trainer.job.quantisation is None else trainer.job.quantisation.state_dict(),
        "random": generators,
    }


def restore(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Load the state of a checkpoint, except those of student and terms, which are loaded when the job is built."""
    reinitialised = [*trainer.job.reinitialised, *_restore_peers(trainer, state["peers"])]
    options_then, optimisation = state["config"]["options"], trainer.options.optimisation
    optimizer_then = options_then.get("optimizer", "sgd")
    regrouped = options_then.get("no_decay", "none") != optimisation.no_decay
    if reinitialised or regrouped or optimizer_then != optimisation.optimizer:
        reinitialised.append(
            f"the momenta of {optimisation.optimizer}"
            + (f", after {optimizer_then}" if optimizer_then != optimisation.optimizer and not reinitialised else "")
        )
    else:
        load_optimizer(trainer.stepper.optimizer, state["optimizer"])
    if trainer.stepper.scaler.is_enabled():
        if state["scaler"] or not trainer.job.changed:
            trainer.stepper.scaler.load_state_dict(state["scaler"])
        else:
            reinitialised.append("the scale of --amp fp16")
    averaging.restore(trainer.stepper.average, trainer.student, state["ema"])
    if trainer.stepper.average is not None and not state["ema"]:
        reinitialised.append("the average of --ema")
    trainer.epoch, trainer.extra, trainer.best = state["epoch"], state["extra"], state["best"]
    trainer.stepper.skipped, trainer.elapsed = state["skipped"], float(state.get("elapsed", 0.0))
    if _same_images(trainer, state):
        trainer.step, trainer.seconds = state["step"], state["seconds"]
        trainer.images_done = images_done(state, len(trainer.photos))
        trainer.means.load_state_dict(state["means"], trainer.world)
        # Raises an error for an impossible rest of the epoch, before anything is written.
        trainer.batches.begin(trainer.epoch, trainer.step, trainer.images_done)
    trainer.update_due = bool(trainer.job.reinitialised) and trainer.step > 0
    for term in trainer.terms():
        if not trainer.world.first:
            term.forget()
    own = trainer.job.seed
    if own.typed and own.value != state["seed"]:
        trainer.world.say(f"=> the run keeps its own seed, {state['seed']}")
    trainer.take_seed(state["seed"])
    exact = set_random_state(state["random"], trainer.world)
    _say_resumed(trainer, state, reinitialised, exact=exact)


def _restore_peers(trainer: Trainer, states: Mapping[str, Any]) -> list[str]:
    """Load the peers; return the names of those whose state does not fit, which are initialised again."""
    reinitialised = []
    for name, peer in trainer.peers().items():
        if error := load_or_keep(peer, partial(_load, peer, states.get(name))):
            if not trainer.job.changed:
                raise error
            reinitialised.append(name)
    return reinitialised


def _same_images(trainer: Trainer, state: Mapping[str, Any]) -> bool:
    return bool(state["inputs"]["training images"] == trainer.job.inputs["training images"])


def _say_resumed(trainer: Trainer, state: Mapping[str, Any], reinitialised: Sequence[str], *, exact: bool) -> None:
    name = epoch_name(trainer.options.optimisation, trainer.epoch)
    if reinitialised:
        trainer.world.say(
            f"=> state that does not fit the new options is initialised again: {'; '.join(reinitialised)}"
        )
    if state["step"] and not trainer.step:
        trainer.world.say(f"=> the training images have changed: {name} starts again from its first step")
    left = (
        f", step {trainer.step}: {len(trainer.photos) - trainer.images_done} images of it are left"
        if trainer.step
        else ""
    )
    trainer.world.say(f"=> resuming with {name}{left}")
    if not exact:
        trainer.world.say(
            f"=> the run had {len(state['random'])} ranks and has {trainer.world.size} now: it resumes, but no "
            "longer gives the same bits"
        )


def images_done(state: Mapping[str, Any], num_images: int) -> int:
    """Return how many images of the epoch a run had done, over all ranks.

    Checkpoints of earlier versions do not record it, so it is computed from the number of steps and the batch size.

    Raises:
        ValueError: the number is impossible.
    """
    step = state["step"]
    steps = -(-num_images // int(state["config"]["options"].get("batch_size", num_images)))
    done = state.get("seen", sum(num_images // steps + (n < num_images % steps) for n in range(step)))
    if not (isinstance(done, int) and step <= done <= num_images and (step > 0 or done == 0)):
        raise ValueError(f"it saw {quoted(done)} of {num_images} images in {step} steps")
    return done


def _load(module: nn.Module, state: Any) -> None:
    module.load_state_dict(state)
