from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classification import main_base, main_mgd
from classification.data.folders import read_folder
from classification.data.images import read_image
from classification.data.preprocessing import normalise
from classification.models import build
from classification.options.config import parse
from classification.runs.world import Seed, World
from classification.training import alone, distilling
from classification.training.engine import Engine
from classification.training.trainer import Trainer
from tests.classification.conftest import SMALL, STUDENT, TEACHER
from tests.classification.seams import run_trainer
from tests.classification.test_main import options, records


def engine_of(words: list[str], script: Any = main_mgd, world: World | None = None) -> Engine:
    parsed = parse(words, script.PROG, distillation=script is main_mgd)
    job = (distilling if script is main_mgd else alone).prepare(parsed, Seed(0, True))
    return Engine(job, world or World())


class Second(World):
    """A rank to which the first one tells its seed."""

    def share(self, number: int) -> int:
        return number + 5


def test_ranks_take_the_seed_of_the_first(distil: list[str]) -> None:
    engine = engine_of(distil, world=Second())
    trainer = Trainer(engine)
    assert [part.seed for part in (engine, trainer.batches, trainer.photos)] == [5] * 3


def test_a_matching_pass_shows_so_many_other_images_each_time_and_without_augmentation(distil: list[str]) -> None:
    def quoted(engine: Engine, epoch: int, number: int) -> torch.Tensor:
        return torch.cat([images for images, _, _ in engine.training_images(epoch, number)])

    engine = engine_of(options(distil, b="4"))
    first, again, later = (quoted(engine, epoch, 10) for epoch in (0, 0, 1))
    assert len(first) == len(later) == 10
    assert torch.equal(first, again) and not torch.equal(first, later)
    found = quoted(engine, 3, 1000)
    samples = read_folder(distil[0]).train
    plain = torch.stack([torch.from_numpy(np.array(read_image(path))) for path, _ in samples])
    torch.testing.assert_close(found, normalise(plain))


def test_a_network_is_evaluated_in_eval_mode_and_left_as_it_is(photos: Path, teacher: Path) -> None:
    engine = engine_of([str(photos), "-a", TEACHER, *SMALL, "--student-resume", str(teacher), "-e"], main_base)
    network = engine.job.student
    assert network is not None
    expected, before = engine.evaluate(network), {k: v.clone() for k, v in network.state_dict().items()}
    network.train()
    assert engine.evaluate(network) == expected
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_teacher_of_other_classes_is_passed_over_and_the_rest_evaluated(distil: list[str], tmp_path: Path) -> None:
    torch.save(build(STUDENT, 3).state_dict(), tmp_path / "student.pth")
    engine = engine_of(options(distil, student_resume=str(tmp_path / "student.pth")))
    engine.job.other_classes = [True]
    assert list(engine.evaluate_all()) == ["student"]


def test_random_weights_are_not_evaluated(distil: list[str], capsys: Any) -> None:
    assert list(engine_of(distil).evaluate_all()) == ["teacher"]
    assert "=> student cifar_resnet8_w0.5, 0.02 M parameters: its weights are random" in capsys.readouterr().out


def test_only_a_training_locks_its_folder(distil: list[str], photos: Path, teacher: Path) -> None:
    assert engine_of(distil).lock is not None
    assert engine_of(options(distil, output=f"{distil[-1]}-2", calibrate="1")).lock is None
    words = [str(photos), "-a", TEACHER, *SMALL, "--student-resume", str(teacher), "-e"]
    assert engine_of(words, main_base).lock is None


@pytest.mark.parametrize("choice", ["0", "1"])
def test_networks_and_images_have_the_layout_that_is_asked_for(choice: str, distil: list[str]) -> None:
    engine = engine_of(options(distil, channels_last=choice))
    last, asked = torch.channels_last, choice == "1"
    assert engine.job.student is not None
    (weight,) = [w for name, w in engine.job.student.named_parameters() if name.endswith("layer2.0.conv1.weight")]
    images, _ = next(iter(engine.valid_images()))
    for tensor in (weight, images):
        assert tensor.is_contiguous(memory_format=last) == asked and tensor.is_contiguous() != asked


def test_a_cache_changes_nothing_and_no_file_is_read_again(distil: list[str], tmp_path: Path) -> None:
    def remove_images(_: Trainer) -> None:
        shutil.rmtree(copy)  # matching, training and evaluation do without

    copy = shutil.copytree(distil[0], tmp_path / "copy")
    changes: list[tuple[str, list[str], Callable[[Trainer], object]]] = [
        ("off", distil, lambda _: None), ("ram", [str(copy), *distil[1:]], remove_images)
    ]  # fmt: skip
    states = []
    for cache, words, change in changes:
        assert run_trainer(options(words, cache=cache, output=str(tmp_path / cache)), change) == 0
        states.append(torch.load(tmp_path / cache / "last.pth", weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert records(tmp_path / "off")[1]["valid_top1"] == records(tmp_path / "ram")[1]["valid_top1"]


def test_all_ranks_evaluate_the_network_of_the_first(photos: Path, teacher: Path) -> None:
    class Second(World):
        def share_state(self, module: torch.nn.Module) -> None:
            """Take the weights of the first."""
            module.load_state_dict(states[0])

    states: list[dict[str, torch.Tensor]] = []
    words = [str(photos), "-a", TEACHER, *SMALL, "--student-resume", str(teacher), "-e"]
    engine, second = engine_of(words, main_base), engine_of(words, main_base, Second())
    trained = engine.job.student
    assert trained is not None
    torch.manual_seed(0)
    other = build(TEACHER, 3)
    expected = engine.evaluate(trained)
    assert engine.evaluate(other) != expected
    states.append(trained.state_dict())
    assert second.evaluate(other) == expected
