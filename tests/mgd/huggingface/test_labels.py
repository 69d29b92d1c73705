"""Labels of a `DistillationTrainer`: their name, their smoothing, and none at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mgd.huggingface import DistillationTrainer, accuracy_and_f1
from mgd.losses import AT, CE
from tests.mgd.huggingface.test_trainer import logged
from tests.mgd.huggingface.tiny import Fixed, Images, arguments, mobilenet, vit


class Named(Fixed):
    """Its labels have a name of their own, or there are none."""

    def __init__(self, number: int, name: str | None) -> None:
        super().__init__(number)
        self.name = name

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        label = item.pop("labels")
        return item if self.name is None else {**item, self.name: label}


def test_labels_have_the_name_that_the_arguments_give(tmp_path: Path) -> None:
    losses = []
    for name in ("labels", "target"):
        trainer = DistillationTrainer(
            student_model=mobilenet(1),
            teacher_model=vit(0),
            args=arguments(tmp_path, label_names=[name], max_steps=2),
            train_dataset=Named(16, name),
            eval_dataset=Named(6, name),
            compute_metrics=accuracy_and_f1,
        )
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_the_teacher_alone_needs_no_labels(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        student_model=mobilenet(1),
        teacher_model=vit(0),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=Named(16, None),
        lambda_param=1,
    )
    trainer.train()
    assert len(logged(trainer, "loss_kd")) == 2 and not logged(trainer, "loss_ce")


def test_label_smoothing_of_the_arguments_is_that_of_the_labels_term(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"student_model": mobilenet(1), "teacher_model": vit(0), "train_dataset": Fixed(4)}
    args = arguments(tmp_path, label_smoothing_factor=0.25)
    batch = {"pixel_values": Fixed(4).images, "labels": torch.tensor([0, 1, 2, 0])}
    for terms in ({"ce": 1}, ["ce"], {"ce": (None, 1)}):
        trainer = DistillationTrainer(**usual, args=args, terms=terms)
        loss, outputs = trainer.compute_loss(trainer.distiller.eval(), batch, return_outputs=True)
        expected = F.cross_entropy(outputs["logits"], batch["labels"], label_smoothing=0.25)
        torch.testing.assert_close(loss, expected)
    own: dict[str, Any] = {"ce": CE.Hyper(label_smoothing=0.5), "mine": AT()}  # what is said of a term itself counts
    trainer = DistillationTrainer(
        **usual,
        args=args,
        terms=own,
        student_taps=["mobilenet_v2.layer.3"],
        teacher_taps=["vit.layers.0@tokens"],
    )
    ce = trainer.distiller.terms["ce"]
    assert isinstance(ce, CE) and ce.hyper.label_smoothing == 0.5
    assert trainer.distiller.weights(0) == {"ce": 1.0, "mine": AT().weight}


def test_a_student_without_a_free_parameter_is_refused(tmp_path: Path) -> None:
    student = mobilenet(1)
    student.requires_grad_(False)
    trainer = DistillationTrainer(
        student_model=student, teacher_model=vit(0), args=arguments(tmp_path), train_dataset=Images()
    )
    with pytest.raises(ValueError, match="all parameters of the student are frozen"):
        trainer.train()
