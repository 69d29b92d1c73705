from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from classification import main_base, main_mgd
from classification.data.folders import read_folder
from classification.data.images import read_image
from classification.data.transforms import normalise
from classification.models import build
from classification.options.config import parse
from classification.runs.world import Seed, World
from classification.training import alone, distilling
from classification.training.engine import Engine
from classification.training.trainer import Trainer
from tests.classification.conftest import SMALL, TEACHER
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
    def shown(engine: Engine, epoch: int, number: int) -> torch.Tensor:
        return torch.cat([images for images, _, _ in engine.training_images(epoch, number)])

    engine = engine_of(options(distil, b="4"))
    first, again, later = (shown(engine, epoch, 10) for epoch in (0, 0, 1))
    assert len(first) == len(later) == 10
    assert torch.equal(first, again) and not torch.equal(first, later)
    found = shown(engine, 3, 1000)
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


@pytest.mark.parametrize("choice", ["0", "1"])
def test_networks_and_images_have_the_layout_that_is_asked_for(choice: str, distil: list[str]) -> None:
    engine = engine_of(options(distil, channels_last=choice))
    last, asked = torch.channels_last, choice == "1"
    assert engine.job.student is not None
    (weight,) = [w for name, w in engine.job.student.named_parameters() if name.endswith("layer2.0.conv1.weight")]
    images, _ = next(iter(engine.valid_images()))
    for tensor in (weight, images):
        assert tensor.is_contiguous(memory_format=last) == asked and tensor.is_contiguous() != asked


def test_a_cache_changes_nothing_but_how_often_files_are_read(
    distil: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(path: str) -> Image.Image:
        read.append(path)
        return read_image(path)

    for module in ("data.folders", "training.engine"):
        monkeypatch.setattr(f"classification.{module}.read_image", counted)
    states = []
    for cache in ("off", "ram"):
        read.clear()
        assert main_mgd.main(options(distil, cache=cache, output=str(tmp_path / cache))) == 0
        states.append(torch.load(tmp_path / cache / "last.pth", weights_only=True)["state_dict"])
    assert len(read) == len(set(read)) == 27 + 15  # each once, for matching, training and evaluation together
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
