"""The loop: train an epoch, evaluate, log, checkpoint; it knows a loss, and the names of its parts."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from classification.cache import Cache
from classification.checkpoint import VERSION, describe_student, make_folder, write_atomic
from classification.config import describe, learning_rate, total_epochs
from classification.data import (
    FixedBatches,
    Photos,
    TrainBatches,
    eval_transform,
    loader,
    normalise,
    read_image,
    subset,
    train_transform,
)
from classification.errors import UserError
from classification.job import Job
from classification.launch import MixedPrecision, World, autocast, parallel_devices, seed_everything, wrap
from classification.metrics import Journal, Means, hits
from mgd import Mutual, Outputs

BeforeEpoch = Callable[["Engine", int], dict[str, float]]


class Engine:
    """A job on one rank.

    Args:
        job: built and checked; its networks move to the rank's device.
        world: this rank.
    """

    def __init__(self, job: Job, world: World) -> None:
        self.job, self.world, self.args = job, world, job.args
        self.seed = world.share(job.args.seed)
        seed_everything(self.seed, world.rank, deterministic=job.args.seeded)
        self.workers = -(-job.args.workers // world.local_size)
        for note in job.notes:
            world.say(f"=> {note}")
        for _, network in job.networks().values():
            memory = torch.channels_last if job.args.channels_last else torch.preserve_format
            network.to(world.device, memory_format=memory)
        self.valid = Photos(job.data.valid, eval_transform(job.args), cache=self._cache(job.data.valid))
        self._valid_loader: DataLoader | None = None
        # Images that one device sees at once when nothing is wrapped.
        self._share = -(-job.args.batch_size // (world.size * parallel_devices(world, job.args)))

    # -- evaluation

    def evaluate_all(self) -> dict[str, dict[str, float]]:
        """Evaluate every network of the job, and warn of a teacher that knows nothing."""
        results = {}
        for role, (arch, network) in self.job.networks().items():
            result = results[role] = self.evaluate(network)
            size = self.job.sizes[role] / 1e6
            self.world.say(f"=> {role} {arch}, {size:.2f} M parameters: {_accuracy(result)}")
            chance = 100 / self.args.num_classes
            if role.startswith("teacher") and result["valid_top1"] < chance + 0.1 * (100 - chance):
                self.world.say(
                    f"!! WARNING: the {role} is near chance ({result['valid_top1']:.2f} %, chance {chance:.2f} %). "
                    "Nothing good can be learned from it: check its weights, --img-size and the class folders."
                )
        return results

    @torch.no_grad()
    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Return top-1 and top-5 in percent over the validation images, each counted once over all ranks."""
        self.world.share_state(network)
        if self._valid_loader is None:
            batches = FixedBatches(list(range(len(self.valid))), self._share, self.world.rank, self.world.size)
            self._valid_loader = loader(self.valid, batches, self.workers, self.world.device)
        total = torch.zeros(3, dtype=torch.float64, device=self.world.device)
        network.eval()
        for images, target, _ in self._progress(self._valid_loader, "evaluate"):
            images, target = self._images(images), self._move(target)
            with self.autocast():
                outputs = network(images)
            logits = outputs.logits if isinstance(outputs, Outputs) else outputs
            total[:2] += hits(logits.float(), target)
            total[2] += len(target)
        top1, top5, count = self.world.sum(total).tolist()
        return {"valid_top1": 100 * top1 / count, "valid_top5": 100 * top5 / count}

    # -- training

    def fit(self, before_epoch: BeforeEpoch | None = None) -> dict[str, Any]:
        """Train to the last epoch and return its record; `before_epoch` may add values to an epoch's record."""
        job, args, world = self.job, self.args, self.world
        self._set_up()
        start = self._restore() if job.resume else args.start_epoch
        if world.first:
            make_folder(job.folder, describe(args))
        world.say(f"=> run folder {job.folder}")
        journal = Journal(job.folder, start) if world.first else None
        record: dict[str, Any] = {}
        for epoch in range(start, total_epochs(args)):
            extra = before_epoch(self, epoch) if before_epoch else {}
            record = {"epoch": epoch, **self._train_epoch(epoch), **extra, **self.evaluate(self.student)}
            for name, peer in self._peers().items():
                record |= {f"{key}_{name}": value for key, value in self.evaluate(peer).items()}
            self._finish_epoch(record, journal)
        if journal:
            journal.close()
        return record

    def _set_up(self) -> None:
        """Make what training needs: optimizer, scaler, loader, wrapped distiller."""
        job, args, world = self.job, self.args, self.world
        assert job.distiller is not None and job.student is not None
        self.student = job.student
        self.distiller = job.distiller.to(world.device)
        self.balance_told = False
        self.best: dict[str, float] = {"valid_top1": -1.0, "valid_top5": -1.0}
        self.optimizer = torch.optim.SGD(
            [p for p in self.distiller.parameters() if p.requires_grad],
            args.lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
            nesterov=args.momentum > 0,
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")
        self.train_cache = self._cache(job.data.train)
        self.train_set = Photos(job.data.train, train_transform(args), self.seed, self.train_cache)
        self.batches = TrainBatches(len(self.train_set), args.batch_size, self.seed, world.rank, world.size)
        self.train_loader = loader(self.train_set, self.batches, self.workers, world.device)
        self.wrapped = wrap(MixedPrecision(self.distiller, world.device, args.amp), world, args)

    def _peers(self) -> dict[str, nn.Module]:
        """Return the networks that train beside the student, by the names of their records and files."""
        if not isinstance(self.distiller, Mutual):
            return {}
        return {f"peer{n}": network.model for n, network in enumerate(self.distiller.networks) if n > 0}

    def matching_images(self, epoch: int) -> Iterable[Tensor]:
        """Yield batches of training images under the evaluation transform: this rank's share of a matching pass."""
        chosen = subset(len(self.job.data.train), self.args.mgd_max_images, self.seed, epoch)
        batches = FixedBatches(chosen, self._share, self.world.rank, self.world.size)
        photos = Photos(self.job.data.train, eval_transform(self.args), cache=self.train_cache)
        loading = loader(photos, batches, self.workers, self.world.device, persistent=False)
        for images, _, _ in self._progress(loading, "match"):
            yield self._images(images)

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        args, world = self.args, self.world
        self.batches.epoch = epoch
        self.wrapped.train()
        means = Means(world.device)
        start = time.perf_counter()
        steps = len(self.batches)
        bar = self._progress(self.train_loader, f"epoch {epoch}")
        for step, (images, target, index) in enumerate(bar):
            self._set_rate(learning_rate(args, epoch, step / steps))
            labels = self._move(target) if args.labels else None
            values = self._step(epoch, step, self._images(images), labels, self._move(index))
            means.add(values, len(images))
            if (step + 1) % args.print_freq == 0:
                self._report_step(epoch, step, steps, values, time.perf_counter() - start, bar)
        seconds = time.perf_counter() - start
        record = self._name_terms(means.means(world), epoch)
        record["learning_rate"] = learning_rate(args, epoch, 0.0)
        record["images_per_second"] = len(self.train_set) / seconds
        record["train_seconds"] = seconds
        return record

    def _step(self, epoch: int, step: int, images: Tensor, target: Tensor | None, index: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = self.wrapped(images, target, index, epoch)
        if step == 0:
            values |= {f"{name}_share": share for name, share in self._gradient_shares(values, epoch).items()}
        # DDP averages gradients over ranks; slices that differ in size weigh by their images.
        share = len(images) * self.world.size / self.batches.batch_size(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(values["loss"].mean() * share).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        logits = values.pop("logits").detach().float()
        if target is not None:
            values["train_hits"] = hits(logits, target)[:1] / len(target)
        return values

    def _gradient_shares(self, values: Mapping[str, Tensor], epoch: int) -> dict[str, Tensor]:
        """Return each term's part of the gradient on the student's weights: its norm over the sum of all norms.

        With one term there is nothing to compare.
        """
        weights = self.distiller.weights(epoch)
        if len(weights) == 1:
            return {}
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        norms = {}
        for name, weight in weights.items():
            value = weight * values[name].mean()
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            norms[name] = torch.stack([g.float().norm() for g in gradients if g is not None] or [value * 0]).norm()
        total = sum(norms.values(), torch.zeros((), device=self.world.device)).clamp_min(1e-30)
        return {name: norm / total for name, norm in norms.items()}

    def calibrate(self, steps: int, before_epoch: BeforeEpoch | None = None) -> dict[str, float]:
        """Print each term's share of the gradient over `steps` batches, and the weights that would make all equal.

        Nothing is trained; the first term keeps its weight.
        """
        self._set_up()
        if before_epoch:
            self.student.eval()
            before_epoch(self, 0)
        self.wrapped.train()
        self.batches.epoch = 0
        means = Means(self.world.device)
        for step, (images, target, index) in enumerate(self.train_loader):
            if step == steps:
                break
            labels = self._move(target) if self.args.labels else None
            values = self.wrapped(self._images(images), labels, self._move(index), 0)
            means.add(self._gradient_shares(values, 0), len(images))
        weights = self.distiller.weights(0)
        if not means.totals:
            raise UserError("--calibrate compares terms, and this run has one")
        shares = means.means(self.world)
        first = next(iter(weights))
        balanced = {n: w * shares[first] / shares[n] if shares[n] > 0 else w for n, w in weights.items()}
        for name, weight in weights.items():
            how = f"--term {name}.weight={balanced[name]:.4g}"
            self.world.say(f"{name:20} weight {weight:.4g}  gradient share {shares[name]:.3f}  equal at {how}")
        return balanced

    def _name_terms(self, means: Mapping[str, float], epoch: int) -> dict[str, float]:
        record = {"train_loss": means["loss"]}
        if "train_hits" in means:
            record["train_top1"] = 100 * means["train_hits"]
        for name, weight in self.distiller.weights(epoch).items():
            record[f"train_{name}"] = means[name]
            record[f"train_{name}_weighted"] = weight * means[name]
            if f"{name}_share" in means:
                record[f"gradient_share_{name}"] = means[f"{name}_share"]
        for name, value in record.items():
            if not math.isfinite(value):
                raise RuntimeError(f"{name} became {value}: lower --lr, or look at what the terms are given")
        return record

    def _report_step(
        self, epoch: int, step: int, steps: int, values: Mapping[str, Tensor], seconds: float, bar: Any
    ) -> None:
        if not self.world.first:
            return
        loss = float(values["loss"].detach().mean())
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss became {loss} in epoch {epoch}, step {step}: lower --lr")
        weights = self.distiller.weights(epoch)
        raw = {name: float(values[name].detach().mean()) for name in weights}
        if not self.balance_told:
            self._tell_balance({name: weights[name] * value for name, value in raw.items()})
        terms = "  ".join(f"{name} {value:.4g}" for name, value in raw.items())
        speed = (step + 1) * self.batches.batch_size(0) / seconds
        line = f"epoch {epoch} step {step + 1}/{steps}  loss {loss:.4f}  {terms}  {speed:.1f} images/s"
        if isinstance(bar, tqdm):
            bar.set_postfix_str(line.partition("  ")[2])
        else:
            self.world.say(line)

    def _tell_balance(self, weighted: Mapping[str, float]) -> None:
        """Warn once of a term that drowns the others: feature losses scale with teacher and image size."""
        self.balance_told = True
        name = max(weighted, key=lambda n: weighted[n])
        rest = sum(value for other, value in weighted.items() if other != name)
        if 0 < 30 * rest < weighted[name]:
            how = "raise --loss-factor" if name == "mgd" else "lower its weight"
            self.world.say(
                f"!! WARNING: the term {name} is {weighted[name] / rest:.0f} times all others together: {how}"
            )

    def _finish_epoch(self, record: dict[str, Any], journal: Journal | None) -> None:
        better = record["valid_top1"] > self.best["valid_top1"]
        if better:
            self.best = {key: record[key] for key in self.best}
        parts = "  ".join(
            f"{name} {record[f'train_{name}_weighted']:.4f} (raw {record[f'train_{name}']:.4g})"
            for name in self.distiller.terms
        )
        self.world.say(
            f"epoch {record['epoch'] + 1}/{total_epochs(self.args)}  loss {record['train_loss']:.4f} = {parts}  "
            f"{_accuracy(record)}  best {self.best['valid_top1']:.2f}  {record['images_per_second']:.1f} images/s"
        )
        if journal:
            journal.write(record)  # first: what a run cut short here leaves behind is dropped when it is resumed
            self._save(record["epoch"] + 1, better)

    # -- checkpoints

    def _save(self, next_epoch: int, better: bool) -> None:
        plain = describe_student(self.student.state_dict(), self.args, self.job.data.classes)
        resume = {
            "version": VERSION,
            "epoch": next_epoch,
            "seed": self.seed,
            "peers": {name: peer.state_dict() for name, peer in self._peers().items()},
            "terms": {name: term.state_dict() for name, term in self.distiller.terms.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.world.device) if self.world.device.type == "cuda" else None,
        }
        write_atomic(self.job.folder / "last.pth", {**plain, "resume": resume})
        if better:
            write_atomic(self.job.folder / "best.pth", plain)
        for (name, peer), spec in zip(self._peers().items(), self.args.teachers, strict=False):
            described = describe_student(peer.state_dict(), self.args, self.job.data.classes)
            write_atomic(self.job.folder / f"{name}.pth", {**described, "arch": spec["arch"]})

    def _restore(self) -> int:
        """Take up the state of the checkpoint named by --resume; return the epoch to go on with."""
        assert self.job.resume is not None
        state = self.job.resume["resume"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        for name, peer in self._peers().items():
            peer.load_state_dict(state["peers"][name])
        self.seed = self.train_set.seed = self.batches.seed = state["seed"]
        if self.world.first:
            torch.set_rng_state(state["random"])
            if state["random_cuda"] is not None and self.world.device.type == "cuda":
                torch.cuda.set_rng_state(state["random_cuda"], self.world.device)
        self.world.say(f"=> going on with epoch {state['epoch'] + 1}/{total_epochs(self.args)}")
        return int(state["epoch"])

    # -- small things

    def autocast(self) -> torch.autocast:
        """Return the context of mixed precision that --amp asks for."""
        return autocast(self.world.device.type, self.args.amp)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.world.device, non_blocking=True)

    def _images(self, images: Tensor) -> Tensor:
        normal = normalise(self._move(images))
        return normal if self.args.channels_last else normal.contiguous()

    def _cache(self, samples: list[tuple[str, int]]) -> Cache | None:
        if self.args.cache == "off":
            return None
        self.world.say(f"=> decoding {len(samples)} images into memory")
        return Cache(samples, read_image)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _progress(self, loading: DataLoader, what: str) -> Any:
        """Show a bar on a terminal, on rank 0."""
        if self.world.first and sys.stderr.isatty():
            return tqdm(loading, desc=what, leave=False, dynamic_ncols=True)
        return loading


def _accuracy(result: Mapping[str, float]) -> str:
    top1, top5 = result["valid_top1"], result["valid_top5"]
    return f"top-1 {top1:.2f}  top-5 {top5:.2f}  Err@1 {100 - top1:.2f}  Err@5 {100 - top5:.2f}"
