"""The training loop: epochs and steps, logging, checkpoints and resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from classification.data.loading import Photos, TrainBatches, explain_worker_errors
from classification.data.preprocessing import Transform
from classification.data.transforms import train_transform, two_view_transform
from classification.errors import Stopped, UserError
from classification.options.config import describe, epoch_name, learning_rate, total_epochs
from classification.options.options import Options
from classification.options.terms import needing, using
from classification.runs.balance import balanced
from classification.runs.checkpoint import (
    image_names,
    keep_images,
    make_folder,
)
from classification.runs.launch import command
from classification.runs.metrics import Journal, Means, improves
from classification.runs.progress import Progress, best_value, epoch_line, last_lines, sum_of
from classification.runs.restore import explain_damage
from classification.runs.tracking import trackers
from classification.runs.world import World
from classification.system.interrupt import Interrupt
from classification.system.memory import peak_bytes
from classification.training.balance import dominant, gradient_shares, noted_maps, pair_shares
from classification.training.engine import Engine
from classification.training.int8 import begin_int8
from classification.training.job import Job
from classification.training.saving import restore, save
from classification.training.step import Stepper
from classification.training.updates import update_terms
from mgd import Taps
from mgd.losses import Term

SETTLED = 10  # number of steps after which the sizes of the terms are compared


class Trainer:
    """Train the distiller of a job.

    A checkpoint has the complete state between two steps: a resumed run computes what the run without interruption
    would have computed, bit for bit on the CPU.

    Args:
        engine: the job on this rank.
    """

    def __init__(self, engine: Engine) -> None:
        job, options, world = engine.job, engine.options, engine.world
        assert job.distiller is not None and job.student is not None
        self.engine = engine
        self.student = job.student
        self.distiller = job.distiller
        self.stepper = Stepper(engine)
        # The network that is evaluated and saved as the result.
        self.result = self.student if self.stepper.average is None else self.stepper.average.module
        self.photos = Photos(
            job.data.train,
            self._transform(),
            engine.seed,
            engine.train_cache(),
            job.stored,
        )
        self.batches = TrainBatches(
            len(self.photos),
            options.optimisation.batch_size,
            engine.seed,
            world.rank,
            world.size,
            options.optimisation.accumulate,
            [label for _, label in job.data.train] if options.data.sampler == "balanced" else None,
            options.data.repeats,
        )
        self.loader = engine.load(self.photos, self.batches)
        self.take_seed(engine.seed)
        # The state between two steps, except that of the modules above.
        self.epoch = options.optimisation.start_epoch
        self.step = self.images_done = 0  # steps of this epoch that are done, and their images over all ranks
        self.seconds = 0.0  # that these steps took
        self.extra: dict[str, float] = {}  # numbers that the terms logged before this epoch
        self.means = Means(world.device)
        self.forget_best()
        self.elapsed = 0.0  # seconds that the run took before this process
        self.update_due = False  # whether a term was initialised again within an epoch
        self.balance_reported = False
        self.progress, self.begun = Progress(options.optimisation, options.run.print_freq), time.perf_counter()

    def _transform(self) -> Transform:
        """Return the random transform of the training images; to two views if a term needs them."""
        data, preprocessing, crop = self.options.data, self.job.preprocessing, self.job.train_crop
        more: dict[str, Any] = {"hflip": bool(data.hflip), "randaugment": data.randaugment}
        more |= {"erasing": data.random_erasing, "mean": preprocessing.mean}
        if needing(self.options.table, "views"):
            return two_view_transform(preprocessing.img_size, crop, strong=data.second_view == "strong", **more)
        return train_transform(preprocessing.img_size, crop, **more)

    @property
    def job(self) -> Job:
        """What is trained."""
        return self.engine.job

    @property
    def world(self) -> World:
        """This rank."""
        return self.engine.world

    @property
    def options(self) -> Options:
        """The options of the run."""
        return self.engine.options

    # -- the loop

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch and return its record.

        Raises:
            Stopped: a signal came; the state is saved.
            RunError: a loss or gradient is not finite, or memory ran out.
        """
        resumed = self.job.checkpoint is not None
        if self.job.checkpoint is not None:
            with explain_damage(self.job.resume_from):
                restore(self, self.job.checkpoint["resume"])
            self.job.checkpoint = None  # it is loaded, and would only use memory
        if self.world.first:
            make_folder(
                self.job.folder,
                describe(self.options.command, self.job.record()),
                resumed=resumed,
                bad=self.job.bad_images,
            )
            if self.job.changed or not resumed:
                keep_images(self.job.folder, image_names(self.job.data.train, str(self.options.data.data)))
        self.world.say(f"=> run folder {self.job.folder}")
        self.journal = self._journal() if self.world.first else None
        if not resumed:
            save(self)
        record: dict[str, Any] = {}
        with Interrupt("the step", at_once=self.world.size == 1) as self.engine.interrupt:
            try:
                while self.epoch < total_epochs(self.options.optimisation):
                    record = self._run_epoch()
            except Stopped as stop:
                self.world.wait()  # until rank 0 has saved: a launcher ends all ranks as soon as one ends
                words = (self.options.command[0], "--resume", str(self.job.folder))
                stop.resume = command(*words) if self.world.first else ""
                raise
        if self.journal:
            self.journal.close()
        self._say_end(record)
        return record

    def _journal(self) -> Journal:
        folder, name = self.job.folder, self.options.run.track
        return Journal(folder, self.epoch, self.step, trackers(name, folder, self.epoch, self.job.record()))

    def _run_epoch(self) -> dict[str, Any]:
        epoch, begun = self.epoch, time.perf_counter()
        begin_int8(self)
        if self.step == 0 or self.update_due:
            self.extra = update_terms(self.engine, self.distiller, epoch)
            self.update_due = False
        if self.step == 0:
            self.means, self.seconds = Means(self.world.device), 0.0
        earlier = self.seconds
        if self.step < len(self.batches) or not self.step:
            self._train()
            self._average_statistics()
            save(self)  # before the evaluation, which a signal may interrupt
        record = {"epoch": epoch, **self._train_record(), **self.extra, **self.engine.evaluate_epoch(self.result)}
        for name, peer in self.peers().items():
            record |= {f"{key}_{name}": value for key, value in self.engine.evaluate_epoch(peer).items()}
        better = self._improved(record)
        self._say_epoch(record)
        if self.journal:
            self.journal.write(
                record
            )  # before saving: if the run is killed in between, the line is dropped when it resumes
        self.epoch, self.step, self.images_done = epoch + 1, 0, 0
        save(self, better=better)
        self.progress.aside = time.perf_counter() - begun - (self.seconds - earlier)
        return record

    def _improved(self, record: Mapping[str, Any]) -> set[str]:
        """Update `best`; return the networks that are the best so far: "" for the student, else names of peers."""
        measure = self.options.run.best_by
        measures = dict.fromkeys((measure, "top1", "top5"))
        keys = {name: [f"valid_{key}{f'_{name}' if name else ''}" for key in measures] for name in (*self.peers(), "")}
        better = {name for name, (key, *_) in keys.items() if improves(measure, record[key], self.best.get(key))}
        self.best |= {key: record[key] for name in better for key in keys[name]}
        self.best |= {"epoch": record["epoch"]} if "" in better else {}
        return better

    def _train(self) -> None:
        """Do the remaining steps of the epoch."""
        epoch, every = self.epoch, self.options.run.checkpoint_every_steps
        self.batches.begin(epoch, self.step, self.images_done)
        steps = len(self.batches)
        self._train_mode()
        bar = self.engine.progress(self.loader, epoch_name(self.options.optimisation, epoch))
        before, earlier = time.perf_counter(), self.seconds
        for batch, teacher_outputs in self.stepper.ahead(explain_worker_errors(bar, self.engine.workers)):
            self.stepper.set_rate(learning_rate(self.options.optimisation, epoch, self.step / steps))
            size, past = self.batches.batch_size(self.step), self.seconds
            values = self.stepper(batch, epoch, self.step, size, teacher_outputs)
            if values is not None:
                self.means.add(values, len(batch[0]))
            if self.engine.interrupt is not None:
                self.engine.interrupt.at_once = False
            self.step, self.images_done = self.step + 1, self.images_done + size
            self.seconds = earlier + time.perf_counter() - before
            self.progress.stepped(self.seconds - past)
            if values is not None:
                self._say_step(values, bar)
                self._log_step(values)
            self.world.passed()
            if signal := self.stepper.met.signal:
                save(self)
                raise Stopped(signal)
            if self.step < steps and ((every and self.step % every == 0) or self.stepper.met.save):
                save(self)
        self.stepper.check_scale(epoch)

    def _average_statistics(self) -> None:
        """With --average-bn, average batch norm statistics over the ranks, also those of --ema."""
        if self.options.devices.average_bn:
            for module in (self.distiller.terms, self.student, self.result, *self.peers().values()):
                self.world.average_statistics(module)

    def _train_mode(self) -> None:
        self.stepper.wrapped.train()
        for module in self.job.still:
            module.training = False

    # -- output and records

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
        record["learning_rate"] = learning_rate(self.options.optimisation, epoch, 0.0)
        record["images_per_second"] = len(self.photos) / self.seconds
        record["train_seconds"] = self.seconds
        record["peak_memory_mib"] = peak_bytes(self.world.device) / 2**20
        return record

    def _say_step(self, values: Mapping[str, Tensor], bar: Any) -> None:
        if not self.world.first:
            return
        due, steps = self.progress.due(self.step), len(self.batches)
        settled = not self.balance_reported and self.progress.steps >= min(SETTLED, steps)
        if not due and not settled:
            return  # reading values waits for the device
        weights = self.distiller.weights(self.epoch)
        weighted = {name: weights[name] * float(values[name].detach().mean()) for name in weights}
        if settled:
            self.balance_reported = True
            if warning := dominant(weighted):
                self.world.say(warning)
        if due:
            loss, speed = float(values["loss"].detach().mean()), self.images_done / self.seconds
            left = self.progress.left(self.epoch, self.step, steps)
            line = "  ".join([sum_of(loss, weighted), f"{speed:.1f} images/s", *([left] if left else [])])
            if isinstance(bar, tqdm):
                bar.set_postfix_str(line)
            else:
                self.world.say(f"{epoch_name(self.options.optimisation, self.epoch)}  step {self.step}/{steps}  {line}")

    def _log_step(self, values: Mapping[str, Tensor]) -> None:
        """Log every N-th step, by --log-steps N; reading the values waits for the device."""
        every, steps = self.options.run.log_steps, len(self.batches)
        if not every or self.step % every or self.journal is None:
            return
        names = ["loss", *self.distiller.terms]
        numbers = torch.stack([values[name].detach().float().mean() for name in names]).tolist()
        rate = self.stepper.optimizer.param_groups[0]["lr"]
        place = {"epoch": self.epoch, "step": self.step}
        record = {**place, **dict(zip(names, numbers, strict=True)), "learning_rate": rate}
        self.journal.write_step(
            {**record, "images_per_second": self.images_done / self.seconds}, self.epoch * steps + self.step
        )

    def _say_epoch(self, record: Mapping[str, Any]) -> None:
        self.world.say(
            epoch_line(
                self.options.optimisation,
                self.job.num_classes,
                record,
                best_value(self.options.run.best_by, self.best),
                self.distiller.terms,
            )
        )

    def _say_end(self, record: Mapping[str, Any]) -> None:
        seconds = self.elapsed + time.perf_counter() - self.begun
        for line in last_lines(
            self.options,
            self.job.num_classes,
            self.job.folder,
            self.best,
            record["valid_top1"],
            seconds,
        ):
            self.world.say(line)

    def calibrate(self, steps: int) -> None:
        """Print each term's share of the gradient over `steps` batches, and the weights for equal shares of all.

        Nothing is trained. Each term has the largest weight of its schedule, and the first one keeps it. For terms that
        read maps, the share of each tap in their gradient is printed, too. For peers, use the weights of the student.

        Raises:
            UserError: there is only one term.
        """
        update_terms(self.engine, self.distiller, 0)
        self._train_mode()
        schedule = [self.distiller.weights(epoch) for epoch in range(total_epochs(self.options.optimisation))]
        means, weights = (
            Means(self.world.device),
            {n: max(weights_then[n] for weights_then in schedule) for n in schedule[0]},
        )
        groups = self.distiller.groups()[:1]
        if len(groups[0][1]) == 1:
            raise UserError("--calibrate compares terms, and this run has one")
        # The maps of a second view would hide those of the first, which the terms read.
        reading = [] if needing(self.options.table, "views") else using(self.options.table, "maps")
        with noted_maps(self.distiller.student) as maps:
            for step, batch in enumerate(self.loader):
                if step == steps:
                    break
                images, target, index, *stored = batch
                values = self.stepper.forward(images, target, index, epoch=0, stored=stored)
                shares = gradient_shares(groups, values, weights, self.stepper.scaler.scale)
                for name in reading if maps else ():
                    parts = pair_shares(self.student, maps, values[name])
                    shares |= {f"{name} {number}": part for number, part in enumerate(parts)}
                means.add(shares, len(batch[0]))
        mean_shares = means.means(self.world)
        for name, weight in balanced(weights, {n: share for n, share in mean_shares.items() if n in weights}).items():
            how = f"--term {name}.weight={weight:.4g}"
            self.world.say(
                f"{name:20} weight {weights[name]:.4g}  gradient share {mean_shares[name]:.3f}  equal at {how}"
            )
            for number, path in enumerate(self.distiller.student.paths if name in reading else ()):
                self.world.say(f"    {mean_shares[f'{name} {number}']:.3f} of it through {path}")
        self.world.say("=> nothing was trained: to train, leave out --calibrate")

    # -- checkpoints

    def terms(self) -> list[Term]:
        """Return the terms that are trained."""
        return [term for term in self.distiller.terms.values() if isinstance(term, Term)]

    def peers(self) -> dict[str, nn.Module]:
        """Return {name: peer}, with the names of records and files."""
        peers = [peer for peer in self.distiller.peers if isinstance(peer, Taps)]
        return {f"peer{n}": peer.model for n, peer in enumerate(peers, start=1)}

    def forget_best(self) -> None:
        """Forget the best epoch, so that the next one is the best."""
        self.best: dict[str, float] = {"valid_top1": -1.0, "valid_top5": -1.0}

    def take_seed(self, seed: int) -> None:
        """Use a seed from now on: that of rank 0 or of a checkpoint."""
        self.engine.seed = self.photos.seed = self.batches.seed = seed
        self.job.seed = replace(self.job.seed, value=seed)
