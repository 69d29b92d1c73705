"""`DistillationTrainer`: the Trainer of transformers with a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mgd.distiller import Distiller
from mgd.huggingface.classes import check_classes
from mgd.huggingface.images import IMAGES, INDEX, LABELS, as_views, own_random_numbers, read_batches
from mgd.huggingface.terms import Said, Weight, build_terms, plain_terms, read_maps, specified, tap
from mgd.losses import CE, Term
from mgd.losses.kd import KD
from mgd.taps import Batch, Outputs, Taps, logits_of
from mgd.teachers import Frozen, freeze

STATE = "distillation_terms.pt"  # in a checkpoint, beside the optimizer's state


class DistillationTrainer(Trainer):
    """Train a student on images by the Trainer of transformers, with a frozen teacher.

    loss = (1 - lambda_param) * cross-entropy + lambda_param * temperature^2 * KL(teacher || student)

    or, with `terms`, only the weighted sum of those terms. The loss is a mean over all images of an optimizer step, for
    any number of processes and accumulation steps. A batch holds "pixel_values" (B, 3, H, W), "labels"
    (B,), and for terms with a memory "index" (B,), the positions of the images in the data set.

    In evaluation, only the student runs, and "eval_loss" is its cross-entropy. A checkpoint has the plain student, and
    the state of the terms in a separate file. Terms are updated before every epoch.

    Args:
        student_model: the network to train: of transformers, or any whose forward takes images and returns logits.
        teacher_model: the same, with its weights; or the result of `mgd.freeze`, for example with a `View`.
        args: of the training.
        training_args: another spelling of `args`.
        temperature: tau > 0; default 4.
        lambda_param: weight of the teacher, in [0, 1]; default 0.5.
        terms: names of `mgd.losses.LOSSES`, or {name: weight}, {name: hyper-parameters or a term}, or
            {name: (hyper-parameters or a term, weight)}; the weight None means the term's default. It replaces
            `temperature` and `lambda_param`.
        student_taps: paths of the student's maps, see `mgd.Taps`; by default, pairs are found if a term needs maps.
        teacher_taps: paths of the teacher's maps, of the same number.
        options: those of `Trainer`, except model, model_init and compute_loss_func.

    Raises:
        ValueError: terms, taps or networks do not fit together; FSDP or DeepSpeed is on; or fp16 without a GPU.
        TypeError: a network is missing, or an option is unknown.
    """

    def __init__(
        self,
        *,
        student_model: nn.Module | None = None,
        teacher_model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        training_args: TrainingArguments | None = None,
        temperature: float | None = None,
        lambda_param: float | None = None,
        terms: Mapping[str, Said] | Sequence[str] | None = None,
        student_taps: Sequence[str] | None = None,
        teacher_taps: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        if not (isinstance(student_model, nn.Module) and isinstance(teacher_model, nn.Module)):
            raise TypeError("pass both networks, as student_model and teacher_model")
        if student_model is teacher_model:
            raise ValueError(
                "student_model and teacher_model are one network: pass copy.deepcopy(...) of it as teacher"
            )
        _check_spellings(options, args, training_args)
        if terms is not None and not (temperature is None and lambda_param is None):
            raise ValueError(
                "temperature and lambda_param do not work together with terms: in terms, write {'kd': (KD.Hyper(...), "
                "1)}"
            )
        if (student_taps is None) != (teacher_taps is None):
            raise ValueError("give student_taps and teacher_taps, or neither")
        if student_taps is not None and terms is None:
            raise ValueError(
                "student_taps and teacher_taps are read by terms: pass terms too, as {'ce': 1, 'mgd': None}"
            )
        check_classes(student_model, teacher_model, options.get("train_dataset"))
        arguments = training_args if args is None else args
        table = (
            None if terms is None else specified(terms, 0.0 if arguments is None else arguments.label_smoothing_factor)
        )
        if arguments is not None and arguments.fp16 and arguments.device.type == "cpu":  # silently float32 otherwise
            raise ValueError("fp16 has no effect on a processor: leave it out, or pass bf16=True")
        super().__init__(model=student_model, args=arguments, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("a DistillationTrainer trains in one process or by DDP: leave out fsdp and deepspeed")
        # `compute_loss` divides by the images of a step, so the Trainer must not divide by the number of its parts.
        self.model_accepts_loss_kwargs = True
        self.label_names = self.label_names or [LABELS]  # empty if the network has no argument of that name
        self.labels_loss = CE(label_smoothing=self.args.label_smoothing_factor)
        if table is None:
            plain = plain_terms(
                KD.Hyper().temperature if temperature is None else temperature,
                0.5 if lambda_param is None else lambda_param,
                self.args.label_smoothing_factor,
            )
            self.distiller = Distiller(student_model, freeze(teacher_model), plain)
        else:
            named = None if student_taps is None or teacher_taps is None else (student_taps, teacher_taps)
            self.distiller = self._distiller(student_model, freeze(teacher_model), table, named)
        if self.place_model_on_device:
            self.distiller.to(self.args.device)
        self._values: dict[str, list[Tensor]] = {}  # of every term since the last log
        self.add_callback(_Renewal(self.renew))

    def renew(self, epoch: int) -> None:
        """Update every term from the networks, for example the flows of `mgd`, and log its numbers.

        Args:
            epoch: counted from 0.
        """
        with own_random_numbers(self.args.seed + epoch):
            updates = self.distiller.update(
                epoch, partial(self._views, epoch), seed=self.args.seed, context=self.accelerator.autocast
            )
        numbers = {
            f"{name}_{key}": float(value) for name, (values, _) in updates.items() for key, value in values.items()
        }
        if numbers:
            self.log(numbers)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, a scalar; with `return_outputs` also {"loss", "logits", name: value of a term}.

        Args:
            model: the model that the Trainer trains.
            inputs: a batch, see the class.
            return_outputs: see above.
            num_items_in_batch: number of images of the optimizer step; the loss is this batch's part of their mean.
        """
        images, target, index = self._as_views(inputs)
        distiller = self.distiller if model is self.model else model
        values = distiller(images, target, index, int(self.state.epoch or 0))
        loss = values["loss"]
        if num_items_in_batch is not None:
            loss = loss * (len(images) * self.accelerator.num_processes / num_items_in_batch)
        if self.distiller.training:
            for name in self.distiller.terms:
                self._values.setdefault(name, []).append(values[name].detach().mean())
        return (loss, {**values, "loss": loss}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the student's cross-entropy and logits for a batch, and its labels; None for missing ones."""
        images, target, _ = self._as_views(self._prepare_inputs(inputs))
        with torch.no_grad(), self.accelerator.autocast():
            logits = logits_of(model(images.to(next(model.parameters(), images).dtype))).float()
        loss = None if target is None else self.labels_loss(Outputs(logits), [], Batch(target))
        return (loss, None, None) if prediction_loss_only else (loss, logits, target)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of an optimizer step, and their number of images over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        number = torch.tensor(sum(len(as_views(batch)[0]) for batch in batches), device=device)
        return batches, self.accelerator.gather(number).sum() if self.args.world_size > 1 else number

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer of student and terms.

        Raises:
            ValueError: the student has no parameters to train; or a given optimizer lacks parameters of the terms.
        """
        if not any(parameter.requires_grad for parameter in self.distiller.networks[0].parameters()):
            raise ValueError("all parameters of the student are frozen: call requires_grad_(True) on those to train")
        if self.optimizer is None:
            optimizer = super().create_optimizer(self.distiller if model is None else model)
        else:
            optimizer = self.optimizer
        optimised = {id(value) for group in optimizer.param_groups for value in group["params"]}
        if any(id(value) not in optimised for value in self.distiller.terms.parameters()):
            raise ValueError(
                "terms have parameters that the optimizer lacks: make it of trainer.distiller.parameters()"
            )
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log numbers; to those of training, add the mean raw value of every term since the last log."""
        if "loss" in logs and self._values:
            means = {f"loss_{name}": torch.stack(values).mean().item() for name, values in self._values.items()}
            self._values = {}
            logs = {**logs, **means}
        super().log(logs, *args, **options)

    # The following methods are called by the Trainer, but not documented.

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Wrap student and terms together, so that DDP averages the gradients of both."""
        if not training or model is not self.model:
            wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
            return wrapped
        wrapped = super()._wrap_model(self.distiller, training, dataloader)
        return self.accelerator.prepare_model(wrapped) if wrapped is self.distiller else wrapped

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for term in self._terms():
            term.collect(first=self.is_world_process_zero())
        if self.args.should_save:
            torch.save(self.distiller.terms.state_dict(), Path(output_dir, STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._load_terms(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_terms(self, checkpoint: str) -> None:
        path, own = Path(checkpoint, STATE), self.distiller.terms.state_dict()
        if own and not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {STATE}: it is no checkpoint of these terms, and no run can be resumed from it"
            )
        if path.is_file():
            try:
                self.distiller.terms.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            except RuntimeError as error:
                what = " ".join(str(error).split())[:200]
                raise ValueError(f"{path} is of other terms or other networks, give those again: {what}") from error
        for term in self._terms():
            term.check_state()
            if not self.is_world_process_zero():
                term.forget()

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        self._signature_columns = list(dict.fromkeys([*columns, IMAGES, LABELS, INDEX]))  # type: ignore[assignment]

    def _distiller(
        self,
        student_model: nn.Module,
        teacher: Frozen,
        table: Mapping[str, tuple[Any, Weight | None]],
        named: tuple[Sequence[str], Sequence[str]] | None,
    ) -> Distiller:
        """Tap the networks if a term reads maps, and build the terms for images of the training's size."""
        student, before_relu = Taps(student_model), False
        teacher.to(self.args.device)
        images = self._example()
        if named is not None or read_maps(table):
            student, teacher, before_relu = tap(student_model, teacher, images, named)
        num_images = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else 1
        return Distiller(student, teacher, build_terms(table, student, teacher, images, num_images, before_relu))

    def _terms(self) -> list[Term]:
        return [term for term in self.distiller.terms.values() if isinstance(term, Term)]

    def _read(self, **options: Any) -> Iterator[Mapping[str, Any]]:
        collate: Callable[[list[Any]], Mapping[str, Any]] = self._get_collator_with_removed_columns(
            self.data_collator, "training"
        )
        for batch in read_batches(self.train_dataset, collate, **options):
            yield self._prepare_inputs(dict(batch))

    def _example(self) -> Tensor:
        """Return one training image (1, 3, H, W), to probe the networks."""
        if self.train_dataset is None:
            raise ValueError("terms are built for images of one size: pass train_dataset")
        with own_random_numbers(self.args.seed):
            return as_views(next(self._read(batch_size=1, num_images=1)))[0]

    def _as_views(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return as_views(batch, [*self.label_names, LABELS])

    def _views(self, epoch: int, num_images: int | None) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        ranks = self.args.world_size
        batches = self._read(
            batch_size=self.args.train_batch_size,
            workers=self.args.dataloader_num_workers,
            num_images=None if num_images is None else -(-num_images // ranks),
            seed=self.args.seed + epoch,
            rank=self.args.process_index,
            num_ranks=ranks,
        )
        return map(self._as_views, batches)


def _check_spellings(options: Mapping[str, Any], *arguments: TrainingArguments | None) -> None:
    if {"model", "model_init"} & set(options):
        raise TypeError("the network to train is student_model; model and model_init are not used here")
    if options.get("compute_loss_func") is not None:
        raise TypeError(
            "compute_loss_func is not used here, the loss is that of the terms: pass your own as one of them, as "
            "terms={'mine': (module, 1)}"
        )
    if None not in arguments:
        raise TypeError("args and training_args are two spellings of one argument: pass one of them")


class _Renewal(TrainerCallback):
    """Call a function before every epoch, but not if a resumed run continues within an epoch."""

    def __init__(self, renew: Callable[[int], None]) -> None:
        self.renew = renew

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        epoch = state.epoch or 0.0
        if epoch == int(epoch):
            self.renew(int(epoch))
