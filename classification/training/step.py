"""One optimisation step, with gradient accumulation, and handling of non-finite values and out-of-memory errors."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from classification.data.mixing import make_mixer
from classification.data.soft_labels import SoftLabels
from classification.errors import RunError, UserError
from classification.options.config import epoch_name
from classification.options.options import Options
from classification.runs.metrics import hits
from classification.runs.world import World, wrap
from classification.training.averaging import average
from classification.training.balance import gradient_shares, largest_gradient, terms_not_finite
from classification.training.dot import DOT
from classification.training.engine import Engine
from classification.training.flags import Flags, Met
from classification.training.job import Job
from classification.training.optimizer import build_optimizer
from classification.training.precision import MixedPrecision
from classification.training.stored import Given
from mgd import Ahead, Outputs

Loaded = Sequence[Tensor]  # images, target and index from the loader, then the stored outputs of a teacher, if any
Pending = Future[list[Outputs]] | None  # the teachers' outputs for a batch, if they are computed ahead

SMALLEST_SCALE = 2.0**-20  # of the scaler, which starts with 2^16


@dataclass(frozen=True)
class _Done:
    """A step, to find the cause if its loss or gradient is not finite."""

    epoch: int
    step: int
    parts: Sequence[Loaded]
    values: Sequence[Mapping[str, Tensor]]  # of the terms, for each part
    pending: Pending
    generators: Sequence[Any]  # states of the random number generators before the step


class Stepper:
    """Update the weights of a job's distiller, one batch at a time.

    Args:
        engine: the job on this rank.
    """

    def __init__(self, engine: Engine) -> None:
        job, options, world = engine.job, engine.options, engine.world
        assert job.distiller is not None and job.student is not None
        self.engine = engine
        self.student, self.distiller = job.student, job.distiller.to(world.device)
        self.optimizer = build_optimizer(self.distiller, options.optimisation)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.devices.amp == "fp16")
        if options.devices.compile:
            self._compile()
        self.wrapped = wrap(MixedPrecision(self.distiller, world.device, options.devices.amp), world, options.devices)
        self.average = average(self.student, options.optimisation.ema) if options.optimisation.ema else None
        # Stored views are mixed when they are loaded, as the teacher saw them.
        self.mix = make_mixer(options.data, job.num_classes) if job.stored is None else None
        soft = job.data.soft
        self.soft = SoftLabels(job.data.train, soft, job.num_classes, world.device) if soft else None
        self._ahead = self._teachers_ahead()
        self.skipped = 0  # number of steps left out because their loss or gradient was not finite
        self.met = Met()  # the latest flags of all ranks
        # To leave a step out, its flags must be read before the update.
        late = world.device.type == "cuda" and not options.run.skip_nonfinite
        self._flags = Flags(world, late=late)
        self._last: _Done | None = None

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
        """Of the run."""
        return self.engine.options

    def _compile(self) -> None:
        choice = self.options.devices.compile_student
        student = self.world.device.type == "cuda" if choice is None else bool(choice)
        self.distiller.compile(student=student, dynamic=False)  # the batches of an epoch have two sizes

    def _compile_context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward: with --compile, it must keep its buffers for several backwards."""
        if not self.options.devices.compile:
            return contextlib.nullcontext()
        keep: contextlib.AbstractContextManager[Any] = torch._functorch.config.patch(donated_buffer=False)
        return keep

    def _teachers_ahead(self) -> Ahead | None:
        threads = self.options.devices.teacher_threads
        if not threads:
            return None
        try:
            return Ahead(self.distiller.teachers, threads)
        except ValueError as error:
            raise UserError(f"--teacher-threads {threads}: {error}") from error

    def ahead(self, batches: Iterable[Loaded]) -> Iterable[tuple[Loaded, Pending]]:
        """Yield batches, each with the future outputs of its teachers if --teacher-threads computes them ahead."""
        if self._ahead is None:
            return ((batch, None) for batch in batches)
        return self._ahead(batches, lambda batch: self.engine.images(batch[0]))

    def forward(
        self,
        images: Tensor,
        target: Tensor | None,
        index: Tensor,
        epoch: int,
        pending: Pending = None,
        module: nn.Module | None = None,
        counts: Sequence[int] | None = None,
        stored: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Return the distiller's values for a batch from the loader; `target` is not used in a run without labels.

        `pending` is from `ahead`; `module` runs in place of the wrapped distiller; `counts` are the images of each
        rank; `stored` are the stored teacher outputs of a batch of --teacher-cache.
        """
        images, index = self.engine.images(images), self.engine.move(index)
        target = self.engine.move(target) if target is not None and self.options.labelled else None
        mixed, soft = self.mix(images, target) if self.mix else (images, target)
        if self.soft is not None and target is not None:
            soft = self.soft(index)
        taught, mixes = pending.result() if pending else None, self.mix is not None
        if stored and self.job.stored is not None:
            stored_outputs = Given(*map(self.engine.move, stored))
            taught, mixes = stored_outputs.outputs(self.job.num_classes), self.job.stored.plan.views.mixes
            soft = stored_outputs.mix(target, self.job.num_classes) if mixes and target is not None else soft
        with self._compile_context():
            values: dict[str, Tensor] = (module or self.wrapped)(mixed, soft, index, epoch, taught, counts)
        if target is not None and not mixes:
            values["train_hits"] = hits(values["logits"].detach().float(), target)[:1] / len(target)
        return values

    def __call__(
        self, batch: Loaded, epoch: int, step: int, size: int, pending: Pending = None
    ) -> dict[str, Tensor] | None:
        """Do a step.

        Args:
            batch: this rank's part.
            epoch: number of the epoch.
            step: number of the step in it.
            size: images of the batch over all ranks.
            pending: from `ahead`.

        Returns:
            The values of the terms, or None if the step was left out.

        Raises:
            RunError: a loss or gradient is not finite, or memory ran out.
        """
        images, where = batch[0], f"{epoch_name(self.options.optimisation, epoch)}, step {step + 1}"
        try:
            return self._step(batch, epoch, step, size, pending)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            few, size = len(images) // self.options.optimisation.accumulate, images.shape[-2]
            lower = ", or lower --accumulate" if self.options.optimisation.accumulate > 1 else ""
            raise UserError(
                f"a batch norm cannot train on {few} image of {size} px: raise -b or --img-size{lower}"
            ) from error
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            text = str(error)
            if "C++ compiler" in text:
                raise UserError(
                    "--compile 1 needs a C++ compiler, g++ or clang: install one, or leave it out"
                ) from error
            if isinstance(error, RuntimeError) and not any(w in text for w in ("out of memory", "allocate memory")):
                raise
            raise RunError(
                f"memory ran out in {where}, with {len(images)} images of {images.shape[-2]} px: lower -b or "
                "--img-size, raise --accumulate, use --amp bf16, or leave out --cache ram"
            ) from error

    def _step(self, batch: Loaded, epoch: int, step: int, size: int, pending: Pending) -> dict[str, Tensor] | None:
        before = self._buffers() if self.options.run.skip_nonfinite else {}
        generators = _generators(self.world.device)
        parts = list(zip(*(tensor.tensor_split(self.options.optimisation.accumulate) for tensor in batch), strict=True))
        values_of_parts: list[dict[str, Tensor]] = []
        shares: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self._local():
                images, target, index, *stored = part
                counts = self._counts(size, number)
                values = self.forward(images, target, index, epoch, pending, counts=counts, stored=stored)
                if step == 0 and last:
                    weights = self.distiller.weights(epoch)
                    shares = gradient_shares(self.distiller.groups(), values, weights, self.scaler.scale)
                # DDP averages gradients over ranks; each part must count in proportion to its images.
                share = len(part[0]) * self.world.size / size
                if isinstance(self.optimizer, DOT):
                    self.optimizer.note(self._loss_of_teachers(values, epoch) * share)
                self.scaler.scale(values["loss"].mean() * share).backward()
            del values["logits"]
            values_of_parts.append({name: value.detach() for name, value in values.items()})
        if isinstance(self.optimizer, DOT):
            self.optimizer.average(self.world)
        done = _Done(epoch, step, parts, values_of_parts, pending, generators)
        self._exchange(values_of_parts)
        if self._flags.late:
            done, self._last = self._last or done, done
        if self.met.loss or self.met.gradient:
            self._leave_out(done, before)
            return None
        if self.options.optimisation.clip_gradients is not None:
            self.scaler.unscale_(self.optimizer)
            weights_to_clip = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            nn.utils.clip_grad_norm_(weights_to_clip, self.options.optimisation.clip_gradients)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.student)
        means: dict[str, Tensor] = {}
        for part, values in zip(parts, values_of_parts, strict=True):
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + value * (len(part[0]) / len(batch[0]))
        return means | {f"{name}_share": share for name, share in shares.items()}

    def _counts(self, size: int, part: int) -> list[int] | None:
        """Return the number of images of each rank in a part of a global batch of `size`; None for a single rank."""
        if self.world.size == 1:
            return None
        parts = self.options.optimisation.accumulate
        return [
            count_of_part(count_of_part(size, self.world.size, rank), parts, part) for rank in range(self.world.size)
        ]

    def _loss_of_teachers(self, values: Mapping[str, Tensor], epoch: int) -> Tensor:
        """Return the weighted sum of the terms that read teachers."""
        weights, terms = self.distiller.weights(epoch), self.distiller.terms.items()
        losses = [weights[name] * values[name].mean() for name, term in terms if not getattr(term, "alone", False)]
        return torch.stack(losses).sum()

    def _local(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which DDP does not average gradients: for all parts of a batch except the last."""
        ddp = isinstance(self.wrapped, nn.parallel.DistributedDataParallel)
        return self.wrapped.no_sync() if ddp else contextlib.nullcontext()  # type: ignore[operator]

    def _exchange(self, values_of_parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Exchange the flags of this step.

        Gradients are not checked with --amp fp16: its scaler leaves a step out if they overflow, and lowers its scale.
        """
        losses, interrupt = torch.stack([values["loss"].mean() for values in values_of_parts]), self.engine.interrupt
        gradient = None if self.scaler.is_enabled() else ~largest_gradient(self.distiller).isfinite()
        signal, save = (interrupt.signal, interrupt.take_save()) if interrupt is not None else (0, False)
        self.met = self._flags.exchange(~losses.isfinite().all(), gradient, signal, save)

    def settle(self) -> None:
        """Read the flags of the last step, before its weights are saved.

        Raises:
            RunError: a loss or a gradient is not finite.
        """
        met = self._flags.settle()
        if (met.loss or met.gradient) and self._last is not None:
            self.met = met
            self._leave_out(self._last, {})
        self.met = Met(signal=met.signal or self.met.signal, save=met.save or self.met.save)

    def _cause(self, done: _Done) -> str:
        """Name the terms and images that caused a non-finite loss or gradient."""
        if self.met.loss:
            return self._bad_losses(done)
        if self._flags.late:  # the weights have changed since
            return " though the loss is; --skip-nonfinite 1 would name the term"
        return self._bad_gradients(done)

    def _bad_losses(self, done: _Done) -> str:
        """Name the terms and images of the first part whose loss is not finite."""
        for part, values in zip(done.parts, done.values, strict=True):
            if not values["loss"].isfinite().all():
                terms = [name for name in self.distiller.terms if not values[name].isfinite().all()]
                return self._named(terms or ["sum"], part)
        return " (on another rank)"

    def _bad_gradients(self, done: _Done) -> str:
        """Compute the batch again with the same random draws; name terms and images of the first bad gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        _set_generators(self.world.device, done.generators)
        # All parts are computed, because terms exchange values with those of other ranks.
        terms_of_parts = [self._terms_of(part, done.epoch, done.pending) for part in done.parts]
        for part, terms in zip(done.parts, terms_of_parts, strict=True):
            if terms:
                return f" though the loss is{self._named(terms, part)}"
        return f" though the loss is{' (on another rank)' if self.world.size > 1 else ''}"

    def _terms_of(self, part: Loaded, epoch: int, pending: Pending) -> list[str]:
        ddp = isinstance(self.wrapped, nn.parallel.DistributedDataParallel)  # DDP needs a backward after each forward
        module: Any = self.wrapped.module if ddp else self.wrapped
        images, target, index, *stored = part
        values = self.forward(images, target, index, epoch, pending, module=module, stored=stored)
        return terms_not_finite(self.distiller, values, self.distiller.weights(epoch))

    def _named(self, terms: Sequence[str], part: Loaded) -> str:
        files = [self.job.data.train[int(i)][0] for i in part[2]]
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        return f" (term {', '.join(terms)}; images {', '.join(files[:4])}{more})"

    def _buffers(self) -> dict[str, Tensor]:
        """Copy all buffers except the banks of all images, which accept only finite values."""
        return {n: value.clone() for n, value in self.distiller.named_buffers() if not n.endswith("_bank")}

    def _leave_out(self, done: _Done, before: Mapping[str, Tensor]) -> None:
        """Undo the changes of the forward, or stop the run.

        Raises:
            RunError: more steps would be left out than --skip-nonfinite allows, or weights are not finite.
        """
        what = "loss" if self.met.loss else "gradient"
        where = f"{epoch_name(self.options.optimisation, done.epoch)}, step {done.step + 1}"
        failure = f"the {what} is not finite in {where}{self._cause(done)}"
        self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        last, best = (self.job.folder / f"{name}.pth" for name in ("last", "best"))
        if self.skipped > self.options.run.skip_nonfinite:
            raise RunError(
                f"{failure}: lower --lr or the term's weight, look at the images, or allow some such steps with "
                f"--skip-nonfinite N; {last} is from before that"
                f"{f', and {best} from the best epoch' if best.exists() else ''}"
            )
        if not finite(self.distiller):
            raise RunError(f"{failure}, because weights are not: lower --lr; {last} is from before that")
        for name, value in self.distiller.named_buffers():
            if name in before:
                value.copy_(before[name])
        self.world.say(f"!! WARNING: {failure}: left out, {self.skipped} of {self.options.run.skip_nonfinite}")

    def check_scale(self, epoch: int) -> None:
        """Check that the gradients of a run with --amp fp16 are finite at some scale.

        Raises:
            RunError: the scaler has lowered its scale below `SMALLEST_SCALE`.
        """
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            when = epoch_name(self.options.optimisation, epoch)
            raise RunError(
                f"the gradients are not finite in float16 at any scale, in {when}: use --amp bf16 or off, or lower the "
                "weights of the terms"
            )

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def count_of_part(num: int, parts: int, part: int) -> int:
    """Return how many of `num` images a part gets, as `torch.tensor_split` divides them."""
    return num // parts + (part < num % parts)


def finite(module: nn.Module) -> bool:
    """Return whether all weights that train are finite."""
    weights = [weight.detach() for weight in module.parameters() if weight.requires_grad]
    return not weights or bool(torch.stack([weight.isfinite().all() for weight in weights]).all())


def _generators(device: torch.device) -> list[Any]:
    """Return the states of the random number generators that a forward may use."""
    states = [random.getstate(), torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generators(device: torch.device, states: Sequence[Any]) -> None:
    random.setstate(states[0])
    torch.set_rng_state(states[1])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[2], device)
