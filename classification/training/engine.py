"""A job on one rank: its networks on the device, its images, evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from classification.data.cache import Cache
from classification.data.images import read_image
from classification.data.loading import FixedBatches, Key, Photos, draw_subset, explain_worker_errors, make_loader
from classification.data.preprocessing import Preprocessing
from classification.errors import Stopped
from classification.runs import evaluation
from classification.runs.checkpoint import lock_folder
from classification.runs.metrics import accuracy, result, tally
from classification.runs.scores import COLUMNS, Predictions, class_scores, per_image
from classification.runs.world import World, parallel_devices, seed_everything
from classification.system.interrupt import Interrupt
from classification.training.job import Job
from classification.training.precision import autocast, lacks
from mgd import Frozen, logits_of

LOOK = 8  # number of batches after which ranks exchange signals, in a pass without training
NAMES = {"cpu": "processor", "cuda": "GPU"}


class Engine:
    """A job on one rank.

    Args:
        job: built and checked; its networks move to the rank's device.
        world: this rank.
    """

    def __init__(self, job: Job, world: World) -> None:
        self.job, self.world, self.options = job, world, job.options
        trains = job.distiller is not None and not job.options.run.calibrate
        self.lock = lock_folder(job.folder) if trains and world.first else None  # it lasts as long as this object
        self.seed = world.share(job.seed.value)
        seed_everything(self.seed, world.rank, deterministic=bool(job.options.devices.deterministic))
        self.workers = -(-job.options.devices.workers // world.local_size)
        for note in (*job.data.notes, *job.notes):
            world.say(f"=> {note}")
        for _, network in job.networks().values():
            memory = torch.channels_last if job.options.devices.channels_last else torch.preserve_format
            network.to(world.device)
            network.to(memory_format=memory)
        if lacks(world.device, job.options.devices.amp):
            what = NAMES.get(world.device.type, "device")
            world.say(f"=> this {what} has no bfloat16: --amp bf16 computes in float32")
        self._valid_cache = self._cache(job.data.valid)
        self._valid_loaders: dict[Preprocessing, DataLoader[tuple[Tensor, int, int]]] = {}
        self._train_cache: Cache | None = None
        self.interrupt: Interrupt | None = None  # while training
        # Images per batch on one device, for passes without training.
        optimisation, devices = job.options.optimisation, parallel_devices(world, job.options.devices)
        self._share = -(-optimisation.batch_size // (world.size * devices * optimisation.accumulate))

    # -- evaluation

    def evaluate_all(self) -> dict[str, dict[str, float]]:
        """Evaluate every network that has weights, with its own preprocessing; warn if a teacher is near chance."""
        results, rows = {}, {}
        run = self.options.run
        file = evaluation.place(run.output, self._checkpoints()) if run.evaluate and self.world.first else None
        for role, (arch, network) in self.job.networks().items():
            preprocessing = self.job.preprocessing_by_role()[role]
            if preprocessing is None:
                self.world.say(f"=> {role} {arch}: not evaluated, its outputs are of other classes")
                continue
            size = self.job.sizes[role] / 1e6
            if role == "student" and self.job.untrained:
                self.world.say(f"=> student {arch}, {size:.2f} M parameters: its weights are random")
                continue
            if run.evaluate:
                rows[role] = torch.zeros(len(self.job.data.valid), COLUMNS, dtype=torch.float64)
            # A frozen teacher's view turns the student's images into its own.
            own = None if isinstance(network, Frozen) else preprocessing
            measured = results[role] = self.evaluate(network, own, rows.get(role))
            scores = accuracy(measured, self.job.num_classes, errors=True)
            self.world.say(f"=> {role} {arch}, {size:.2f} M parameters: {scores}")
            chance = 100 / self.job.num_classes
            if role.startswith("teacher") and measured["valid_top1"] < chance + 0.1 * (100 - chance):
                self.world.say(
                    f"!! WARNING: the {role} is near chance ({measured['valid_top1']:.2f} %, chance {chance:.2f} %). "
                    "Nothing good can be learned from it: check its weights, --img-size and the class folders."
                )
        if rows and self.world.first:
            self._summarise(rows, file)
        return results

    def _summarise(self, rows: Mapping[str, Tensor], file: Path | None) -> None:
        """Print the networks side by side, with their costs on this device, and write evaluation.json."""
        from classification.models.cost import measure_costs  # slow to import

        scored = {role: Predictions.of(part) for role, part in rows.items()}
        networks, preprocessing = self.job.networks(), self.job.preprocessing_by_role()
        sized = {role: (networks[role][1], (preprocessing[role] or self.job.preprocessing).img_size) for role in rows}
        archs = {role: arch for role, (arch, _) in networks.items()}
        summary = evaluation.summary(scored, archs, self.job.data.classes, measure_costs(sized, self.autocast))
        self.world.say("\n".join(evaluation.table(summary)))
        self.world.say(f"=> {evaluation.keep(summary, file, typed=self.options.run.output is not None)}")

    def _checkpoints(self) -> list[str | None]:
        """Return the files of the networks' weights, the student's first."""
        teachers = [spec.get("resume") for spec in self.options.teachers]
        paths = [self.options.networks.student_resume, self.options.run.resume, *teachers]
        return [None if path and path.startswith("hf:") else path for path in paths]  # hf: names no file

    def evaluate_epoch(self, network: nn.Module) -> dict[str, float]:
        """Return the results of `evaluate`, and the measure of --best-by, for the record of an epoch."""
        measure = self.options.run.best_by
        if measure in ("top1", "loss"):
            return self.evaluate(network)
        rows = torch.zeros(len(self.job.data.valid), COLUMNS, dtype=torch.float64)
        results = self.evaluate(network, None, rows)
        return {**results, f"valid_{measure}": class_scores(Predictions.of(rows))[measure]}

    @torch.no_grad()
    def evaluate(
        self, network: nn.Module, preprocessing: Preprocessing | None = None, rows: Tensor | None = None
    ) -> dict[str, float]:
        """Return top-1 and top-5 in percent and the mean loss over the validation images, shared among the ranks.

        Args:
            network: on the device.
            preprocessing: of the network; None for the student's.
            rows: (N, `COLUMNS`) of zeros; the result of `per_image` for every image is written to it.
        """
        parts: list[Tensor] = []
        self.world.share_state(network)
        total = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        network.eval()
        for images, target in self.valid_images(preprocessing):
            with self.autocast():
                outputs = network(images)
            logits = logits_of(outputs).float()
            total += tally(logits, target)
            if rows is not None:
                parts.append(per_image(logits, target))
        if rows is not None:
            own = torch.zeros_like(rows, device=self.world.device)
            if parts:
                own[self.world.rank :: self.world.size] = torch.cat(parts)  # the images of this rank, see FixedBatches
            rows.copy_(self.world.sum(own))
        return result(self.world.sum(total))

    # -- images

    def valid_images(self, preprocessing: Preprocessing | None = None) -> Iterable[tuple[Tensor, Tensor]]:
        """Yield this rank's share of the validation images, and their classes; None for the student's preprocessing."""
        preprocessing = preprocessing or self.job.preprocessing
        if preprocessing not in self._valid_loaders:
            photos = Photos(self.job.data.valid, preprocessing.transform(), cache=self._valid_cache)
            batches = FixedBatches(list(range(len(photos))), self._share, self.world.rank, self.world.size)
            self._valid_loaders[preprocessing] = self.load(photos, batches)
        for images, target, _ in self._passing(self._valid_loaders[preprocessing], "evaluate"):
            yield self.images(images, preprocessing), self.move(target)

    def training_images(self, epoch: int, num_images: int | None = None) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Yield this rank's share of training images with the evaluation transform, their classes and positions.

        Args:
            epoch: the epoch before which the pass is made; the images are drawn anew for each.
            num_images: number of images over all ranks; None for all.
        """
        total = len(self.job.data.train)
        chosen = draw_subset(total, total if num_images is None else num_images, self.seed, epoch)
        batches = FixedBatches(chosen, self._share, self.world.rank, self.world.size)
        photos = Photos(self.job.data.train, self.job.preprocessing.transform(), cache=self.train_cache())
        loading = self.load(photos, batches, persistent=False)
        for images, target, index in self._passing(loading, "match"):
            yield self.images(images), self.move(target), self.move(index)

    def load(
        self, photos: Photos, batches: Sampler[list[Key]], *, persistent: bool = True
    ) -> DataLoader[tuple[Tensor, int, int]]:
        """Return the loader of this rank's batches; `persistent` as in `make_loader`."""
        world = self.world
        return make_loader(photos, batches, self.workers, world.device, persistent=persistent, ending=world.ending)

    def train_cache(self) -> Cache | None:
        """Return the decoded training images, or None with --cache off."""
        if self._train_cache is None:
            self._train_cache = self._cache(self.job.data.train)
        return self._train_cache

    def images(self, images: Tensor, preprocessing: Preprocessing | None = None) -> Tensor:
        """Move bytes (B, H, W, 3) to the device and normalise them, by default as the student's; see --channels-last.

        Several views of each image, (B, V, H, W, 3), become (B, V, 3, H, W).
        """
        if images.ndim == 5:
            flat = self.images(images.flatten(0, 1), preprocessing)
            return flat.reshape(*images.shape[:2], *flat.shape[1:])
        normalised = (preprocessing or self.job.preprocessing).normalise(self.move(images))
        return normalised if self.options.devices.channels_last else normalised.contiguous()

    def move(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device."""
        return tensor.to(self.world.device, non_blocking=True)

    def _cache(self, samples: Sequence[tuple[str, int]]) -> Cache | None:
        if self.options.data.cache == "off":
            return None
        self.world.say(f"=> decoding {len(samples)} images into memory")
        return Cache(samples, read_image, ranks=self.world.local_ranks())

    # -- precision, progress, signals

    def autocast(self) -> torch.autocast:
        """Return the context of mixed precision that --amp asks for."""
        return autocast(self.world.device.type, self.options.devices.amp)

    def progress(self, loading: DataLoader[tuple[Tensor, int, int]], what: str) -> Any:
        """Wrap a loader in a progress bar, on rank 0 in a terminal."""
        if self.world.first and sys.stderr.isatty():
            return tqdm(loading, desc=what, leave=False, dynamic_ncols=True)
        return loading

    def _passing(self, loading: DataLoader[tuple[Tensor, int, int]], what: str) -> Iterator[Any]:
        """Yield the batches of a pass without training; if a rank gets a signal, `Stopped` is raised on all ranks.

        Ranks exchange their signals every `LOOK` batches.
        """
        batches = loading.batch_sampler
        assert isinstance(batches, FixedBatches)
        for number, batch in enumerate(explain_worker_errors(self.progress(loading, what), self.workers)):
            alone = self.world.size == 1
            if self.interrupt is not None and (alone or (number % LOOK == 0 and number < batches.common)):
                signal = self.world.largest(self.interrupt.signal)
                if signal:
                    raise Stopped(signal)
            yield batch
            self.world.passed()
