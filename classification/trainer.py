"""Training: epochs and steps, what is logged and saved, and how a run that was cut goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from classification import averaging
from classification.balance import balanced, dominant, gradient_shares
from classification.checkpoint import VERSION, describe_student, make_folder, write_atomic
from classification.config import describe, learning_rate, total_epochs
from classification.data import Photos, TrainBatches, loader, told
from classification.engine import Engine, accuracy
from classification.errors import RunError, Stopped, UserError
from classification.interrupt import Interrupt
from classification.memory import peak_bytes
from classification.metrics import Journal, Means
from classification.optimizer import load_optimizer
from classification.random_state import random_state, set_random_state
from classification.restore import whole
from classification.step import Stepper, finite
from classification.transforms import train_transform
from mgd import Mutual, matchings

BeforeEpoch = Callable[["Trainer", int], dict[str, float]]


class Trainer:
    """Train the distiller of a job.

    What a checkpoint holds is the state between two steps, all of it: a run that goes on from one computes what the
    uncut run would have computed, bit for bit on the CPU.

    Args:
        engine: the job on this rank.
        before_epoch: called with this object and the epoch, before its first step; returns values for its record.
    """

    def __init__(self, engine: Engine, before_epoch: BeforeEpoch | None = None) -> None:
        job, args, world = engine.job, engine.args, engine.world
        assert job.distiller is not None and job.student is not None
        self.engine, self.job, self.args, self.world = engine, job, args, world
        self.before_epoch = before_epoch
        self.student = job.student
        self.distiller = job.distiller
        self.stepper = Stepper(engine)
        # What is evaluated and kept as the result.
        self.result = self.student if self.stepper.average is None else self.stepper.average.module
        self.photos = Photos(job.data.train, train_transform(args), engine.seed, engine.train_cache())
        self.batches = TrainBatches(
            len(self.photos), args.batch_size, engine.seed, world.rank, world.size, args.accumulate
        )
        self.loader = loader(self.photos, self.batches, engine.workers, world.device)
        self._seed(engine.seed)
        # The state between two steps, beside that of the modules above.
        self.epoch = args.start_epoch
        self.step = 0  # steps of this epoch that are done
        self.seconds = 0.0  # that they took
        self.extra: dict[str, float] = {}  # what before_epoch returned
        self.means = Means(world.device)
        self.best: dict[str, float] = {"valid_top1": -1.0, "valid_top5": -1.0}
        self.balance_told = False

    # -- the loop

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch and return its record.

        Raises:
            Stopped: a signal came; a checkpoint holds the state.
            RunError: a loss that is not finite, or memory that ran out.
        """
        if self.job.resume:
            with whole(self.args.resume):
                self._restore(self.job.resume["resume"])
        if self.world.first:
            make_folder(self.job.folder, describe(self.args), resumed=self.job.resume is not None, bad=self.job.bad)
        self.world.say(f"=> run folder {self.job.folder}")
        self.journal = Journal(self.job.folder, self.epoch) if self.world.first else None
        if not self.job.resume:
            self.save()
        record: dict[str, Any] = {}
        with Interrupt("the step") as self.engine.interrupt:
            while self.epoch < total_epochs(self.args):
                record = self._run_epoch()
        if self.journal:
            self.journal.close()
        return record

    def _run_epoch(self) -> dict[str, Any]:
        epoch = self.epoch
        if self.step == 0:
            self.extra = self.before_epoch(self, epoch) if self.before_epoch else {}
            self.means, self.seconds = Means(self.world.device), 0.0
        try:
            self._train()
            record = {"epoch": epoch, **self._train_record(), **self.extra, **self.engine.evaluate(self.result)}
            for name, peer in self._peers().items():
                record |= {f"{key}_{name}": value for key, value in self.engine.evaluate(peer).items()}
        except Stopped:
            self.save()
            raise
        better = self._improved(record)
        self._say_epoch(record)
        if self.journal:
            self.journal.write(record)  # first: what a run cut here leaves behind is dropped when it goes on
        self.epoch, self.step = epoch + 1, 0
        self.save(better=better)
        return record

    def _improved(self, record: Mapping[str, Any]) -> set[str]:
        """Take what is the best so far into `best`; return whose it is: "" for the student's, a peer's name."""
        keys = {name: (f"valid_top1_{name}", f"valid_top5_{name}") for name in self._peers()}
        keys[""] = ("valid_top1", "valid_top5")
        better = {name for name, (top1, _) in keys.items() if record[top1] > self.best.get(top1, -1.0)}
        self.best |= {key: record[key] for name in better for key in keys[name]}
        return better

    def _train(self) -> None:
        """Do the steps of the epoch that are left."""
        epoch, steps, every = self.epoch, len(self.batches), self.args.checkpoint_every_steps
        self.batches.epoch, self.batches.start = epoch, self.step
        self.stepper.wrapped.train()
        bar = self.engine.progress(self.loader, f"epoch {epoch}")
        before, earlier = time.perf_counter(), self.seconds
        for batch, known in self.stepper.ahead(told(bar, self.engine.workers)):
            self.stepper.set_rate(learning_rate(self.args, epoch, self.step / steps))
            values = self.stepper(batch, epoch, self.step, self.batches.batch_size(self.step), known)
            if values is not None:
                self.means.add(values, len(batch[0]))
            self.step += 1
            self.seconds = earlier + time.perf_counter() - before
            if self.step % self.args.print_freq == 0 and values is not None:
                self._say_step(values, bar)
            if self.stepper.signal:
                raise Stopped(self.stepper.signal)
            if every and self.step % every == 0 and self.step < steps:
                self.save()
        self.stepper.check_scale(epoch)

    # -- what is said and logged

    def _train_record(self) -> dict[str, float]:
        means, epoch = self.means.means(self.world), self.epoch
        record = {"train_loss": means.get("loss", math.nan)}
        if "train_hits" in means:
            record["train_top1"] = 100 * means["train_hits"]
        for name, weight in self.distiller.weights(epoch).items():
            record[f"train_{name}"] = means.get(name, math.nan)
            record[f"train_{name}_weighted"] = weight * record[f"train_{name}"]
            if f"{name}_share" in means:
                record[f"gradient_share_{name}"] = means[f"{name}_share"]
        if self.stepper.skipped:
            record["skipped_steps"] = self.stepper.skipped
        record["learning_rate"] = learning_rate(self.args, epoch, 0.0)
        record["images_per_second"] = len(self.photos) / self.seconds
        record["train_seconds"] = self.seconds
        record["peak_memory_mib"] = peak_bytes(self.world.device) / 2**20
        return record

    def _say_step(self, values: Mapping[str, Tensor], bar: Any) -> None:
        if not self.world.first:
            return
        weights = self.distiller.weights(self.epoch)
        raw = {name: float(values[name].detach().mean()) for name in weights}
        if not self.balance_told:
            self.balance_told = True
            if warning := dominant({name: weights[name] * value for name, value in raw.items()}):
                self.world.say(warning)
        terms = "  ".join(f"{name} {value:.4g}" for name, value in raw.items())
        speed = self.step * self.batches.batch_size(0) / self.seconds
        loss = float(values["loss"].detach().mean())
        line = f"loss {loss:.4f}  {terms}  {speed:.1f} images/s"
        if isinstance(bar, tqdm):
            bar.set_postfix_str(line)
        else:
            self.world.say(f"epoch {self.epoch} step {self.step}/{len(self.batches)}  {line}")

    def _say_epoch(self, record: Mapping[str, Any]) -> None:
        parts = "  ".join(
            f"{name} {record[f'train_{name}_weighted']:.4f} (raw {record[f'train_{name}']:.4g})"
            for name in self.distiller.terms
        )
        self.world.say(
            f"epoch {record['epoch'] + 1}/{total_epochs(self.args)}  loss {record['train_loss']:.4f} = {parts}  "
            f"{accuracy(record)}  best {self.best['valid_top1']:.2f}  {record['images_per_second']:.1f} images/s"
        )

    def calibrate(self, steps: int) -> None:
        """Print each term's share of the gradient over `steps` batches, and the weights that would make all equal.

        Each has the largest weight of its schedule. Nothing is trained; the first term keeps its weight, and peers,
        which have those of the student, are not told.

        Raises:
            UserError: there is one term only.
        """
        if self.before_epoch:
            self.before_epoch(self, 0)
        self.stepper.wrapped.train()
        courses = [self.distiller.weights(epoch) for epoch in range(total_epochs(self.args))]
        means, weights = Means(self.world.device), {n: max(course[n] for course in courses) for n in courses[0]}
        groups = self.distiller.groups()[:1]
        if len(groups[0][1]) == 1:
            raise UserError("--calibrate compares terms, and this run has one")
        for step, batch in enumerate(self.loader):
            if step == steps:
                break
            values = self.stepper.forward(*batch, epoch=0)
            means.add(gradient_shares(groups, values, weights), len(batch[0]))
        shares = means.means(self.world)
        for name, weight in balanced(weights, shares).items():
            how = f"--term {name}.weight={weight:.4g}"
            self.world.say(f"{name:20} weight {weights[name]:.4g}  gradient share {shares[name]:.3f}  equal at {how}")

    # -- checkpoints

    def _peers(self) -> dict[str, nn.Module]:
        """Return the networks that train beside the student, by the names of their records and files."""
        if not isinstance(self.distiller, Mutual):
            return {}
        return {f"peer{n}": network.model for n, network in enumerate(self.distiller.networks) if n > 0}

    def save(self, *, better: Collection[str] = ()) -> None:
        """Write last.pth, and before it the best.pth of those named: rank 0's weights and statistics, all draws.

        Raises:
            RunError: weights that are not finite; the files stay what they were.
        """
        self.world.share_state(self.student)
        if self.result is not self.student:
            self.world.share_state(self.result)
        if not finite(self.distiller):
            raise RunError(
                f"weights are not finite before epoch {self.epoch}, step {self.step}: lower --lr; "
                f"{self.job.folder / 'last.pth'} is from before"
            )
        self.means.collect(self.world)
        for matching in matchings(self.distiller.terms):
            matching.collect(first=self.world.first)
        drawn = random_state(self.world)
        if not self.world.first:
            return
        plain = describe_student(self.result.state_dict(), self.args, self.job.data.classes)
        for (name, peer), spec in zip(self._peers().items(), self.args.teachers, strict=False):
            described = describe_student(peer.state_dict(), self.args, self.job.data.classes)
            for file in (f"{name}.pth", *([f"best_{name}.pth"] if name in better else [])):
                write_atomic(self.job.folder / file, {**described, "arch": spec["arch"]})
        if "" in better:
            write_atomic(self.job.folder / "best.pth", plain)
        resume = {
            "version": VERSION,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "extra": self.extra,
            "means": self.means.state_dict(),
            "best": self.best,
            "skipped": self.stepper.skipped,
            "seed": self.engine.seed,
            "config": describe(self.args),
            "inputs": self.job.inputs,
            "peers": {name: peer.state_dict() for name, peer in self._peers().items()},
            "terms": {name: term.state_dict() for name, term in self.distiller.terms.items()},
            "optimizer": self.stepper.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "ema": averaging.state(self.stepper.average, self.student),
            "random": drawn,
        }
        write_atomic(self.job.folder / "last.pth", {**plain, "resume": resume})

    def _seed(self, seed: int) -> None:
        """Take the run's seed, which is rank 0's, or that of the checkpoint."""
        self.args.seed = self.engine.seed = self.photos.seed = self.batches.seed = seed
        for matching in matchings(self.distiller.terms):
            matching.seed = seed

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint; student and terms have theirs since the job was built."""
        load_optimizer(self.stepper.optimizer, state["optimizer"])
        self.stepper.scaler.load_state_dict(state["scaler"])
        averaging.restore(self.stepper.average, self.student, state["ema"])
        for name, peer in self._peers().items():
            peer.load_state_dict(state["peers"][name])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.extra, self.best, self.stepper.skipped = state["extra"], state["best"], state["skipped"]
        self.means.load_state_dict(state["means"], self.world)
        for matching in matchings(self.distiller.terms):
            if not self.world.first:
                matching.forget()
        self._seed(state["seed"])
        exact = set_random_state(state["random"], self.world)
        where = f"epoch {self.epoch + 1}/{total_epochs(self.args)}" + (f", step {self.step}" if self.step else "")
        self.world.say(f"=> going on with {where}")
        if not exact:
            self.world.say(
                f"=> the run had {len(state['random'])} ranks and has {self.world.size} now: it goes on, and is no "
                "longer the same bit for bit"
            )
