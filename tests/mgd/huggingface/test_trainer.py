from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch import multiprocessing as mp
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

import mgd
from mgd.huggingface import DistillationTrainer
from mgd.losses import AT, CE, KD
from mgd.losses.mgd import ChannelMatching
from tests.mgd.huggingface.tiny import Fixed, Images, arguments, difference, mobilenet, vit

MATCHED: dict[str, Any] = {"ce": 1, "kd": (KD.Hyper(temperature=2.0), 0.5), "mgd": None}


class Tutorial(Trainer):
    """The well-known formula, literally."""

    def __init__(self, student: Any, teacher: Any, temperature: float, weight: float, **options: Any) -> None:
        super().__init__(model=student, **options)
        self.teacher, self.temperature, self.weight = teacher, temperature, weight
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            taught = self.teacher(**inputs).logits
        soft = F.softmax(taught / self.temperature, dim=1)
        logs = F.log_softmax(outputs.logits / self.temperature, dim=1)
        divergence = (soft * (soft.log() - logs)).sum(dim=1).mean() * self.temperature**2
        loss = (1 - self.weight) * outputs.loss + self.weight * divergence
        return (loss, outputs) if return_outputs else loss


def trained(
    folder: Path, resume: str | None = None, terms: Any = MATCHED, images: Any = None, **options: Any
) -> DistillationTrainer:
    trainer = DistillationTrainer(
        student_model=mobilenet(1),
        teacher_model=vit(0),
        args=arguments(folder, **options),
        train_dataset=Images() if images is None else images,
        eval_dataset=Images(6),
        terms=terms,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    assert isinstance(trainer.model, nn.Module)
    return dict(trainer.model.state_dict())


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_plain_form_trains_as_the_literal_formula_does(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1}
    literal = Tutorial(vit(1), vit(0), 5.0, 0.3, args=arguments(tmp_path / "a", **steps), train_dataset=Images())
    literal.train()
    ours = DistillationTrainer(
        student_model=vit(1),
        teacher_model=vit(0),
        training_args=arguments(tmp_path / "b", **steps),
        train_dataset=Images(),
        temperature=5.0,
        lambda_param=0.3,
    )
    ours.train()
    assert logged(ours, "loss") == pytest.approx(logged(literal, "loss"), rel=1e-5)
    assert difference(weights(ours), weights(literal)) < 1e-6
    assert difference(weights(ours), vit(1).state_dict()) > 1e-3
    parts = zip(logged(ours, "loss"), logged(ours, "loss_ce"), logged(ours, "loss_kd"), strict=True)
    assert all(loss == pytest.approx(0.7 * ce + 0.3 * kd, rel=1e-5) for loss, ce, kd in parts)


def test_loss_of_a_batch_by_hand(tmp_path: Path) -> None:
    student, teacher = vit(1), vit(0)
    trainer = DistillationTrainer(student_model=student, teacher_model=teacher, args=arguments(tmp_path))
    inputs = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 0])}
    loss, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
    logits, taught = student(inputs["pixel_values"]).logits, teacher(inputs["pixel_values"]).logits
    soft, logs = (taught / 4).softmax(1), (logits / 4).log_softmax(1)
    kd = 16 * (soft * (soft.log() - logs)).sum(1).mean()
    torch.testing.assert_close(loss, 0.5 * F.cross_entropy(logits, inputs["labels"]) + 0.5 * kd)
    torch.testing.assert_close(outputs["logits"], logits)
    loss.backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    # 4 of 16 images of an optimizer step
    torch.testing.assert_close(trainer.compute_loss(student, inputs, num_items_in_batch=16), loss / 4)


@pytest.mark.parametrize("number", [32, 28])  # the last step of 28 has parts of 8 and 4
def test_two_parts_of_eight_equal_a_batch_of_sixteen(number: int, tmp_path: Path) -> None:
    found = []
    for parts in (1, 2):
        args = arguments(
            tmp_path,
            per_device_train_batch_size=16 // parts,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer = DistillationTrainer(
            student_model=vit(1),  # without batch norms, which see the parts
            teacher_model=vit(0),
            args=args,
            train_dataset=Fixed(number),
            terms={"ce": 1, "kd": 2.0, "at": 1.0},
        )
        trainer.train()
        found.append((weights(trainer), logged(trainer, "loss")))
    assert difference(found[0][0], found[1][0]) < 1e-6
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert difference(found[0][0], vit(1).state_dict()) > 1e-3  # it was trained


def test_matching_finds_taps_renews_flows_and_trains_its_layers(tmp_path: Path) -> None:
    teacher = vit(0, depth=4)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = DistillationTrainer(
        student_model=mobilenet(1),
        teacher_model=teacher,
        args=arguments(tmp_path, num_train_epochs=3, save_strategy="epoch", logging_steps=2),
        train_dataset=Images(),
        terms=MATCHED,
    )
    student, (frozen,) = trainer.distiller.student, trainer.distiller.teachers
    assert isinstance(frozen, mgd.Frozen) and isinstance(frozen.taps, mgd.Taps) and isinstance(student, mgd.Taps)
    assert frozen.taps.paths == tuple(f"vit.layers.{number}@tokens:prefix=1" for number in range(3))
    assert len(student.paths) == 3
    term = trainer.distiller.terms["mgd"]
    assert isinstance(term, ChannelMatching) and not term.matched
    layers = {name: value.clone() for name, value in term.named_parameters()}
    trainer.train()
    assert len(logged(trainer, "mgd_flow_cost")) == 2  # before epochs 0 and 2
    assert all(flow.index.min() >= 0 for flow in term.flows)
    assert all(not torch.equal(value, layers[name]) for name, value in term.named_parameters())
    assert difference(teacher.state_dict(), before) == 0
    assert len(logged(trainer, "loss_mgd")) == 4  # of 9 steps, every second is logged
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-9")
    assert difference(saved.state_dict(), weights(trainer)) == 0
    sizes = sum(value.numel() for value in saved.state_dict().values())
    assert sizes == sum(value.numel() for value in mobilenet(0).state_dict().values())


@pytest.mark.parametrize(
    ("images", "step"),
    [(Fixed(), 5), (Images(), 6)],  # 3 steps per epoch, matched before epochs 0 and 2
    ids=["in an epoch", "between epochs, with random transforms"],
)
def test_resume_is_exact(images: Images, step: int, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": step}
    straight = trained(tmp_path, images=images, **kept)
    back = trained(tmp_path / "back", str(tmp_path / f"checkpoint-{step}"), images=images, **kept)
    assert difference(weights(back), weights(straight)) == 0
    assert difference(back.distiller.terms.state_dict(), straight.distiller.terms.state_dict()) == 0
    assert logged(back, "loss") == logged(straight, "loss")


def test_checkpoint_without_the_terms_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, num_train_epochs=1, save_strategy="epoch")
    (tmp_path / "checkpoint-3" / "distillation_terms.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 has no distillation_terms\.pt"):
        trained(tmp_path / "back", resume=str(tmp_path / "checkpoint-3"), num_train_epochs=2)
    other = {"ce": 1, "fitnet": 1}
    trained(tmp_path / "other", terms=other, num_train_epochs=1, save_strategy="epoch")
    with pytest.raises(ValueError, match="is of other terms or other networks"):
        trained(tmp_path / "back", resume=str(tmp_path / "other" / "checkpoint-3"), num_train_epochs=2)
    plain = DistillationTrainer(
        student_model=mobilenet(1), teacher_model=vit(0), args=arguments(tmp_path / "back"), train_dataset=Images()
    )
    with pytest.raises(ValueError, match="is of other terms or other networks, give those again"):
        plain.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))


def train_rank(rank: int, folder: Path, port: int) -> None:
    """Train as one of two processes, forked from a process that has trained alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = train_split(folder, batch=4, ddp_backend="gloo")
    torch.save((weights(found), logged(found, "loss"), logged(found, "mgd_flow_cost")), folder / f"{rank}.pt")


def train_split(folder: Path, batch: int, **options: Any) -> DistillationTrainer:
    trainer = DistillationTrainer(
        student_model=vit(1),
        teacher_model=vit(0, depth=4),
        args=arguments(folder, per_device_train_batch_size=batch, optim="sgd", max_grad_norm=0, **options),
        train_dataset=Fixed(),
        terms={"ce": 1, "mgd": None},
    )
    trainer.train()
    return trainer


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone = train_split(tmp_path, batch=8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [mp.get_context("fork").Process(target=train_rank, args=(rank, tmp_path, port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert difference(found[0][0], found[1][0]) == 0
    assert found[0][1] == pytest.approx(logged(alone, "loss"), rel=1e-3)  # the layers' batch norms see their own part
    assert found[0][2] == found[1][2] == pytest.approx(logged(alone, "mgd_flow_cost"), rel=1e-6)
    assert difference(found[0][0], weights(alone)) < 1e-3 < difference(weights(alone), vit(1).state_dict())


def test_bfloat16_trains_and_evaluates(tmp_path: Path) -> None:
    exact, rounded = (trained(tmp_path, bf16=bf16, num_train_epochs=1) for bf16 in (False, True))
    first, second = logged(exact, "loss")[0], logged(rounded, "loss")[0]
    assert first != second and first == pytest.approx(second, rel=0.05)
    assert rounded.evaluate()["eval_loss"] > 0
    assert weights(rounded)["classifier.weight"].dtype == torch.float32


def test_evaluation_asks_the_student_alone(tmp_path: Path) -> None:
    calls = []
    teacher, student, images = vit(0), vit(1), Fixed(12)
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer = DistillationTrainer(
        student_model=student, teacher_model=teacher, args=arguments(tmp_path), eval_dataset=images
    )
    found = trainer.evaluate()
    labels = torch.arange(12) % 3
    with torch.no_grad():
        logits = student(images.images).logits
    assert found["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert not calls
    predicted = trainer.predict(images)
    torch.testing.assert_close(torch.tensor(predicted.predictions), logits, rtol=1e-4, atol=1e-5)


def test_renewal_leaves_random_numbers_alone(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        student_model=mobilenet(1),
        teacher_model=vit(0),
        args=arguments(tmp_path),
        train_dataset=Images(),
        terms=MATCHED,
    )
    before = torch.get_rng_state()
    trainer.renew(0)
    assert torch.equal(torch.get_rng_state(), before)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


def test_any_network_may_be_student_and_teacher(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        student_model=Net(4),
        teacher_model=mgd.freeze(Net(8), mgd.View((0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (2, 2, 2), size=64)),
        args=arguments(tmp_path, num_train_epochs=4, eval_strategy="epoch"),
        train_dataset=Images(),
        eval_dataset=Images(6),
        terms={"ce": 1, "mgd": 0.01, "mine": (AT(), 0.1)},
        student_taps=["body.2@in"],
        teacher_taps=["body.2@in"],
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert len(losses) == 4
    assert trainer.distiller.student.paths == ("body.2@in",)


def test_refusals(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"student_model": vit(1), "teacher_model": vit(0), "train_dataset": Images(4)}
    args = arguments(tmp_path)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"teacher_model": None}, TypeError, "pass both networks"),
        ({"model": vit(1)}, TypeError, "the network to train is student_model"),
        ({"training_args": args}, TypeError, "two spellings"),
        ({"lambda_param": 1.5}, ValueError, "between 0"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"terms": {"kd": 1}, "temperature": 2.0}, ValueError, "do not work together with terms"),
        ({"terms": {"kdd": 1}}, ValueError, "unknown term 'kdd'; close ones are kd"),
        ({"terms": "mgd"}, ValueError, "names or a dictionary"),
        ({"terms": {}}, ValueError, "at least one term"),
        ({"terms": {"kd": (1.0, 2.0)}}, ValueError, "must be a weight, or"),
        ({"terms": {"udml": 1}}, ValueError, "trains its teachers too"),
        ({"terms": {"ce": 1, "mgd": None}, "train_dataset": None}, ValueError, "pass train_dataset"),
        ({"terms": {"kd": -1}}, ValueError, "terms['kd'] must be a number of at least 0"),
        ({"terms": {"kd": float("nan")}}, ValueError, "terms['kd'] must be a number of at least 0"),
        ({"terms": {"kd": (None, "1")}}, ValueError, "terms['kd'] must be a number of at least 0"),
        ({"temperature": "5"}, TypeError, "temperature must be a number; got '5'"),
        ({"lambda_param": "1"}, ValueError, "lambda_param must be between 0"),
        ({"student_taps": ["vit"]}, ValueError, "give student_taps and teacher_taps, or neither"),
        ({"student_taps": ["vit"], "teacher_taps": ["vit"]}, ValueError, "are read by terms: pass terms too"),
        (
            {"terms": MATCHED, "student_taps": "vit.layers.0@tokens", "teacher_taps": "vit.layers.0@tokens"},
            ValueError,
            "the paths of taps are a list, as ['vit.layers.0@tokens']",
        ),
        ({"teacher_model": usual["student_model"]}, ValueError, "are one network"),
        ({"compute_loss_func": lambda *_: 0}, TypeError, "compute_loss_func is not used here"),
        (
            {"args": arguments(tmp_path, fp16=True)},
            ValueError,
            "fp16 has no effect on a processor: leave it out, or pass",
        ),
        ({"teacher_model": mgd.freeze(vit(0, num_labels=5))}, ValueError, "3 classes, the teacher 5"),
    ]
    for changes, kind, text in cases:
        with pytest.raises(kind, match=re.escape(text)):
            DistillationTrainer(**{**usual, "args": args, **changes})
    names = {0: "a", 1: "b", 2: "c"}, {0: "a", 1: "c", 2: "b"}
    with pytest.raises(ValueError, match="class 1 is 'b' for the student, 'c' for the teacher"):
        DistillationTrainer(student_model=vit(1, id2label=names[0]), teacher_model=vit(0, id2label=names[1]), args=args)
    trainer = DistillationTrainer(**usual, args=args, terms={"ce": (CE(), 1)})
    with pytest.raises(ValueError, match="a batch must hold images as a tensor 'pixel_values'; it holds labels"):
        trainer.compute_loss(trainer.distiller, {"labels": torch.tensor([0])})


def test_an_optimizer_without_the_terms_is_refused(tmp_path: Path) -> None:
    student = mobilenet(1)
    trainer = DistillationTrainer(
        student_model=student,
        teacher_model=vit(0),
        args=arguments(tmp_path),
        train_dataset=Images(),
        terms=MATCHED,
        optimizers=(torch.optim.SGD(student.parameters(), lr=0.1), None),
    )
    with pytest.raises(ValueError, match=r"trainer\.distiller\.parameters"):
        trainer.train()


def test_arguments_of_the_trainer_are_its_own() -> None:
    assert issubclass(DistillationTrainer, Trainer)
    assert isinstance(arguments(Path("x")), TrainingArguments)


def test_a_compiled_step_trains_as_a_plain_one(tmp_path: Path) -> None:
    losses = []
    for compiles in (False, True):
        torch.manual_seed(0)
        options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"} if compiles else {}
        trainer = DistillationTrainer(
            student_model=Net(4),
            teacher_model=vit(0, depth=1),
            args=arguments(tmp_path, max_steps=2, learning_rate=1e-4, **options),
            train_dataset=Fixed(16),
            terms={"ce": 1, "ofd": None},
            student_taps=["body.2@in"],
            teacher_taps=["vit.layers.0@tokens"],
        )
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
